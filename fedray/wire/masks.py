"""Masks to bytes, in the cheapest of several ways; only prunable coordinates are coded, the others are kept.

Bytes for n prunable coordinates in m prunable tensors of shapes (d0, d1, ...):

    none, known           0; the code alone says that nothing is masked or that the receiver has the mask
    bitmap ... bitmap_zstd  as in `bits`, of the kept coordinates
    seed                  16 + 4 m, the key and the counts that drew a random mask
    difference            4 + two sets of positions: the dropped among those that the last mask kept, and the grown
                          among the others; of a density d of which a share a changed, about
                          (d n H2(a) + (1 - d) n H2(a d / (1 - d))) / 8
    structured            ceil(sum(d0 + d1) / 8), d0 alone for one dimension: where each tensor keeps all of the
                          outer product of some indices of dimension 0 and some of dimension 1
    tensors               4 (m - 1) + one set of positions a tensor, where the densities of tensors differ
    complement            0; what the last mask cuts, as the support of a part

The support of a part may leave out what is not prunable; then all coordinates are coded, which the code says in its
highest bit.

A set of positions is one byte for its way and the way's body; all sets but the last have their length in front.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import torch

from fedray.keys import Key
from fedray.prune.select import random_mask
from fedray.tree import Layout, Mask
from fedray.wire import bits
from fedray.wire.values import Entropy, expect

CODER_NAMES = ("none", "known", *bits.WAYS, "seed", "difference", "structured", "tensors", "complement")
"""What the mask's one-byte code says: nothing is masked, the receiver knows it, or how it is written."""
NONE, KNOWN, BITMAP, LIST, RICE, GAPS, ANS, BITMAP_ZSTD, SEED, DIFFERENCE, STRUCTURED, TENSORS, COMPLEMENT = range(
    len(CODER_NAMES)
)
EVERYTHING = 0x80  # added to the code of a support that leaves out what is not prunable
REMEMBERED = 64  # encodings: a global mask goes to many clients, who hold few different ones
HALF = (0.45, 0.55)  # shares between which nothing beats the bitmap of a random mask
SET_BYTES = 8  # what a set of positions costs beside its entropy: its length, its way and the head of its body


class MaskCoder:
    """Codes masks of one layout of which only `prunable` names may be cut.

    entropy: which ways of `bits` are admitted. Raises ConfigError for ans without its package.
    """

    def __init__(self, layout: Layout, prunable: tuple[str, ...], entropy: Entropy = "zstd") -> None:
        bits.check_entropy(entropy)
        self.layout = layout
        self.prunable = prunable
        self.entropy = entropy
        self.shapes = [layout.shape(name) for name in prunable]
        ends = list(accumulate((math.prod(shape) for shape in self.shapes), initial=0))
        self.spans = [slice(*span) for span in pairwise(ends)]  # among the prunable coordinates, one after another
        self.size = ends[-1]
        self._coded: dict[object, tuple[int, bytes]] = {}
        self._last_ranked: tuple[bytes, np.ndarray, np.ndarray] | None = None
        self._last_split: tuple[bytes, np.ndarray, np.ndarray, np.ndarray] | None = None

    def encode(self, mask: Mask, known: Mask | None) -> tuple[int, bytes]:
        """The code and the bytes of the cheapest way, ties to the lower code; known: the mask that the receiver has.

        Ways whose entropy is above another's size are not tried. Raises ValueError for a mask that cuts what is not
        prunable.
        """
        if known is not None and (mask is known or mask.digest == known.digest):
            return KNOWN, b""
        asked = (mask.digest, mask.seed, None if known is None else known.digest)
        if asked not in self._coded:
            coded = self._cheapest(mask, known)
            if len(self._coded) >= REMEMBERED:
                del self._coded[next(iter(self._coded))]
            self._coded[asked] = coded
        return self._coded[asked]

    def encode_support(self, support: Mask, known: Mask | None) -> tuple[int, bytes]:
        """As `encode`, for the coordinates of a part, which may be any; known: the message's mask."""
        if known is not None and torch.equal(support.flat, ~known.flat):
            return COMPLEMENT, b""
        if not self._cut_beyond(support):
            return self.encode(support, known)
        code, data = self._everything.encode(support, known)
        return EVERYTHING | code, data

    def decode_support(self, code: int, data: bytes, known: Mask | None) -> Mask | None:
        """The support that was encoded. Raises WireError for anything that cannot be."""
        if code == COMPLEMENT and known is not None:
            expect(not data, f"a support coded as complement has {len(data)} bytes; none were expected")
            return ~known
        if code & EVERYTHING:
            return self._everything.decode(code & ~EVERYTHING, data, known)
        return self.decode(code, data, known)

    @cached_property
    def _everything(self) -> MaskCoder:
        return MaskCoder(self.layout, self.layout.names, self.entropy)

    def decode(self, code: int, data: bytes, known: Mask | None) -> Mask | None:
        """The mask that was encoded; known: the receiver's. Raises WireError for anything that cannot be."""
        expect(code < len(CODER_NAMES), f"a payload names mask coder {code}; there are {len(CODER_NAMES)}")
        expect(
            known is not None or code not in (KNOWN, DIFFERENCE, COMPLEMENT),
            "a payload refers to a mask that the receiver does not know",
        )
        expect(code != COMPLEMENT, "a payload says that a mask is a complement; only the support of a part may be one")
        if code in (NONE, KNOWN):
            expect(not data, f"a mask coded as {CODER_NAMES[code]} has {len(data)} bytes; none were expected")
            return known if code == KNOWN else None
        if code == SEED:
            return self._decode_seed(data)
        if code == STRUCTURED:
            return self._scatter(self._decode_structured(data))
        if code == DIFFERENCE and known is not None:
            return self._scatter(self._decode_difference(data, *self._split(known)))
        if code == BITMAP:
            return self._scatter(bits.unpack_bits(data, self.size, "a bitmap"))
        kept = np.zeros(self.size, np.bool_)
        if code == TENSORS:
            sizes = [span.stop - span.start for span in self.spans]
            for span, positions in zip(self.spans, _decode_sets(data, sizes), strict=True):
                kept[span][positions] = True
        else:
            kept[bits.decode_as(CODER_NAMES[code], data, self.size)] = True
        return self._scatter(kept)

    def _cheapest(self, mask: Mask, known: Mask | None) -> tuple[int, bytes]:
        kept = self._gather(mask)
        ways: list[tuple[int, bytes]] = []
        if mask.seed is not None and mask.seed[2] == self.prunable:
            key, counts, _ = mask.seed
            ways.append((SEED, key + struct.pack(f"<{len(counts)}I", *counts)))
        structured = self._encode_structured(kept)
        if structured is not None:
            ways.append((STRUCTURED, structured))

        def worth(least: float) -> bool:
            return all(least <= len(data) for _, data in ways)

        # Counting is cheap, and looking for positions is not: only what may win is made.
        count = int(np.count_nonzero(kept))
        whole = bits.entropy_bytes(count, self.size)
        if known is not None:
            held, ranks = self._ranked(known)
            num_held, both = int(np.count_nonzero(held)), int(np.count_nonzero(kept & held))
            least = bits.entropy_bytes(num_held - both, num_held)
            least += bits.entropy_bytes(count - both, self.size - num_held)
            if worth(least) and least + 2 * SET_BYTES < whole:  # or else the masks have little in common
                dropped, grown = np.flatnonzero(held & ~kept), np.flatnonzero(kept & ~held)
                sets = [(ranks[dropped] - 1, num_held), (grown - ranks[grown], self.size - num_held)]
                ways.append((DIFFERENCE, self._encode_sets(sets)))
        if worth(whole):
            ways.append(self._encode_whole(kept, count))
        shares = [bits.entropy_bytes(int(np.count_nonzero(kept[span])), span.stop - span.start) for span in self.spans]
        apart = sum(shares) + SET_BYTES * len(shares)
        if apart < whole and worth(apart):  # or else the tensors are about equally dense
            sets = [(np.flatnonzero(kept[span]), span.stop - span.start) for span in self.spans]
            ways.append((TENSORS, self._encode_sets(sets)))
        return min(ways, key=lambda way: (len(way[1]), way[0]))

    def _ranked(self, known: Mask) -> tuple[np.ndarray, np.ndarray]:
        """What a mask keeps, bool (n,), and how much of it up to each coordinate, int32 (n,). A round's uploads are
        coded against one mask, so the last is kept."""
        if self._last_ranked is None or self._last_ranked[0] != known.digest:
            held = self._gather(known)
            self._last_ranked = known.digest, held, np.cumsum(held, dtype=np.int32)
        return self._last_ranked[1:]

    def _split(self, known: Mask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a mask keeps, bool (n,), the positions of it and those of the rest; the last is kept as well."""
        if self._last_split is None or self._last_split[0] != known.digest:
            held = self._gather(known)
            self._last_split = known.digest, held, np.flatnonzero(held), np.flatnonzero(~held)
        return self._last_split[1:]

    def _encode_whole(self, kept: np.ndarray, count: int) -> tuple[int, bytes]:
        """bool (n,) to one set of positions. About a half is a bitmap or a pattern, for which none are looked up."""
        if self.entropy != "ans" and HALF[0] * self.size < count < HALF[1] * self.size:
            bitmap, squeezed = np.packbits(kept).tobytes(), b""
            if self.entropy == "zstd":
                squeezed = bits.compress(bitmap)
            return (BITMAP_ZSTD, squeezed) if 0 < len(squeezed) < len(bitmap) else (BITMAP, bitmap)
        data = bits.encode_positions(np.flatnonzero(kept), self.size, entropy=self.entropy)
        return BITMAP + data[0], data[1:]

    def _encode_sets(self, sets: Sequence[tuple[np.ndarray, int]]) -> bytes:
        """Pairs of positions and size to bytes."""
        coded = [bits.encode_positions(positions, size, entropy=self.entropy) for positions, size in sets]
        lengths = [struct.pack("<I", len(data)) for data in coded[:-1]]
        return b"".join([*lengths, *coded])

    def _decode_difference(self, data: bytes, held: np.ndarray, before: np.ndarray, others: np.ndarray) -> np.ndarray:
        """bool (n,) from the change against held, bool (n,), whose positions are `before` and the rest `others`."""
        dropped, grown = _decode_sets(data, [len(before), len(others)])
        kept = held.copy()
        kept[before[dropped]] = False
        kept[others[grown]] = True
        return kept

    def _encode_structured(self, kept: np.ndarray) -> bytes | None:
        """bool (n,) to rows and columns of each tensor; None where they do not say all."""
        written = [np.empty(0, np.bool_)]
        for span, shape in zip(self.spans, self.shapes, strict=True):
            block = kept[span].reshape(_three(shape))
            rows, columns = (np.asarray(block.any(axis=axes)) for axes in ((1, 2), (0, 2)))
            if np.count_nonzero(block) != np.count_nonzero(rows) * np.count_nonzero(columns) * block.shape[2]:
                return None
            written += [rows, columns] if len(shape) > 1 else [rows]
        return np.packbits(np.concatenate(written)).tobytes()

    def _decode_structured(self, data: bytes) -> np.ndarray:
        """What _encode_structured made to bool (n,)."""
        num_bits = sum(_three(shape)[0] + (shape[1] if len(shape) > 1 else 0) for shape in self.shapes)
        written = bits.unpack_bits(data, num_bits, "a structured mask")
        kept, at = np.empty(self.size, np.bool_), 0
        for span, shape in zip(self.spans, self.shapes, strict=True):
            rows, columns, _ = _three(shape)
            block = kept[span].reshape(_three(shape))
            block[:] = written[at : at + rows, None, None]
            at += rows
            if len(shape) > 1:
                block &= written[at : at + columns, None]
                at += columns
        return kept

    def _decode_seed(self, data: bytes) -> Mask:
        form = f"<{len(self.prunable)}I"
        expected = 16 + struct.calcsize(form)
        expect(len(data) == expected, f"the seed of a mask has {len(data)} bytes; {expected} were expected")
        counts = dict(zip(self.prunable, struct.unpack(form, data[16:]), strict=True))
        for (name, count), span in zip(counts.items(), self.spans, strict=True):
            size = span.stop - span.start
            expect(count <= size, f"the seed of a mask keeps {count} of {size} weights of {name!r}")
        return random_mask(self.layout, self.prunable, counts, Key(bytes(data[:16])))

    def _gather(self, mask: Mask) -> np.ndarray:
        flat, fixed = mask.flat.numpy(), self._cut_beyond(mask)
        if fixed:
            raise ValueError(f"a mask cuts {fixed[0]!r}, which is not prunable; see the settings under scope")
        return np.concatenate([flat[self.layout.spans[name]] for name in self.prunable] or [np.empty(0, np.bool_)])

    def _cut_beyond(self, mask: Mask) -> list[str]:
        """Names that are not prunable and that the mask cuts."""
        flat, spans = mask.flat.numpy(), self.layout.spans
        return [name for name in self.layout.names if name not in self.prunable and not flat[spans[name]].all()]

    def _scatter(self, kept: np.ndarray) -> Mask:
        flat = np.ones(self.layout.size, np.bool_)
        for name, span in zip(self.prunable, self.spans, strict=True):
            flat[self.layout.spans[name]] = kept[span]
        return Mask(self.layout, torch.from_numpy(flat))


def _decode_sets(data: bytes, sizes: Sequence[int]) -> list[np.ndarray]:
    """Positions of one set for each size. Raises WireError."""
    at = 4 * (len(sizes) - 1)
    expect(0 <= at <= len(data), f"{len(sizes)} sets of positions cannot be in {len(data)} bytes")
    bounds = [*accumulate(struct.unpack_from(f"<{len(sizes) - 1}I", data), initial=at), len(data)]
    view = memoryview(data)  # of which nothing is left for the sets behind a length that is too large
    return [bits.decode_positions(view[slice(*span)], size) for span, size in zip(pairwise(bounds), sizes, strict=True)]


def _three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Rows, columns and what lies behind them; columns are 1 where there are none."""
    rows, columns = (*shape, 1, 1)[:2]
    return rows, columns, math.prod(shape[2:])
