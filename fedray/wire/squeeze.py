"""Bytes to fewer bytes, without loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import zstandard

from fedray.errors import WireError
from fedray.round import refuse
from fedray.wire.values import expect

EMPTY_BYTES = 20  # no frame without content is longer


@final
@dataclass(frozen=True, kw_only=True)
class Zstd:
    """Zstandard (RFC 8878). Worth it after coarse writers; the low bits of floats are noise and hardly shrink.

    level: effort, 1 (fast) to 22 (small).
    """

    level: int = 3

    lossy = False
    changes_only = False

    def __post_init__(self) -> None:
        refuse(not 1 <= self.level <= 22, "level", self.level, "it is 1 (fast) to 22 (small); 3 is a good start")

    @property
    def label(self) -> str:
        return f"zstd:{self.level}"

    def encode(self, data: bytes | memoryview) -> bytes:
        """One frame that declares the size of its content."""
        return zstandard.ZstdCompressor(level=self.level, write_content_size=True).compress(data)

    def decode(self, data: memoryview, num_bytes: int) -> bytes:
        """The content of a frame: exactly num_bytes bytes. Raises WireError for anything else."""
        try:
            # What a frame declares is what gets allocated, so it is read first.
            declared = zstandard.frame_content_size(data)
            expect(declared == num_bytes, f"a zstd frame declares {declared} bytes; {num_bytes} were expected")
            # Bytes behind a frame without content are not seen by the library.
            expect(num_bytes > 0 or len(data) <= EMPTY_BYTES, f"an empty zstd frame has {len(data)} bytes")
            content = zstandard.ZstdDecompressor().decompress(data, max_output_size=num_bytes, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise WireError(f"{len(data)} bytes cannot be decompressed with zstd: {error}") from error
        expect(len(content) == num_bytes, f"a zstd frame holds {len(content)} bytes; {num_bytes} were expected")
        return content
