"""Search: the mask that learns most per second of a round, and masks to choose from at one budget.

A round that trains the coordinates K is taken to lower the loss by the sum of their importances, and to last

    T(K) = constant_s + sum over the prunable coordinates j of K of seconds[tensor of j]

(Jiang et al. 2022, PruneFL, section III). What is never pruned adds its importance, and its time to the constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch

from fedray.keys import Key
from fedray.prune.allocate import FLOAT_ERROR
from fedray.prune.regrow import drop
from fedray.tree import Layout, Mask, Tree

TRAIN_FACTOR = 3  # forward, gradient of the inputs, gradient of the weights: each about one forward pass
CONSTANT_SHARE = 0.14
"""Of the authors' FEMNIST model on a Raspberry Pi: 6.25 s beside 44.8 s for all prunable weights in a round."""


def seconds_of(
    layout: Layout,
    names: tuple[str, ...],
    flops: Mapping[str, float],
    examples: float,
    *,
    constant_s: float | None,
    transfer_s: float,
    computing_s: Mapping[str, float] | None,
    flops_per_second: float,
) -> tuple[float, dict[str, float]]:
    """The constant of a round, and the seconds of a kept weight of each named tensor.

    flops:       dense, forward, of one example by tensor; a tensor that is not named computes nothing.
    examples:    that a client trains on in a round.
    constant_s:  what no pruning saves; None for CONSTANT_SHARE of what all prunable weights cost.
    transfer_s:  of a kept weight on its way, both ways together; above 0.
    computing_s: of computing with a kept weight by tensor; a tensor that is not named takes none. None for
                 TRAIN_FACTOR * FLOPs of an example * examples / flops_per_second / size of the tensor.
    """
    sizes = {name: math.prod(layout.shape(name)) for name in names}
    if computing_s is None:
        each = TRAIN_FACTOR * examples / flops_per_second
        computing_s = {name: each * flops[name] / size for name, size in sizes.items() if name in flops}
    seconds = {name: transfer_s + (computing_s[name] if name in computing_s else 0.0) for name in names}
    dense = sum(seconds[name] * size for name, size in sizes.items())
    return CONSTANT_SHARE * dense if constant_s is None else constant_s, seconds


def fastest(
    importance: Tree,
    kept: Mask,
    seconds: Mapping[str, float],
    constant_s: float,
    *,
    most: int | None = None,
) -> Mask:
    """Add to `kept` the coordinates that make importance per second the largest that it can be.

    importance: 0 or more. seconds: of a coordinate by tensor, above 0; these are the tensors that may be cut. most: how
    many of theirs may be kept in the end, where `kept` has not more already; None for no bound. Ties go to the lower
    flat index.

    They are added by falling importance per second while theirs is above that of all so far, which is optimal for the
    ratio of two sums (the paper's algorithm 1, theorem 1).
    """
    score, held = importance.flat.double().numpy(), kept.flat.numpy()
    cost = np.zeros(len(held))
    for name in seconds:
        cost[importance.layout.spans[name]] = seconds[name]
    outside = np.flatnonzero(~held)
    rate = score[outside] / cost[outside]
    order = np.argsort(-rate, kind="stable")
    outside = outside[order]
    gain = np.cumsum(np.concatenate(([score[held].sum()], score[outside])))[:-1]
    time = np.cumsum(np.concatenate(([constant_s + cost[held].sum()], cost[outside])))[:-1]
    # Compared as products, because nothing may be kept yet and take no time.
    slower = score[outside] * time <= gain * cost[outside]
    count = int(slower.argmax()) if slower.any() else len(outside)
    if most is not None:
        count = min(count, max(most - sum(kept.counts(seconds).values()), 0))
    found = held.copy()
    found[outside[:count]] = True
    return Mask(kept.layout, torch.from_numpy(found))


def reconfigure(
    params: Tree,
    importance: Tree,
    mask: Mask,
    seconds: Mapping[str, float],
    constant_s: float,
    *,
    removal: float,
    most: int | None = None,
) -> Mask:
    """Take the floor(removal * kept) smallest magnitudes of each tensor out, and put in what is `fastest`.

    seconds: of a coordinate by tensor; these are the tensors that may be cut. removal: in [0, 1].
    What was just taken out may return, and then was never away; what was out before may come in.
    """
    names = tuple(seconds)
    fewer = {n: count - math.floor(removal * count + FLOAT_ERROR) for n, count in mask.counts(names).items()}
    return fastest(importance, drop(params, mask, fewer, names=names), seconds, constant_s, most=most)


def has_settled(sizes: Sequence[int], *, tolerance: float, patience: int) -> bool:
    """Whether each of the last `patience` sizes differs from the one before it by at most that fraction of it."""
    recent = sizes[-patience - 1 :]
    return len(recent) > patience and all(abs(b - a) <= tolerance * a for a, b in pairwise(recent))


def noisy_counts(layout: Layout, counts: Mapping[str, int], noise: float, key: Key) -> dict[str, int]:
    """Other counts by tensor with the same sum: each is multiplied by 1 + noise * u, u uniform in [-1, 1), and all by
    what makes the sum right; none is above its size.

    What flooring leaves over goes to the largest remainders, the earlier tensor first on a tie. noise: in [0, 1).
    """
    sizes = {name: math.prod(layout.shape(name)) for name in counts}
    draws = key.numpy().uniform(-1.0, 1.0, len(counts))
    parts = {name: count * (1.0 + noise * draw) for (name, count), draw in zip(counts.items(), draws, strict=True)}
    whole: set[str] = set()
    while True:
        rest = sum(counts.values()) - sum(sizes[name] for name in whole)
        among = sum(part for name, part in parts.items() if name not in whole)
        scale = rest / among if among else 0.0
        over = {name for name, part in parts.items() if name not in whole and part * scale > sizes[name]}
        if not over:
            break
        whole |= over
    exact = {name: float(sizes[name]) if name in whole else part * scale for name, part in parts.items()}
    kept = {name: math.floor(part + FLOAT_ERROR) for name, part in exact.items()}
    free = [name for name in exact if kept[name] < sizes[name]]
    for name in sorted(free, key=lambda name: kept[name] - exact[name])[: sum(counts.values()) - sum(kept.values())]:
        kept[name] += 1
    return kept
