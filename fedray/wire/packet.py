"""The frame of a payload: fixed-width little-endian fields, then masks, then values.

frame   magic 2s, version u8, number of parts u8, mask code u8, 3 bytes of padding, mask length u32
a part  index u8, support code u8, mask code u8, 1 byte of padding, count u32, mask length u32, weight f64
body    the message's mask, the masks of parts, padding to 8 bytes, the values of each part
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from fedray.errors import WireError

MAGIC = b"FR"
VERSION = 1
FRAME = struct.Struct("<2sBBB3xI")
PART = struct.Struct("<BBBxIId")
ALL, SHARED, OWN = range(3)
"""The support of a part: every coordinate, the message's mask, or a mask of its own."""


@dataclass(frozen=True)
class PartHeader:
    """One part as it stands in the frame. count: number of values. own: the part's own mask, coded."""

    index: int
    support: int
    mask_code: int
    count: int
    weight: float
    own: bytes = b""


@dataclass(frozen=True)
class Frame:
    """Everything of a payload but its values. values_at: where they begin."""

    mask_code: int
    mask: bytes
    parts: tuple[PartHeader, ...]
    values_at: int


def pack(mask_code: int, mask: bytes, parts: list[PartHeader]) -> bytes:
    """The bytes before the values, padded so that the values lie on a multiple of eight bytes."""
    pieces = [FRAME.pack(MAGIC, VERSION, len(parts), mask_code, len(mask))]
    pieces += [PART.pack(p.index, p.support, p.mask_code, p.count, len(p.own), p.weight) for p in parts]
    pieces += [mask, *(p.own for p in parts)]
    head = b"".join(pieces)
    return head + bytes(-len(head) % 8)


def unpack(payload: bytes) -> Frame:
    """Read the frame. Raises WireError where it is not one."""
    try:
        magic, version, num_parts, mask_code, mask_length = FRAME.unpack_from(payload)
        if (magic, version) != (MAGIC, VERSION):
            raise WireError(f"a payload begins with {magic!r}, version {version}; {MAGIC!r}, {VERSION} was expected")
        headers = [PART.unpack_from(payload, FRAME.size + i * PART.size) for i in range(num_parts)]
    except struct.error as error:
        raise WireError(f"a payload of {len(payload)} bytes is too short for its frame") from error
    at = FRAME.size + num_parts * PART.size
    mask = payload[at : at + mask_length]
    at += mask_length
    parts = []
    for index, support, own_code, count, own_length, weight in headers:
        parts.append(PartHeader(index, support, own_code, count, weight, bytes(payload[at : at + own_length])))
        at += own_length
    return Frame(mask_code, bytes(mask), tuple(parts), at + -at % 8)
