"""The values of a part on their way to bytes: which coordinates they stand for, and what a stage does to them.

A chain is made of three kinds of stages, in this order, none of them required:

    Transform*   real values to fewer real values and side information   (TopK, RandomK, Threshold, PowerSGD)
    Writer       real values to bytes                                    (Float32, Float16, Uniform, QSGD, Sign ...)
    Squeeze      bytes to fewer bytes                                    (Zstd)

Stages are stateless; what is random in them is drawn from a key. Both ends know the chain, the layout and the
coordinates that the values stand for, so none of it is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np

from fedray.errors import WireError
from fedray.keys import Key
from fedray.tree import Layout, Tree

Level = Literal["tensor", "channel"]
"""What shares a scale: a tensor, or one slice of a tensor along its first dimension (an output channel)."""

Entropy = Literal["none", "zstd", "ans"]
"""How masks and positions may be squeezed; each admits the ways of the ones before it. ans needs fedray[compress]."""


@dataclass(frozen=True)
class Where:
    """Which coordinates of a layout a vector of values stands for.

    positions: flat positions, ascending, int64 (n,); None for all of them.
    """

    layout: Layout
    positions: np.ndarray | None = None

    @property
    def size(self) -> int:
        """n, the number of values."""
        return self.layout.size if self.positions is None else len(self.positions)

    def bounds(self, level: Level) -> np.ndarray:
        """int64 (groups + 1,): group g is values[bounds[g]:bounds[g + 1]]; a group may be empty.

        Groups are those of the layout, whether or not anything of them is sent; a tensor of fewer than two
        dimensions is one group.
        """
        starts = _starts(self.layout, level)
        return starts if self.positions is None else np.searchsorted(self.positions, starts)

    @property
    def num_weights(self) -> int:
        """How many of the values lie in tensors of two or more dimensions."""
        if self.positions is None:
            return _num_weights(self.layout)
        counts = np.diff(self.bounds("tensor"))
        return sum(int(n) for n, shape in zip(counts, self.layout.shapes, strict=True) if len(shape) > 1)

    def pick(self, chosen: np.ndarray) -> Where:
        """The coordinates of values[chosen]; chosen: ascending indices, int64."""
        return Where(self.layout, chosen if self.positions is None else self.positions[chosen])

    def name_of(self, index: int) -> str:
        """The tensor of the value at `index`."""
        return self.layout.locate(index if self.positions is None else int(self.positions[index]))


@lru_cache(maxsize=64)
def _num_weights(layout: Layout) -> int:
    return sum(size for size, shape in zip(layout.sizes, layout.shapes, strict=True) if len(shape) > 1)


@lru_cache(maxsize=64)
def _starts(layout: Layout, level: Level) -> np.ndarray:
    starts: list[int] = []
    at = 0
    for shape, size in zip(layout.shapes, layout.sizes, strict=True):
        groups = shape[0] if level == "channel" and len(shape) > 1 and size else 1
        starts.extend(range(at, at + size, size // groups) if groups > 1 else [at])
        at += size
    bounds = np.array([*starts, at], np.int64)
    bounds.flags.writeable = False
    return bounds


class Stage(Protocol):
    """What the three kinds share.

    label:        how the ledger names it, as in "topk:0.1" or "int8".
    lossy:        whether decoding may give other values than were encoded.
    changes_only: whether it makes sense of differences alone: what it leaves out counts as "no change", so on absolute
                  weights it would destroy what it does not send.
    """

    @property
    def label(self) -> str: ...

    @property
    def lossy(self) -> bool: ...

    @property
    def changes_only(self) -> bool: ...


class Transform(Stage, Protocol):
    """Real values to fewer real values.

    unbiased_scale: whether kept values are scaled up to be right on average, which error feedback must not see.
    structured:   whether it needs whole tensors: refused under an unstructured mask.
    """

    @property
    def unbiased_scale(self) -> bool: ...

    @property
    def structured(self) -> bool: ...

    def encode(
        self, values: np.ndarray, where: Where, *, key: Key, warm: Tree | None, entropy: Entropy
    ) -> tuple[np.ndarray, Where, bytes, Tree | None]:
        """float32 (n,) to float32 (m,), where those lie, side information for the receiver, and what the sender
        starts from next time. warm: that of the sender's last message of this part, None in the first.

        Where a transform makes values that are no coordinates of the layout (factors), the new Where has a
        layout of its own. Never writes into `values`.
        """
        ...

    def place(self, side: bytes, where: Where) -> Where:
        """Where the fewer values lie, from the side information. Raises WireError where that cannot be; allocates
        nothing that where.size does not bound."""
        ...

    def decode(self, values: np.ndarray, side: bytes, where: Where, inner: Where) -> np.ndarray:
        """float32 (inner.size,) to float32 (where.size,)."""
        ...


class Writer(Stage, Protocol):
    """Real values to bytes. bits: nominal bits of one value."""

    @property
    def bits(self) -> float: ...

    def num_bytes(self, where: Where) -> int:
        """Exactly how many bytes `encode` gives."""
        ...

    def encode(self, values: np.ndarray, where: Where, *, key: Key) -> bytes | memoryview:
        """float32 (n,), all finite, to num_bytes(where) bytes. Raises NumericError for what it cannot hold."""
        ...

    def decode(self, data: memoryview, where: Where) -> np.ndarray:
        """num_bytes(where) bytes to float32 (n,); may be a read-only view of the data. Raises WireError."""
        ...


class Squeeze(Stage, Protocol):
    """Bytes to fewer bytes, without loss."""

    def encode(self, data: bytes | memoryview) -> bytes: ...

    def decode(self, data: memoryview, num_bytes: int) -> bytes:
        """Exactly num_bytes bytes. Raises WireError for anything else, before more than that is allocated."""
        ...


def expect(good: bool, sentence: str) -> None:
    """Raise WireError(sentence) unless `good`: for decoders, which trust nothing."""
    if not good:
        raise WireError(sentence)
