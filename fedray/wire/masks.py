"""Masks to bytes: a bitmap, gaps between kept positions, or the seed that drew them; the cheapest is taken.

Only prunable coordinates are coded; the others are kept by definition. Sizes for n prunable coordinates:
bitmap ceil(n/8); seed 16 + 4 bytes a prunable tensor; gaps about the entropy plus a few per cent where few are kept.
"""

from __future__ import annotations

import struct

import numpy as np
import torch
import zstandard

from fedray.errors import WireError
from fedray.keys import Key
from fedray.prune.select import random_mask
from fedray.tree import Layout, Mask

NONE, KNOWN, BITMAP, GAPS, SEED = range(5)
"""What the mask's one-byte code says: nothing is masked, the receiver knows it, or how it is written."""
CODER_NAMES = ("none", "known", "bitmap", "gaps", "seed")
ESCAPE = 255  # a gap of 255 or more is written as 255s and a rest below 255


def encode_bitmap(kept: np.ndarray) -> bytes:
    """bool (n,) to ceil(n/8) bytes."""
    return np.packbits(kept).tobytes()


def decode_bitmap(data: bytes, size: int) -> np.ndarray:
    if len(data) != (size + 7) // 8:
        raise WireError(f"a bitmap of {len(data)} bytes cannot hold {size} coordinates")
    return np.unpackbits(np.frombuffer(data, np.uint8), count=size).view(np.bool_)


def encode_gaps(kept: np.ndarray) -> bytes:
    """bool (n,) to gaps between the rarer kind, one byte each, compressed; the first byte says which kind."""
    rarer = bool(2 * np.count_nonzero(kept) <= kept.size)
    positions = np.flatnonzero(kept == rarer)
    gaps = np.diff(positions, prepend=-1) - 1
    written = np.full(int((gaps // ESCAPE + 1).sum()), ESCAPE, np.uint8)
    if len(gaps):
        written[np.cumsum(gaps // ESCAPE + 1) - 1] = gaps % ESCAPE
    return bytes([rarer]) + zstandard.ZstdCompressor(level=9, write_content_size=True).compress(written.tobytes())


def decode_gaps(data: bytes, size: int) -> np.ndarray:
    try:
        # Each position costs one byte and each escape stands for 255 coordinates: never more than this.
        limit = size + size // ESCAPE + 1
        if zstandard.frame_content_size(data[1:]) > limit:
            raise WireError(f"gaps for {size} coordinates declare more than {limit} bytes")
        raw = zstandard.ZstdDecompressor().decompress(data[1:], max_output_size=limit)
    except zstandard.ZstdError as error:
        raise WireError(f"the gaps of a mask cannot be decompressed: {error}") from error
    written = np.frombuffer(raw, np.uint8)
    ends = np.flatnonzero(written != ESCAPE)
    positions = np.cumsum(written, dtype=np.int64)[ends] + np.arange(len(ends))
    if len(positions) and positions[-1] >= size:
        raise WireError(f"the gaps of a mask reach position {positions[-1]} of {size}")
    rarer = bool(data[0])
    kept = np.full(size, not rarer)
    kept[positions] = rarer
    return kept


class MaskCoder:
    """Codes masks of one layout of which only `prunable` names may be cut."""

    def __init__(self, layout: Layout, prunable: tuple[str, ...]) -> None:
        self.layout = layout
        self.prunable = prunable
        self.size = sum(layout.spans[name].stop - layout.spans[name].start for name in prunable)

    def encode(self, mask: Mask, known: Mask | None) -> tuple[int, bytes]:
        """The code and the bytes of the cheapest way; no bytes where the receiver knows the mask."""
        if known is not None and (mask is known or mask.digest == known.digest):
            return KNOWN, b""
        kept = self._gather(mask)
        ways = [(BITMAP, encode_bitmap(kept)), (GAPS, encode_gaps(kept))]
        if mask.seed is not None and mask.seed[2] == self.prunable:
            key, counts, _ = mask.seed
            ways.append((SEED, key + struct.pack(f"<{len(counts)}I", *counts)))
        return min(ways, key=lambda way: (len(way[1]), way[0]))

    def decode(self, code: int, data: bytes, known: Mask | None) -> Mask | None:
        if code == NONE:
            return None
        if code == KNOWN:
            if known is None:
                raise WireError("a payload refers to a mask that the receiver does not know")
            return known
        if code == SEED:
            width = struct.calcsize(f"<{len(self.prunable)}I")
            if len(data) != 16 + width:
                raise WireError(f"the seed of a mask has {len(data)} bytes; {16 + width} were expected")
            counts = dict(zip(self.prunable, struct.unpack(f"<{len(self.prunable)}I", data[16:]), strict=True))
            for name, count in counts.items():
                span = self.layout.spans[name]
                if count > span.stop - span.start:
                    raise WireError(f"the seed of a mask keeps {count} of {span.stop - span.start} weights of {name!r}")
            return random_mask(self.layout, self.prunable, counts, Key(data[:16]))
        if code == BITMAP:
            return self._scatter(decode_bitmap(data, self.size))
        if code == GAPS:
            return self._scatter(decode_gaps(data, self.size))
        raise WireError(f"a payload names mask coder {code}; there are {len(CODER_NAMES)}")

    def _gather(self, mask: Mask) -> np.ndarray:
        flat = mask.flat.numpy()
        fixed = [n for n in self.layout.names if n not in self.prunable and not flat[self.layout.spans[n]].all()]
        if fixed:
            raise ValueError(f"a mask cuts {fixed[0]!r}, which is not prunable; see the settings under scope")
        return np.concatenate([flat[self.layout.spans[name]] for name in self.prunable] or [np.empty(0, np.bool_)])

    def _scatter(self, kept: np.ndarray) -> Mask:
        flat, start = np.ones(self.layout.size, np.bool_), 0
        for name in self.prunable:
            span = self.layout.spans[name]
            flat[span] = kept[start : start + span.stop - span.start]
            start += span.stop - span.start
        return Mask(self.layout, torch.from_numpy(flat))
