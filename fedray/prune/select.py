"""Which coordinates to keep: exact counts, the highest scores, ties to the lower flat index.

A count and not a threshold, because comparing with a threshold keeps or drops all ties at once. Everything
happens in float32 on the CPU, where the order of ties is ours, so two machines find the same mask.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from fedray.errors import ConfigError, NumericError
from fedray.keys import Key
from fedray.tree import Layout, Mask, Tree


def keep_top(score: Tree, counts: Mapping[str, int], *, names: tuple[str, ...], within: Mask | None = None) -> Mask:
    """Keep the `counts[name]` coordinates of each named tensor that have the highest score.

    within: only these coordinates may be kept; all without it. Tensors outside `names` are kept whole.
    Raises NumericError for a score that is NaN, ConfigError for a count that cannot be kept.
    """
    values = _array(score)
    kept = np.ones(score.layout.size, dtype=np.bool_)
    for name in names:
        span = score.layout.spans[name]
        allowed = None if within is None else within.flat.numpy()[span]
        kept[span] = _top(values[span], counts[name], allowed, f"tensor {name!r}")
    return Mask(score.layout, torch.from_numpy(kept))


def keep_top_global(score: Tree, count: int, *, names: tuple[str, ...], within: Mask | None = None) -> Mask:
    """Keep the `count` coordinates of all named tensors together that have the highest score.

    within: only these coordinates may be kept; all without it. Tensors outside `names` are kept whole.
    Raises NumericError for a score that is NaN, ConfigError for a count that cannot be kept.
    """
    values = _array(score)
    named = np.zeros(score.layout.size, dtype=np.bool_)
    for name in names:
        named[score.layout.spans[name]] = True
    allowed = None if within is None else within.flat.numpy()[named]
    kept = np.ones(score.layout.size, dtype=np.bool_)
    kept[named] = _top(values[named], count, allowed, f"tensors {', '.join(names)}")
    return Mask(score.layout, torch.from_numpy(kept))


def random_mask(
    layout: Layout, names: tuple[str, ...], counts: Mapping[str, int], key: Key, *, within: Mask | None = None
) -> Mask:
    """Keep `counts[name]` coordinates of each named tensor, drawn without replacement by `key`.

    within: only these coordinates may be kept; all without it. Where all may, the mask is a pure function of what a
    receiver knows, who draws it from its `seed`: `random_mask(layout, names, dict(zip(names, counts)), Key(digest))`.
    """
    kept = np.ones(layout.size, dtype=np.bool_)
    for name in names:
        span = layout.spans[name]
        size, count = span.stop - span.start, counts[name]
        places = np.arange(size) if within is None else np.flatnonzero(within.flat.numpy()[span])
        _refuse_count(count, len(places), f"tensor {name!r}")
        drawn = np.zeros(size, dtype=np.bool_)
        drawn[places[key.fold("kept", name).permutation(len(places)).numpy()[:count]]] = True
        kept[span] = drawn
    free = within is None or bool(within.flat.all())
    seed = (key.digest, tuple(counts[name] for name in names), names) if free else None
    return Mask(layout, torch.from_numpy(kept), seed=seed)


def _array(score: Tree) -> np.ndarray:
    values = score.flat.detach().cpu().numpy()
    nans = np.isnan(values)
    if nans.any():
        name = score.layout.locate(int(nans.argmax()))
        raise NumericError(f"a score in tensor {name!r} is NaN and cannot be ranked; lower trainer.lr")
    return values


def _top(values: np.ndarray, count: int, allowed: np.ndarray | None, what: str) -> np.ndarray:
    """Bool, shape of `values` (n,): True at the `count` highest, the lower index first on a tie."""
    if allowed is not None:
        places = np.flatnonzero(allowed)
        chosen = np.zeros(values.shape, dtype=np.bool_)
        chosen[places[_top(values[places], count, None, what)]] = True
        return chosen
    size = values.shape[0]
    _refuse_count(count, size, what)
    if count in (0, size):
        return np.full(size, count > 0)
    # A selection and not a sort: linear in n, 4 ms for 1.6 million.
    threshold = np.partition(values, size - count)[size - count]
    kept: np.ndarray = values > threshold
    missing = count - int(np.count_nonzero(kept))
    kept[np.flatnonzero(values == threshold)[:missing]] = True
    return kept


def _refuse_count(count: int, size: int, what: str) -> None:
    if not 0 <= count <= size:
        raise ConfigError(f"{count} coordinates of {what} were to be kept; it must be 0 to {size}, what there is")
