"""Values of a round as plain bits that can be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedray.sums import Sums
from fedray.tree import Mask, Tree


def fingerprint(value: Any) -> Any:
    """Everything that a value of the round holds, as plain bits that can be compared; a probe has none."""
    if isinstance(value, Tree | Mask):
        return type(value).__name__, value.layout, value.flat.numpy().tobytes(), getattr(value, "seed", None)
    if isinstance(value, Sums):
        return {name: fingerprint(vars(total)) for name, total in value._totals.items()}
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()
    if isinstance(value, Tensor):
        return tuple(value.shape), value.detach().numpy().tobytes()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, [(f.name, fingerprint(getattr(value, f.name))) for f in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return [(name, fingerprint(item)) for name, item in value.items()]
    if isinstance(value, list | tuple):
        return [fingerprint(item) for item in value]
    if callable(value):
        return "callable"
    return repr(value)


def distance(a: Tree | Tensor, b: Tree | Tensor) -> float:
    """|a - b| / |b| over all coordinates, in float64."""
    a, b = (t.flat if isinstance(t, Tree) else t for t in (a, b))
    return float(torch.linalg.vector_norm(a.double() - b.double()) / torch.linalg.vector_norm(b.double()))


def kept(mask: Mask | None, like: Tree) -> Tensor:
    """bool (n,): what a mask keeps; all of it without one."""
    return torch.ones(like.layout.size, dtype=torch.bool) if mask is None else mask.flat


def nonzero_outside(tree: Tree, inside: Tensor) -> tuple[str, int] | None:
    """The first tensor with values other than +0.0 outside, and how many it has; None where there are none."""
    bad = (tree.flat.view(torch.int32) != 0) & ~inside
    for name, span in tree.layout.spans.items():
        count = int(bad[span].sum())
        if count:
            return name, count
    return None


def differs(a: Mask | None, b: Mask | None, like: Tree) -> tuple[str, int] | None:
    """The first tensor in which two masks differ, and in how many coordinates; None where they are equal."""
    apart = kept(a, like) ^ kept(b, like)
    for name, span in like.layout.spans.items():
        count = int(apart[span].sum())
        if count:
            return name, count
    return None
