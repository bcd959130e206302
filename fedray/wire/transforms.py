"""How many real values become fewer: the largest, a random subset, those above a threshold, factors of low rank.

What the first three leave out decodes to zero, so they make sense of differences alone. What comes next time is
the business of error feedback, which keeps `values - decoded`.
"""

# A transform that needs neither the key nor what it made last time still takes both.
# ruff: noqa: ARG002

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from fedray.errors import NumericError
from fedray.keys import Key
from fedray.round import refuse
from fedray.tree import Layout, Tree, tensor_view
from fedray.wire.bits import decode_positions, encode_positions
from fedray.wire.values import Entropy, Where, expect
from fedray.wire.writers import ScaledSign

Scope = Literal["tensor", "global"]


# -- some of the values ----------------------------------------------------------------------------------------------


class _Sparse:
    """What the transforms share that send some of the values as they are."""

    lossy = True
    changes_only = True
    structured = False

    @property
    def unbiased_scale(self) -> bool:
        return False

    def decode(self, values: np.ndarray, side: bytes, where: Where, inner: Where) -> np.ndarray:
        """Each value at its place, +0.0 everywhere else."""
        assert inner.positions is not None
        # By way of the whole layout: a write and a read in order are faster than to search each position.
        full = np.zeros(where.layout.size, np.float32)
        full[inner.positions] = values
        return full if where.positions is None else full[where.positions]


@final
@dataclass(frozen=True, kw_only=True)
class TopK(_Sparse):
    """The values of the largest magnitude, with their positions; on a tie the lower index.

    Aji and Heafield 2017, "Sparse communication for distributed gradient descent" (gradient dropping: what is left
    out is kept for later, which is the work of error feedback); Stich et al. 2018, "Sparsified SGD with memory",
    definition 2.2 (top_k). Positions count the coordinates that the part has values for, not those of the model, and
    are coded by `bits.encode_positions`.

    fraction: of the values, above 0 to 1; k = round(fraction n), and at least one.
    level:    "tensor" takes k of each tensor of which there is anything; "global" takes k of all values together,
              which may leave a tensor without any.
    """

    fraction: float = 0.1
    level: Scope = "tensor"

    def __post_init__(self) -> None:
        _refuse_fraction(self.fraction)
        refuse(self.level not in ("tensor", "global"), "level", self.level, "choose tensor or global")

    @property
    def label(self) -> str:
        return f"topk:{self.fraction:g}{'/global' if self.level == 'global' else ''}"

    def encode(
        self, values: np.ndarray, where: Where, *, key: Key, warm: Tree | None, entropy: Entropy
    ) -> tuple[np.ndarray, Where, bytes, None]:
        """n values to k; side: their positions."""
        # The bits of magnitudes are in the order of the magnitudes, and integers are selected twice as fast.
        ranks = values.view(np.int32) & 0x7FFFFFFF
        bounds, counts = self._shares(where)
        spans = zip(bounds[:-1].tolist(), bounds[1:].tolist(), counts, strict=True)
        chosen = [start + _largest(ranks[start:stop], count) for start, stop, count in spans if count]
        kept = np.concatenate([np.empty(0, np.int64), *chosen])
        return values[kept], where.pick(kept), encode_positions(kept, where.size, entropy=entropy), None

    def place(self, side: bytes, where: Where) -> Where:
        positions = decode_positions(side, where.size)
        bounds, counts = self._shares(where)
        found = np.diff(np.searchsorted(positions, bounds)).tolist()
        expect(found == counts, f"positions as {self.label} are {len(positions)}; {sum(counts)} were expected")
        return where.pick(positions)

    def _shares(self, where: Where) -> tuple[np.ndarray, list[int]]:
        """Bounds of what is ranked together, as of `Where.bounds`, and how many of each are kept."""
        bounds = where.bounds("tensor") if self.level == "tensor" else np.array([0, where.size])
        return bounds, [_share(self.fraction, size) for size in np.diff(bounds).tolist()]


@final
@dataclass(frozen=True, kw_only=True)
class RandomK(_Sparse):
    """A random subset of the values, which costs eight bytes: the receiver draws it again.

    Stich et al. 2018, "Sparsified SGD with memory", definition 2.2 (rand_k); Konecny et al. 2016, "Federated learning:
    strategies for improving communication efficiency", section 3 (subsampling, which is scaled). All subsets of k of
    the n values together, whatever their tensors, are equally likely; each message draws anew.

    fraction: of the values, above 0 to 1; k = round(fraction n), and at least one.
    unbiased: whether what is sent is scaled by n / k, which makes it right on average, and useless to error feedback.
    """

    fraction: float = 0.1
    unbiased: bool = False

    def __post_init__(self) -> None:
        _refuse_fraction(self.fraction)

    @property
    def label(self) -> str:
        return f"randomk:{self.fraction:g}{'/unbiased' if self.unbiased else ''}"

    @property
    def unbiased_scale(self) -> bool:
        return self.unbiased

    def encode(
        self, values: np.ndarray, where: Where, *, key: Key, warm: Tree | None, entropy: Entropy
    ) -> tuple[np.ndarray, Where, bytes, None]:
        """n values to k; side: the eight bytes that the subset is drawn from."""
        side = key.digest[:8]
        kept = self._draw(side, where.size)
        sent = values[kept]
        inner = where.pick(kept)
        if self.unbiased:
            with np.errstate(over="ignore"):
                sent *= np.float32(where.size / max(1, len(kept)))
            _refuse_overflow(sent, inner, f"scaled by {where.size}/{len(kept)}; use unbiased=false")
        return sent, inner, side, None

    def place(self, side: bytes, where: Where) -> Where:
        expect(len(side) == 8, f"a random subset is drawn from 8 bytes; {len(side)} were sent")
        return where.pick(self._draw(side, where.size))

    def _draw(self, side: bytes, size: int) -> np.ndarray:
        """Ascending indices, int64 (k,)."""
        stream = Key(side).fold("subset").numpy()
        return np.sort(stream.choice(size, _share(self.fraction, size), replace=False, shuffle=False))


@final
@dataclass(frozen=True, kw_only=True)
class Threshold(_Sparse):
    """The values of a magnitude above a threshold, with their positions: as many as there are.

    Strom 2015, "Scalable distributed DNN training using commodity GPU cloud computing", which sends the threshold
    with a sign in place of each value. Deviation: values are sent as they are.

    value: what a magnitude must exceed, in float32.
    """

    value: float = 0.005

    def __post_init__(self) -> None:
        refuse(not 0 < self.value <= 1e38, "value", self.value, "it is a magnitude above 0, to 1e38; try 0.005")

    @property
    def label(self) -> str:
        return f"threshold:{self.value:g}"

    def encode(
        self, values: np.ndarray, where: Where, *, key: Key, warm: Tree | None, entropy: Entropy
    ) -> tuple[np.ndarray, Where, bytes, None]:
        """n values to fewer, perhaps to none; side: their positions."""
        kept = np.flatnonzero(np.abs(values) > np.float32(self.value))
        return values[kept], where.pick(kept), encode_positions(kept, where.size, entropy=entropy), None

    def place(self, side: bytes, where: Where) -> Where:
        return where.pick(decode_positions(side, where.size))


def stc(fraction: float = 0.01) -> tuple[TopK, ScaledSign]:
    """Sparse ternary compression: the largest values of each tensor become their mean magnitude with their signs.

    Sattler et al. 2019, "Robust and communication-efficient federated learning from non-i.i.d. data", algorithm 1.
    It is a chain of two stages; the paper adds error feedback in both directions and Golomb-coded positions.
    """
    return TopK(fraction=fraction, level="tensor"), ScaledSign(level="tensor")


def _refuse_fraction(fraction: float) -> None:
    refuse(not 0 < fraction <= 1, "fraction", fraction, "it is above 0 to 1; 0.1 sends 1 value in 10")


def _share(fraction: float, size: int) -> int:
    return max(1, round(fraction * size)) if size else 0


def _largest(ranks: np.ndarray, count: int) -> np.ndarray:
    """Ascending indices of the `count` largest, at least one, the lower index first on a tie."""
    last = np.partition(ranks, len(ranks) - count)[len(ranks) - count]
    chosen = np.flatnonzero(ranks >= last)
    surplus = len(chosen) - count
    return np.delete(chosen, np.flatnonzero(ranks[chosen] == last)[-surplus:]) if surplus else chosen


def _refuse_overflow(values: np.ndarray, where: Where, remedy: str) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        name = where.name_of(int(finite.argmin()))
        raise NumericError(f"a value of tensor {name!r} does not fit float32 {remedy} or lower trainer.lr")


# -- low rank --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """matrices: (n, m, r) by name, of what is sent as factors. inner: the layout of what is sent. start: of Q."""

    matrices: dict[str, tuple[int, int, int]]
    inner: Layout
    start: Layout


@lru_cache(maxsize=64)
def _plan(layout: Layout, rank: int, min_ratio: float) -> _Plan:
    matrices: dict[str, tuple[int, int, int]] = {}
    sent: dict[str, tuple[int, ...]] = {}
    for name, shape, size in zip(layout.names, layout.shapes, layout.sizes, strict=True):
        rows = shape[0] if len(shape) > 1 and size else 0
        columns = size // rows if rows else 0
        r = min(rank, rows, columns)
        if r and size >= min_ratio * r * (rows + columns):
            matrices[name] = rows, columns, r
            sent |= {f"{name}.p": (rows, r), f"{name}.q": (columns, r)}
        else:
            sent[name] = shape
    starts = {name: (columns, r) for name, (_, columns, r) in matrices.items()}
    return _Plan(matrices, *(Layout(tuple(shapes), tuple(shapes.values())) for shapes in (sent, starts)))


@final
@dataclass(frozen=True, kw_only=True)
class PowerSGD:
    """Two thin factors for each matrix: one step of subspace iteration from where the last message ended.

    Vogels et al. 2019, "PowerSGD", algorithm 1, for uploads that are decoded one by one: a tensor of two or more
    dimensions is viewed as M (n, m), its first dimension by the rest; P = orthonormal(M orthonormal(Q)), Q' = M^T P,
    decoded as P Q'^T, the projection of M onto the columns of P. r (n + m) values for n m. Deviations: the paper
    averages P over the workers between the two products, which takes two round trips, where here each sender has
    factors of its own and the receiver averages what they stand for; and Q is made orthonormal as well, so that
    a start of lower rank does not stay one. Exact to rounding where r = min(n, m).

    rank:      r, at most min(n, m) of a matrix.
    min_ratio: a matrix of n m < min_ratio r (n + m) is sent as it is, as are vectors.
    """

    rank: int = 2
    min_ratio: float = 2.0

    lossy = True
    changes_only = True
    unbiased_scale = False
    structured = True

    def __post_init__(self) -> None:
        refuse(self.rank < 1, "rank", self.rank, "it is a number of columns, at least 1; 2 is a good start")
        rule = "it is above 0: how many times smaller the factors must be for a matrix to be sent as factors"
        refuse(not 0 < self.min_ratio < float("inf"), "min_ratio", self.min_ratio, rule)

    @property
    def label(self) -> str:
        return f"powersgd:{self.rank}"

    def encode(
        self, values: np.ndarray, where: Where, *, key: Key, warm: Tree | None, entropy: Entropy
    ) -> tuple[np.ndarray, Where, bytes, Tree]:
        """side: empty. The new Where has tensors NAME.p (n, r) and NAME.q (m, r), or NAME for what is sent as it is.

        warm: NAME to Q (m, r); one of another layout counts as none. Raises NumericError where a factor overflows.
        """
        plan = self._plan(where)
        flat = tensor_view(values)
        if warm is not None and warm.layout != plan.start:
            warm = None
        sent, ends = [flat[:0]], [flat[:0]]
        for name, span in where.layout.spans.items():
            if name not in plan.matrices:
                sent.append(flat[span])
                continue
            rows, columns, r = plan.matrices[name]
            # A copy, which torch aligns: MKL promises the same bits for the same alignment only.
            matrix = flat[span].view(rows, columns).clone()
            drawn = torch.randn(columns, r, generator=key.fold(name).torch())
            # An end of zeros would stay one: those columns are drawn anew.
            start = drawn if warm is None else torch.where(warm[name].any(dim=0), warm[name], drawn)
            p = _orthonormal(matrix @ _orthonormal(start))
            q = matrix.T @ p
            sent += [p.reshape(-1), q.reshape(-1)]
            ends.append(q.reshape(-1))
        factors, inner = torch.cat(sent).numpy(), Where(plan.inner)
        _refuse_overflow(factors, inner, "as factors; leave out powersgd")
        return factors, inner, b"", Tree(plan.start, torch.cat(ends))

    def place(self, side: bytes, where: Where) -> Where:
        expect(not side, f"factors have no side information; {len(side)} bytes were sent")
        return Where(self._plan(where).inner)

    def decode(self, values: np.ndarray, side: bytes, where: Where, inner: Where) -> np.ndarray:
        """P Q^T for each pair of factors."""
        plan = self._plan(where)
        sent = Tree(plan.inner, tensor_view(values))
        full = torch.empty(where.size)
        for name, span in where.layout.spans.items():
            if name in plan.matrices:
                # Copies for their alignment, as above: both ends must decode the same bits.
                p, q = sent[f"{name}.p"].clone(), sent[f"{name}.q"].clone()
                full[span] = (p @ q.T).reshape(-1)
            else:
                full[span] = sent[name].reshape(-1)
        decoded: np.ndarray = full.numpy()
        return decoded

    def _plan(self, where: Where) -> _Plan:
        expect(where.positions is None, f"{self.label} needs whole tensors, and a mask cuts this part; use topk")
        return _plan(where.layout, self.rank, self.min_ratio)


def _orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis, (n, r), of a space that holds the columns of `matrix` (n, r), r <= n; never NaN for finite.

    Householder's reflections give r orthonormal columns whatever the rank, also for zeros.
    """
    basis: Tensor = torch.linalg.qr(matrix).Q
    return basis
