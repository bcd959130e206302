"""The frame of a payload: fixed-width little-endian fields, then masks, then values.

frame   magic 2s, version u8, number of parts u8, mask code u8, 3 bytes of padding, mask length u32, length of the
        whole payload u64, checksum u32 (CRC-32 of everything but itself)
a part  index u8, support code u8, mask code u8, whole u8, mask length u32, length of its values u64, weight f64
body    the message's mask, the masks of parts, the values of each part on a multiple of 8 bytes
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from fedray.errors import WireError

MAGIC = b"FR"
VERSION = 2
FRAME = struct.Struct("<2sBBB3xIQ")
CHECKSUM = struct.Struct("<I")
PART = struct.Struct("<BBBBIQd")
HEAD_BYTES = FRAME.size + CHECKSUM.size
ALL, SHARED, OWN = range(3)
"""The support of a part: every coordinate, the message's mask, or a mask of its own."""

Bytes = bytes | memoryview


@dataclass(frozen=True)
class PartHeader:
    """One part as it stands in the frame.

    whole: 1 where a part that travels as a change is sent in full. own: the part's own mask, coded. num_bytes: of its
    values.
    """

    index: int
    support: int
    mask_code: int
    whole: int
    num_bytes: int
    weight: float
    own: bytes = b""


@dataclass(frozen=True)
class Frame:
    """A payload taken apart: values hold one view a part."""

    mask_code: int
    mask: bytes
    parts: tuple[PartHeader, ...]
    values: tuple[memoryview, ...]


def pack(
    mask_code: int, mask: bytes, parts: Sequence[PartHeader], values: Sequence[Sequence[Bytes]], *, sealed: bool = True
) -> bytes:
    """The payload; values: the pieces of each part, whose lengths add up to the part's num_bytes.

    sealed: whether to work out the checksum; it is zero otherwise, in a payload that is read where it was made.
    """
    body: list[Bytes] = [mask, *(part.own for part in parts)]
    at = HEAD_BYTES + len(parts) * PART.size + sum(len(piece) for piece in body)
    for part, pieces in zip(parts, values, strict=True):
        padding = -at % 8
        body += [bytes(padding), *pieces]
        at += padding + part.num_bytes
    frame = FRAME.pack(MAGIC, VERSION, len(parts), mask_code, len(mask), at)
    headers = b"".join(
        PART.pack(p.index, p.support, p.mask_code, p.whole, len(p.own), p.num_bytes, p.weight) for p in parts
    )
    checksum = 0
    if sealed:
        checksum = zlib.crc32(headers, zlib.crc32(frame))
        for piece in body:
            checksum = zlib.crc32(piece, checksum)
    return b"".join([frame, CHECKSUM.pack(checksum), headers, *body])


def unpack(payload: bytes, *, sealed: bool = True) -> Frame:
    """Take a payload apart. Raises WireError where it is not one; allocates nothing but small headers and masks.

    sealed: whether it has a checksum.
    """
    if len(payload) < HEAD_BYTES:
        raise WireError(f"a payload of {len(payload)} bytes is too short for its frame of {HEAD_BYTES}")
    magic, version, num_parts, mask_code, mask_length, length = FRAME.unpack_from(payload)
    if (magic, version) != (MAGIC, VERSION):
        raise WireError(f"a payload begins with {magic!r}, version {version}; {MAGIC!r}, {VERSION} was expected")
    if length != len(payload):
        raise WireError(f"a payload declares {length} bytes and has {len(payload)}")
    view = memoryview(payload)
    if sealed:
        (checksum,) = CHECKSUM.unpack_from(payload, FRAME.size)
        if zlib.crc32(view[HEAD_BYTES:], zlib.crc32(view[: FRAME.size])) != checksum:
            raise WireError(f"the checksum of a payload of {length} bytes does not match its content")
    at = HEAD_BYTES + num_parts * PART.size
    if at > length:
        raise WireError(f"a payload of {length} bytes is too short for the headers of {num_parts} parts")

    def take(count: int) -> memoryview:
        nonlocal at
        if count > length - at:
            raise WireError(f"a payload of {length} bytes declares {count} more at byte {at}")
        at += count
        return view[at - count : at]

    mask = bytes(take(mask_length))
    parts, values = [], []
    for number in range(num_parts):
        index, support, code, whole, own, num_bytes, weight = PART.unpack_from(payload, HEAD_BYTES + number * PART.size)
        parts.append(PartHeader(index, support, code, whole, num_bytes, weight, bytes(take(own))))
    for part in parts:
        take(-at % 8)
        values.append(take(part.num_bytes))
    if at != length:
        raise WireError(f"a payload has {length - at} bytes too many")
    return Frame(mask_code, mask, tuple(parts), tuple(values))
