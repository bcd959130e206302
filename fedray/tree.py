"""The algebra of named tensors and masks: one flat buffer each, with named views.

A `Layout` says which names lie where. A `Tree` is a flat float tensor under a layout, a `Mask` a flat bool
tensor under the same layout. Both are values: no function here writes into its arguments, and nobody else
may write into the `flat` of a tree that was handed out.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

Seed = tuple[bytes, tuple[int, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Layout:
    """Where each named tensor lies in a flat buffer.

    names:  the order of the tensors in the buffer, which is also their order on the wire.
    shapes: one per name.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.shapes) or len(set(self.names)) != len(self.names):
            raise ValueError("a layout needs one shape for each name, and no name twice")

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """The layout of a mapping from name to tensor, in the mapping's order."""
        return cls(tuple(tensors), tuple(tuple(t.shape) for t in tensors.values()))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def spans(self) -> dict[str, slice]:
        """Name to the slice of the flat buffer that it occupies."""
        spans, start = {}, 0
        for name, size in zip(self.names, self.sizes, strict=True):
            spans[name] = slice(start, start + size)
            start += size
        return spans

    @cached_property
    def size(self) -> int:
        """Number of elements of the flat buffer."""
        return sum(self.sizes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[self.names.index(name)]

    def locate(self, index: int) -> str:
        """The name of the tensor that holds flat position `index`."""
        for name, span in self.spans.items():
            if span.start <= index < span.stop:
                return name
        raise IndexError(f"position {index} is outside a layout of {self.size} elements")

    def select(self, names: Iterable[str]) -> Layout:
        """The layout of these names alone, in this layout's order."""
        wanted = set(names)
        kept = [(n, s) for n, s in zip(self.names, self.shapes, strict=True) if n in wanted]
        return Layout(tuple(n for n, _ in kept), tuple(s for _, s in kept))


class _Flat:
    """What trees and masks share: a layout, a flat tensor and its named views."""

    __slots__ = ("flat", "layout")

    def __init__(self, layout: Layout, flat: Tensor) -> None:
        if flat.shape != (layout.size,):
            raise ValueError(f"a flat tensor of shape {tuple(flat.shape)} does not fit a layout of {layout.size}")
        self.layout = layout
        self.flat = flat

    def __getitem__(self, name: str) -> Tensor:
        return self.flat[self.layout.spans[name]].view(self.layout.shape(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.names)

    def __len__(self) -> int:
        return len(self.layout.names)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs of name and view, in the layout's order."""
        for name, shape in zip(self.layout.names, self.layout.shapes, strict=True):
            yield name, self.flat[self.layout.spans[name]].view(shape)


class Tree(_Flat):
    """Named float tensors in one flat buffer, shape (layout.size,)."""

    __slots__ = ()

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tree:
        """Copy named tensors into one buffer, in the mapping's order."""
        layout = Layout.of(tensors)
        flat = torch.empty(layout.size, dtype=dtype)
        for name, tensor in tensors.items():
            flat[layout.spans[name]] = tensor.detach().reshape(-1).to(dtype)
        return cls(layout, flat)

    @classmethod
    def zeros(cls, layout: Layout) -> Tree:
        return cls(layout, torch.zeros(layout.size))

    def __reduce__(self) -> tuple[object, ...]:
        return _tree_from_numpy, (self.layout, self.flat.detach().cpu().numpy())


class Mask(_Flat):
    """Which coordinates are kept: named bool tensors in one flat buffer, shape (layout.size,).

    A mask covers the whole layout; names that are not prunable are all True.

    seed: how to draw this mask again, if it was drawn: (digest of the key, counts by name, names). It is what a
    random mask costs on the wire, and plays no part in equality.
    """

    __slots__ = ("_digest", "_indices", "seed")

    def __init__(self, layout: Layout, flat: Tensor, seed: Seed | None = None) -> None:
        super().__init__(layout, flat)
        if flat.dtype != torch.bool:
            raise ValueError(f"a mask is made of booleans, not of {flat.dtype}")
        self.seed = seed
        self._digest: bytes | None = None
        self._indices: Tensor | None = None

    @classmethod
    def full(cls, layout: Layout) -> Mask:
        """The mask that keeps everything."""
        return cls(layout, torch.ones(layout.size, dtype=torch.bool))

    @classmethod
    def of(cls, layout: Layout, kept: Mapping[str, Tensor]) -> Mask:
        """A mask from bool tensors by name; a missing name means that all of it is kept."""
        flat = torch.ones(layout.size, dtype=torch.bool)
        for name, tensor in kept.items():
            flat[layout.spans[name]] = tensor.reshape(-1)
        return cls(layout, flat)

    @property
    def digest(self) -> bytes:
        """16 bytes that name this mask; equal masks have equal digests."""
        if self._digest is None:
            bits = np.packbits(self.flat.cpu().numpy())
            self._digest = hashlib.blake2b(bits.tobytes(), digest_size=16).digest()
        return self._digest

    @property
    def indices(self) -> Tensor:
        """Flat positions of what is kept, ascending, int64; found once, because a mask serves many messages."""
        if self._indices is None:
            # NumPy takes a third of torch's time for it.
            self._indices = torch.from_numpy(np.flatnonzero(self.flat.cpu().numpy()))
        return self._indices

    def counts(self, names: Iterable[str] | None = None) -> dict[str, int]:
        """Kept coordinates by name."""
        chosen = self.layout.names if names is None else names
        return {name: int(self.flat[self.layout.spans[name]].count_nonzero()) for name in chosen}

    def sparsity(self, names: Iterable[str] | None = None) -> float:
        """Fraction removed over these names (over everything by default); 0.0 where there is nothing."""
        chosen = self.layout.names if names is None else tuple(names)
        total = sum(self.layout.spans[n].stop - self.layout.spans[n].start for n in chosen)
        return 1.0 - sum(self.counts(chosen).values()) / total if total else 0.0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.layout == other.layout and torch.equal(self.flat, other.flat)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __and__(self, other: Mask) -> Mask:
        return Mask(self.layout, self.flat & other.flat)

    def __or__(self, other: Mask) -> Mask:
        return Mask(self.layout, self.flat | other.flat)

    def __invert__(self) -> Mask:
        return Mask(self.layout, ~self.flat)

    def __reduce__(self) -> tuple[object, ...]:
        return _mask_from_bits, (self.layout, np.packbits(self.flat.cpu().numpy()), self.seed)


def _tree_from_numpy(layout: Layout, array: np.ndarray) -> Tree:
    return Tree(layout, tensor_view(array))


def _mask_from_bits(layout: Layout, bits: np.ndarray, seed: Seed | None) -> Mask:
    return Mask(layout, torch.from_numpy(np.unpackbits(bits, count=layout.size).view(np.bool_)), seed)


with warnings.catch_warnings():
    # PyTorch has no read-only tensors and says so, once in a process; trees are values, so nobody writes into them.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    torch.from_numpy(np.frombuffer(b"once", np.uint8))


def tensor_view(array: np.ndarray) -> Tensor:
    """A tensor over the memory of `array`, which may be a read-only view into the object store."""
    return torch.from_numpy(array)


def add(a: Tree, b: Tree, scale: float = 1.0) -> Tree:
    """`a + scale * b`."""
    return Tree(a.layout, torch.add(a.flat, b.flat, alpha=scale))


def sub(a: Tree, b: Tree) -> Tree:
    """`a - b`."""
    return Tree(a.layout, a.flat - b.flat)


def scale(a: Tree, factor: float) -> Tree:
    """`factor * a`."""
    return Tree(a.layout, a.flat * factor)


def norm(a: Tree) -> float:
    """The Euclidean norm over all coordinates."""
    return float(torch.linalg.vector_norm(a.flat.double()))


def restrict(a: Tree, mask: Mask | None) -> Tree:
    """`a` with zeros outside the mask; `a` itself without one. Zeros are +0.0, also for -x and NaN outside."""
    if mask is None:
        return a
    return Tree(a.layout, torch.where(mask.flat, a.flat, a.flat.new_zeros(())))


def take(a: Tree, names: Iterable[str]) -> Tree:
    """The tensors of these names, in the order of `a`; `a` itself where that is all of them."""
    layout = a.layout.select(names)
    if layout == a.layout:
        return a
    pieces = [a.flat[a.layout.spans[name]] for name in layout.names]
    return Tree(layout, torch.cat(pieces) if pieces else a.flat.new_zeros(0))


def put(a: Tree, b: Tree) -> Tree:
    """`a` with the tensors that `b` has, which are all in `a`, in the place of its own."""
    if a.layout == b.layout:
        return b
    if not b.layout.names:
        return a
    flat = a.flat.clone()
    for name in b.layout.names:
        flat[a.layout.spans[name]] = b.flat[b.layout.spans[name]]
    return Tree(a.layout, flat)


def equal(a: Tree, b: Tree) -> bool:
    """Whether layout and every bit pattern agree (so NaN equals NaN, and 0.0 differs from -0.0)."""
    return a.layout == b.layout and torch.equal(a.flat.view(torch.int32), b.flat.view(torch.int32))
