"""The monoid of contributions: exact, so that no order, grouping or packing changes a bit.

A client contributes a value x, a weight w and the coordinates m that it vouches for. Contributions add per
coordinate: `total += w*m*x`, `weight += w*m`. A float sum depends on its order; this one does not: each float64
product is split on three fixed grids, multiples of 2^-20, 2^-53 and 2^-86, by adding and subtracting a rounding
constant, and each plane is summed in float64, where it stays exact while |w*x| < 2^31, no partial sum passes 2^33
and there are at most 2^20 contributions. Anything beyond, and anything not finite, is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedray.errors import NumericError
from fedray.tree import Layout, Mask, Tree

if TYPE_CHECKING:
    from fedray.round import Message, Part

MAX_TERM = 2.0**31
MAX_SUM = 2.0**33
MAX_COUNT = 2**20
# Adding 1.5 * 2^(52+e) to |p| < 2^(51+e) and subtracting it again rounds p to a multiple of 2^e.
GRIDS = (1.5 * 2.0 ** (52 - 20), 1.5 * 2.0 ** (52 - 53))
LAST_GRID = 1.5 * 2.0 ** (52 - 86)
BLOCK = 32_768  # elements; three float64 blocks stay in a core's second-level cache


def _add_products(planes: np.ndarray, values: np.ndarray, weight: float) -> None:
    """`planes += split(weight * values)`. planes: float64 (3, n), written; values: float32 or float64 (n,)."""
    size = min(BLOCK, max(values.shape[0], 1))
    product, rounded = np.empty(size), np.empty(size)
    for start in range(0, values.shape[0], BLOCK):
        block = values[start : start + BLOCK]
        p, r = product[: block.shape[0]], rounded[: block.shape[0]]
        stop = start + block.shape[0]
        np.copyto(p, block)  # first: float32 times a Python float would be rounded to float32
        np.multiply(p, weight, out=p)
        for plane, grid in zip(planes, GRIDS, strict=False):
            np.add(p, grid, out=r)
            np.subtract(r, grid, out=r)
            plane[start:stop] += r
            np.subtract(p, r, out=p)
        np.add(p, LAST_GRID, out=r)
        np.subtract(r, LAST_GRID, out=r)
        planes[2, start:stop] += r


def _split(value: float) -> np.ndarray:
    """The three planes of one number, shape (3,)."""
    planes = np.zeros((3, 1))
    _add_products(planes, np.array([value]), 1.0)
    return planes[:, 0]


@dataclass
class _Total:
    """The running sum of one part.

    planes: float64 (3, n). count: contributions so far. reach: the sum over contributions of the largest |w*x|,
            rounded up; no partial sum, in whatever order, was beyond it.
    weight: planes of the summed weight: (3,) while every contribution had the same support, else (3, n).
    support: that common support; None for all coordinates, and where `weight` is per coordinate.
    """

    layout: Layout
    planes: np.ndarray
    weight: np.ndarray
    support: Mask | None
    count: int
    reach: int

    def per_coordinate(self) -> np.ndarray:
        """The planes of the weight of each coordinate, shape (3, n)."""
        if self.weight.ndim == 2:
            return self.weight
        dense = np.repeat(self.weight[:, None], self.layout.size, axis=1)
        if self.support is not None:
            dense *= self.support.flat.numpy()
        return dense

    def same_support(self, other_support: Mask | None) -> bool:
        if self.weight.ndim == 2:
            return False
        mine = self.support
        if mine is None or other_support is None:
            return mine is other_support
        return mine is other_support or mine.digest == other_support.digest


class Sums:
    """Contributions, added per part and coordinate. `a.add(message)` and `a.merge(b)` write into `a` alone."""

    def __init__(self) -> None:
        self._totals: dict[str, _Total] = {}

    def add(self, message: Message, *, who: str = "a client") -> Sums:
        """Add one client's message. Raises NumericError that names `who`, the part and the tensor."""
        for name, part in message.parts.items():
            largest = _largest_fit(name, part, who)
            layout, support = part.value.layout, part.support
            total = self._totals.get(name)
            if total is None:
                total = _Total(layout, np.zeros((3, layout.size)), np.zeros(3), support, 0, 0)
                self._totals[name] = total
            weight = _split(part.weight)
            if not total.same_support(support):
                total.weight = total.per_coordinate()
                total.support = None
                weight = weight[:, None] * (1.0 if support is None else support.flat.numpy())
            total.weight = total.weight + weight
            total.count += 1
            total.reach += math.ceil(largest)
            _add_products(total.planes, part.value.flat.numpy(), part.weight)
        return self

    def merge(self, other: Sums) -> Sums:
        """Add another partial sum; the bits are those of adding its messages one by one."""
        for name, theirs in other._totals.items():
            mine = self._totals.get(name)
            if mine is None:
                self._totals[name] = _Total(
                    theirs.layout,
                    theirs.planes.copy(),
                    theirs.weight.copy(),
                    theirs.support,
                    theirs.count,
                    theirs.reach,
                )
                continue
            if theirs.weight.ndim == 1 and mine.same_support(theirs.support):
                mine.weight = mine.weight + theirs.weight
            else:
                mine.weight, mine.support = mine.per_coordinate() + theirs.per_coordinate(), None
            mine.planes += theirs.planes
            mine.count += theirs.count
            mine.reach += theirs.reach
        return self

    def __add__(self, other: Sums) -> Sums:
        return Sums().merge(self).merge(other)

    def __contains__(self, name: str) -> bool:
        return name in self._totals

    def count(self, name: str) -> int:
        """How many clients contributed this part."""
        return self._totals[name].count if name in self._totals else 0

    def support(self, name: str) -> Mask:
        """The coordinates for which somebody vouched."""
        total = self._totals[name]
        if total.weight.ndim == 1:
            return total.support if total.support is not None else Mask.full(total.layout)
        return Mask(total.layout, torch.from_numpy(total.weight.sum(axis=0) > 0))

    def mean(self, name: str, *, otherwise: Tree | float) -> Tree:
        """The weighted mean per coordinate, float32; `otherwise` where nobody vouched.

        Raises NumericError where a partial sum may have left the range in which it is exact.
        """
        total = self._totals[name]
        if total.count > MAX_COUNT:
            raise NumericError(f"{total.count} contributions of part {name!r}; sums are exact up to {MAX_COUNT}")
        if total.reach >= MAX_SUM:
            # Also where large values cancelled in the end: what was rounded on the way depends on the order.
            worst = int(np.abs(total.planes[0]).argmax())
            raise NumericError(
                f"the sum of part {name!r} may reach {total.reach:g}, most of all in tensor "
                f"{total.layout.locate(worst)!r}; sums are exact below 2^33. Lower trainer.lr, or weight clients "
                "uniformly"
            )
        weight = total.weight if total.weight.ndim == 2 else float(total.weight.sum())
        out = np.empty(total.layout.size, np.float32)
        for start in range(0, total.layout.size, BLOCK):
            here = slice(start, start + BLOCK)
            value = total.planes[0, here] + total.planes[1, here]
            value += total.planes[2, here]
            if isinstance(weight, float):
                value /= weight
            else:
                divisor = weight[0, here] + weight[1, here] + weight[2, here]
                np.divide(value, divisor, out=value, where=divisor > 0)
            out[here] = value
        mean = torch.from_numpy(out)
        if total.weight.ndim == 2 or total.support is not None:
            vouched = self.support(name).flat
            instead = otherwise.flat if isinstance(otherwise, Tree) else torch.tensor(otherwise, dtype=torch.float32)
            mean = torch.where(vouched, mean, instead)
        return Tree(total.layout, mean)


def _largest_fit(name: str, part: Part, who: str) -> float:
    """The largest |weight * value| of a part. Raises NumericError for what cannot be summed."""
    if not 0.0 < part.weight < MAX_TERM:
        raise NumericError(f"{who} sent part {name!r} with weight {part.weight}; a weight is above 0 and finite")
    flat = part.value.flat
    if flat.numel() == 0:
        return 0.0
    # One pass; both are NaN if anything is.
    low, high = torch.aminmax(flat)
    largest = max(-float(low), float(high)) * part.weight
    if largest < MAX_TERM:
        return largest
    bad = (~torch.isfinite(flat)).nonzero()
    at = int(bad[0]) if len(bad) else int(flat.abs().argmax())
    tensor = part.value.layout.locate(at)
    raise NumericError(
        f"{who} sent {float(flat[at])} in part {name!r}, tensor {tensor!r}, with weight {part.weight:g}; a value "
        f"must be finite and weight * |value| below 2^31. Lower trainer.lr or set trainer.clip_norm"
    )
