"""The monoid of contributions: exact, so that no order, grouping or packing changes a bit.

A client contributes a value x, a weight w and the coordinates m that it vouches for. Contributions add per
coordinate: `total += w*m*x`, `weight += w*m`. A float sum depends on its order; this one does not: each float64
product is split on three fixed grids, multiples of 2^-20, 2^-53 and 2^-86, by adding and subtracting a rounding
constant, and each plane is summed in float64, where it stays exact while |w*x| < 2^31, no partial sum passes 2^33
and there are at most 2^20 contributions. Anything beyond, and anything not finite, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

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


def _add_products(total: _Planes, terms: Sequence[tuple[np.ndarray, float]]) -> None:
    """Add split(weight * values) for every term (values, weight), block by block; values float (n,).

    The planes are large: each of their blocks is fetched once for all terms.
    """
    length = total.first.shape[0]
    product, rounded = np.empty(min(BLOCK, length)), np.empty(min(BLOCK, length))
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        p, r = product[: stop - start], rounded[: stop - start]
        first, second = total.first[start:stop], total.second[start:stop]
        for values, weight in terms:
            np.copyto(p, values[start:stop])  # first: float32 times a Python float would be rounded to float32
            if weight != 1.0:
                np.multiply(p, weight, out=p)
            for plane, grid in ((first, GRIDS[0]), (second, GRIDS[1])):
                np.add(p, grid, out=r)
                np.subtract(r, grid, out=r)
                np.add(plane, r, out=plane)
                np.subtract(p, r, out=p)
            # Weights of everyday size leave nothing below 2^-53: then every bit of what is left is zero.
            if np.bitwise_or.reduce(p.view(np.int64)):
                np.add(p, LAST_GRID, out=r)
                np.subtract(r, LAST_GRID, out=r)
                third = total.third_plane()[start:stop]
                np.add(third, r, out=third)


@dataclass
class _Planes:
    """A sum on three grids, float64 (n,) each; the third is None while it is zero."""

    first: np.ndarray
    second: np.ndarray
    third: np.ndarray | None = None

    @classmethod
    def zeros(cls, length: int) -> _Planes:
        return cls(np.zeros(length), np.zeros(length))

    def third_plane(self) -> np.ndarray:
        if self.third is None:
            self.third = np.zeros(self.first.shape[0])
        return self.third

    def copy(self) -> _Planes:
        return _Planes(self.first.copy(), self.second.copy(), None if self.third is None else self.third.copy())

    def __add__(self, other: _Planes) -> _Planes:
        third = self.third if other.third is None else other.third if self.third is None else self.third + other.third
        return _Planes(self.first + other.first, self.second + other.second, third)

    def scatter(self, length: int, where: Any) -> _Planes:
        """The same sum among zeros."""

        def spread(plane: np.ndarray) -> np.ndarray:
            wide = np.zeros(length)
            wide[where] = plane
            return wide

        return _Planes(spread(self.first), spread(self.second), None if self.third is None else spread(self.third))


@lru_cache(maxsize=4096)  # clients have few distinct weights, and have them every round
def _split(value: float) -> np.ndarray:
    """The three planes of one number and a count of one, shape (4,)."""
    planes = _Planes.zeros(1)
    _add_products(planes, [(np.array([value]), 1.0)])
    return np.array([planes.first[0], planes.second[0], planes.third_plane()[0], 1.0])


@dataclass
class _Total:
    """The running sum of one part.

    support: the mask that every contribution so far had, None for all coordinates. While they agree, only its k kept
             coordinates are summed; `common` is False from the first that differs on, and everything is dense.
    planes:  of k coordinates while common, else of n. owned: whether they may be written to.
    weight:  planes of the summed weight, and the number of those who vouched: (4,) while common, else (4, n).
    count:   contributions so far. reach: the sum over contributions of the largest |w*x|, rounded up; no partial sum,
             in whatever order, was beyond it.
    """

    layout: Layout
    support: Mask | None
    planes: _Planes
    weight: np.ndarray
    count: int = 0
    reach: int = 0
    common: bool = True
    owned: bool = True

    @classmethod
    def empty(cls, layout: Layout, support: Mask | None) -> _Total:
        size = layout.size if support is None else len(support.indices)
        return cls(layout, support, _Planes.zeros(size), np.zeros(4))

    def fits(self, support: Mask | None) -> bool:
        """Whether a contribution with this support can be added as things are."""
        if not self.common or self.support is None or support is None:
            return self.common and self.support is support
        return self.support is support or self.support.digest == support.digest

    def spread(self) -> _Total:
        """The same sum with every coordinate written out."""
        if not self.common:
            return self
        weight = np.zeros((4, self.layout.size))
        where: Any = slice(None) if self.support is None else self.support.indices.numpy()
        planes = self.planes.scatter(self.layout.size, where)
        weight[:, where] = self.weight[:, None]
        return _Total(self.layout, None, planes, weight, self.count, self.reach, common=False)

    def plus(self, planes: _Planes, weight: np.ndarray, count: int, reach: int) -> None:
        """Add planes and weights of the same shapes."""
        if self.owned and planes.third is None:
            self.planes.first += planes.first
            self.planes.second += planes.second
        else:
            self.planes, self.owned = self.planes + planes, True
        self.weight = self.weight + weight
        self.count += count
        self.reach += reach


class Sums:
    """Contributions, added per part and coordinate. `a.add(message)` and `a.merge(b)` write into `a` alone."""

    def __init__(self) -> None:
        self._totals: dict[str, _Total] = {}

    def add(self, message: Message, *, who: str = "a client") -> Sums:
        """Add one client's message. Raises NumericError that names `who`, the part and the tensor."""
        return self.add_all([(message, largest_fit(message, who))])

    def add_all(self, messages: Sequence[tuple[Message, Mapping[str, float]]]) -> Sums:
        """Add messages of several clients, each with its `largest_fit`; faster than one by one, to the same bits."""
        terms: dict[str, list[tuple[np.ndarray, float]]] = {}
        for message, largest in messages:
            for name, part in message.parts.items():
                total = self._totals.get(name)
                if total is None or not total.fits(part.support):
                    if total is not None:
                        _add_products(total.planes, terms.pop(name, []))
                    total = _Total.empty(part.value.layout, part.support) if total is None else total.spread()
                if not total.owned:
                    total = replace(total, planes=total.planes.copy(), owned=True)
                self._totals[name] = total
                weight, values = _split(part.weight), part.value.flat
                if not total.common:
                    weight = weight[:, None] * (1.0 if part.support is None else part.support.flat.numpy())
                elif part.support is not None:
                    values = values[part.support.indices]
                total.weight = total.weight + weight
                total.count += 1
                total.reach += math.ceil(largest[name])
                terms.setdefault(name, []).append((values.numpy(), part.weight))
        for name, waiting in terms.items():
            _add_products(self._totals[name].planes, waiting)
        return self

    def merge(self, other: Sums) -> Sums:
        """Add another partial sum; the bits are those of adding its messages one by one."""
        for name, theirs in other._totals.items():
            mine = self._totals.get(name)
            if mine is None:
                # Nothing is copied until something has to be added to it.
                self._totals[name] = replace(theirs, owned=False)
                continue
            if not (theirs.common and mine.fits(theirs.support)):
                mine, theirs = mine.spread(), theirs.spread()
                self._totals[name] = mine
            mine.plus(theirs.planes, theirs.weight, theirs.count, theirs.reach)
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
        if total.common:
            return total.support if total.support is not None else Mask.full(total.layout)
        return Mask(total.layout, torch.from_numpy(total.weight[3] > 0))

    def weight(self, name: str) -> torch.Tensor:
        """The summed weight of those who vouched, by coordinate, float32 (n,)."""
        total = self._totals[name]
        if not total.common:
            return torch.from_numpy(total.weight[:3].sum(axis=0)).float()
        weight = torch.full((total.layout.size,), float(total.weight[:3].sum()))
        return weight if total.support is None else torch.where(total.support.flat, weight, 0.0)

    def agree(self, name: str) -> bool:
        """Whether all who contributed vouched for the same coordinates."""
        return self._totals[name].common

    def holders(self, name: str) -> torch.Tensor:
        """How many clients vouched, by coordinate, int32 (n,)."""
        total = self._totals[name]
        if not total.common:
            return torch.from_numpy(total.weight[3].astype(np.int32))
        count = torch.full((total.layout.size,), total.count, dtype=torch.int32)
        return count if total.support is None else torch.where(total.support.flat, count, 0)

    def mean(self, name: str, *, otherwise: Tree | float) -> Tree:
        """The weighted mean per coordinate, float32; `otherwise` where nobody vouched.

        Raises NumericError where a partial sum may have left the range in which it is exact.
        """
        total = self._totals[name]
        if total.count > MAX_COUNT:
            raise NumericError(f"{total.count} contributions of part {name!r}; sums are exact up to {MAX_COUNT}")
        if total.reach >= MAX_SUM:
            # Also where large values cancelled in the end: what was rounded on the way depends on the order.
            worst = int(np.abs(total.spread().planes.first).argmax())
            raise NumericError(
                f"the sum of part {name!r} may reach {total.reach:g}, most of all in tensor "
                f"{total.layout.locate(worst)!r}; sums are exact below 2^33. Lower trainer.lr, or weight clients "
                "uniformly"
            )
        mean = torch.from_numpy(_divide(total.planes, total.weight))
        if total.common and total.support is None:
            return Tree(total.layout, mean)
        if isinstance(otherwise, Tree):
            flat = otherwise.flat.clone()
        else:
            flat = torch.full((total.layout.size,), otherwise, dtype=torch.float32)
        if total.common:
            assert total.support is not None
            flat.index_copy_(0, total.support.indices, mean)
        else:
            flat = torch.where(torch.from_numpy(total.weight[3] > 0), mean, flat)
        return Tree(total.layout, flat)


def _divide(planes: _Planes, weight: np.ndarray) -> np.ndarray:
    """The sum over its weight, float32 (m,). weight: (4,) or (4, m), where 0 leaves what it finds."""
    length = planes.first.shape[0]
    out = np.empty(length, np.float32)
    one = float(weight[:3].sum()) if weight.ndim == 1 else 0.0
    for start in range(0, length, BLOCK):
        here = slice(start, start + BLOCK)
        value = planes.first[here] + planes.second[here]
        if planes.third is not None:
            value += planes.third[here]
        if weight.ndim == 1:
            value /= one
        else:
            divisor = weight[0, here] + weight[1, here] + weight[2, here]
            np.divide(value, divisor, out=value, where=divisor > 0)
        out[here] = value
    return out


def largest_fit(message: Message, who: str) -> dict[str, float]:
    """The largest |weight * value| of each part, best found while the values are in the processor's cache.

    Raises NumericError, naming `who`, the part and the tensor, for what cannot be summed.
    """
    return {name: _largest_fit(name, part, who) for name, part in message.parts.items()}


def _largest_fit(name: str, part: Part, who: str) -> float:
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
