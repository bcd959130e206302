"""A subset of {0 .. size - 1} to bytes and back: positions of what is kept or sent, in the cheapest of several ways.

The first byte names the way, the rest is its body. Sizes of bodies in bytes, for k of `size` positions, with
c = ceil(bit_length(size) / 8) bytes for a count:

    bitmap  ceil(size / 8)                       one bit a coordinate, the most significant of a byte first
    list    ceil(k w / 8), w = ceil(log2 size)   each position in w bits, at least one; also known as COO
    rice    1 + c + ceil((k (b + 1) + Q) / 8)    Golomb-Rice of the gaps, Q the sum of gap >> b over the gaps
    gaps    1 + a Zstandard frame                one byte a gap and one more for each 255 in it
    ans     1 + c + 4 words                      asymmetric numeral systems at the exact density: the entropy + 4 or so
    bitmap_zstd  a Zstandard frame               the bitmap compressed: for patterns such as 2 of every 4

Rice, gaps and ans code the rarer of the kept and the dropped, so k is at most size / 2 there; their first byte says
which. Equal sizes go to the earlier way. Decoders trust nothing: they raise WireError, and allocate no more than a
fixed multiple of `size` and of the input.

Sources: Golomb-Rice as in Sattler et al., Robust and Communication-Efficient Federated Learning from Non-IID Data
(2019); asymmetric numeral systems by Duda (2013), as the package constriction has them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import zstandard

from fedray.errors import ConfigError, FedrayError, WireError
from fedray.wire.values import Entropy, expect

WAYS = ("bitmap", "list", "rice", "gaps", "ans", "bitmap_zstd")
"""Names by code, which is the first byte."""
ESCAPE = 255  # a gap of 255 or more is written as 255s and a rest below 255
DROPPED = 0x80  # in the first byte of rice, gaps and ans: it is the dropped positions that are coded
FRAME_BYTES = 10  # no Zstandard frame is of use below this


def encode_positions(positions: np.ndarray, size: int, *, entropy: Entropy) -> bytes:
    """Ascending positions, int64 (k,), to bytes, in the cheapest of the ways that `entropy` admits.

    none: bitmap, list and rice; zstd: gaps and bitmap_zstd too; ans: ans too. Of gaps and bitmap_zstd one is tried:
    the second where a bitmap is near the entropy, so that gaps could win by a pattern alone, and gaps are slow to make.
    ANS is not run where its entropy is above another way's size. Raises ConfigError where ans is asked for and the
    package is missing.
    """
    check_entropy(entropy)
    positions = np.asarray(positions, np.int64)
    analytic, least = sizes(positions, size), entropy_bytes(len(positions), size)
    way = min(analytic, key=lambda name: analytic[name])
    num_bytes, body = analytic[way], None
    near = least <= num_bytes <= least + FRAME_BYTES
    squeezed = "gaps" if not near else "bitmap_zstd" if way == "bitmap" else None
    if entropy != "none" and num_bytes > FRAME_BYTES and squeezed is not None:
        tried = encode_as(squeezed, positions, size)
        if len(tried) < num_bytes:
            way, num_bytes, body = squeezed, len(tried), tried
    if entropy == "ans" and 1 + _count_bytes(size) + least < num_bytes:
        ans = encode_as("ans", positions, size)
        if len(ans) < num_bytes:
            way, body = "ans", ans
    return bytes([WAYS.index(way)]) + (encode_as(way, positions, size) if body is None else body)


def decode_positions(data: bytes | memoryview, size: int) -> np.ndarray:
    """Bytes to ascending positions within [0, size), int64 (k,). Raises WireError."""
    return decode_as(way_of(data), memoryview(data)[1:], size)


def way_of(data: bytes | memoryview) -> str:
    """The name of the way that encoded positions are written in. Raises WireError."""
    expect(len(data) > 0, "encoded positions have no bytes at all")
    expect(data[0] < len(WAYS), f"positions are written in way {data[0]}; there are {len(WAYS)}")
    return WAYS[data[0]]


def encode_as(way: str, positions: np.ndarray, size: int) -> bytes:
    """Ascending positions, int64 (k,), to the body of the way of this name."""
    return _ENCODERS[WAYS.index(way)](np.asarray(positions, np.int64), size)


def decode_as(way: str, body: bytes | memoryview, size: int) -> np.ndarray:
    """The body of the way of this name to ascending positions, int64 (k,). Raises WireError."""
    return _DECODERS[WAYS.index(way)](memoryview(body), size)


def sizes(positions: np.ndarray, size: int) -> dict[str, int]:
    """Exact bytes of the body by way, for the ways that have a formula."""
    _, gaps = _rarer(positions, size)
    shift = rice_parameter(len(gaps), size)
    bits = len(gaps) * (shift + 1) + int((gaps >> shift).sum())
    return {
        "bitmap": _bytes_of(size),
        "list": _bytes_of(len(positions) * _width(size)),
        "rice": 1 + _count_bytes(size) + _bytes_of(bits),
    }


def entropy_bytes(count: int, size: int) -> float:
    """size H2(count / size) / 8 with H2(d) = -d log2 d - (1 - d) log2(1 - d): what a random set costs at least."""
    parts = [part for part in (count, size - count) if part]
    return sum(part * math.log2(size / part) for part in parts) / 8


def rice_parameter(count: int, size: int) -> int:
    """b* = max(0, 1 + floor(log2(ln(phi - 1) / ln(1 - d)))) at d = count / size <= 1/2, phi the golden ratio."""
    if not count:
        return 0
    ratio = math.log((math.sqrt(5) - 1) / 2) / math.log1p(-count / size)
    return max(0, 1 + math.floor(math.log2(ratio)))


def check_entropy(entropy: Entropy) -> None:
    """Raise ConfigError for a name that does not exist, or for ans where its package is missing."""
    if entropy not in ("none", "zstd", "ans"):
        raise ConfigError(f"entropy is {entropy!r}; it must be none, zstd or ans")
    if entropy == "ans":
        _constriction(ConfigError)


# -- bitmap and list -------------------------------------------------------------------------------------------------


def _encode_bitmap(positions: np.ndarray, size: int) -> bytes:
    kept = np.zeros(size, np.bool_)
    kept[positions] = True
    return np.packbits(kept).tobytes()


def _decode_bitmap(body: memoryview, size: int) -> np.ndarray:
    return np.flatnonzero(unpack_bits(body, size, "a bitmap"))


def _encode_bitmap_zstd(positions: np.ndarray, size: int) -> bytes:
    return compress(_encode_bitmap(positions, size))


def compress(data: bytes | memoryview) -> bytes:
    """A Zstandard frame. What is random does not repeat: levels that look harder for matches find chance ones, and cost
    5 % more."""
    return zstandard.ZstdCompressor(level=1).compress(data)


def _decode_bitmap_zstd(body: memoryview, size: int) -> np.ndarray:
    return _decode_bitmap(memoryview(_unzipped(body, _bytes_of(size), "a compressed bitmap")), size)


def _unzipped(frame: memoryview, limit: int, what: str) -> bytes:
    """The content of a Zstandard frame, of at most `limit` bytes. Raises WireError."""
    try:
        num_bytes = zstandard.frame_content_size(frame)
        expect(0 <= num_bytes <= limit, f"{what} declares {num_bytes} bytes; at most {limit} fit")
        # Bytes behind a frame without content are not seen by the library.
        expect(num_bytes > 0 or len(frame) <= 2 * FRAME_BYTES, f"{what} has {len(frame)} bytes and no content")
        return zstandard.ZstdDecompressor().decompress(frame, max_output_size=limit, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise WireError(f"{what} cannot be decompressed: {error}") from error


def _encode_list(positions: np.ndarray, size: int) -> bytes:
    return np.packbits(_bits_of(positions, _width(size))).tobytes()


def _decode_list(body: memoryview, size: int) -> np.ndarray:
    """No count is written: what fits into the bytes is there, but for the zeros that fill the last byte."""
    width = _width(size)
    expect(len(body) <= _bytes_of(size * width), f"a list of {len(body)} bytes holds more than {size} positions")
    bits = np.unpackbits(np.frombuffer(body, np.uint8))
    positions = _values_of(bits[: len(bits) // width * width], width)
    count = len(positions)
    least = max(1, count - 7 // width)  # what fills a byte has at most 7 bits
    while count > least and not positions[count - 1]:  # only the first position may be 0
        count -= 1
    expect(len(body) == _bytes_of(count * width), "a list of positions has bytes too many")
    expect(not bits[count * width :].any(), "a list of positions is not filled up with zeros")
    positions = positions[:count]
    expect(not (np.diff(positions) <= 0).any(), "a list of positions does not ascend")
    return _within(positions, size)


# -- gaps of the rarer -----------------------------------------------------------------------------------------------


def _encode_rice(positions: np.ndarray, size: int) -> bytes:
    """All quotients in unary, a 1 at the end of each; behind them all remainders, so that both are arrays."""
    dropped, gaps = _rarer(positions, size)
    shift = rice_parameter(len(gaps), size)
    ends = np.cumsum((gaps >> shift) + 1) - 1
    unary = np.zeros(ends[-1] + 1 if len(ends) else 0, np.uint8)
    unary[ends] = 1
    bits = np.concatenate([unary, _bits_of(gaps & ((1 << shift) - 1), shift)])
    return bytes([dropped | shift]) + _write_count(len(gaps), size) + np.packbits(bits).tobytes()


def _decode_rice(body: memoryview, size: int) -> np.ndarray:
    dropped, shift, count, stream = _read_head(body, size)
    # Of the best parameter: the remainders of all gaps have no more bits than there are coordinates.
    expect(count << shift <= size or shift == 0, f"Rice codes have parameter {shift} for {count} of {size} positions")
    expect(len(stream) <= _bytes_of(count * (shift + 1) + size), f"Rice codes have bytes too many for {size} positions")
    bits = np.unpackbits(np.frombuffer(stream, np.uint8))
    ends = np.flatnonzero(bits)[:count]
    expect(len(ends) == count, f"Rice codes hold {len(ends)} of {count} positions")
    start = int(ends[-1]) + 1 if count else 0
    total = start + count * shift
    expect(len(stream) == _bytes_of(total), f"Rice codes have {len(stream)} bytes; {_bytes_of(total)} were expected")
    expect(not bits[total:].any(), "Rice codes are not filled up with zeros")
    gaps = (np.diff(ends, prepend=-1) - 1 << shift) | _values_of(bits[start:total], shift, count)
    return _select(_within(np.cumsum(gaps + 1) - 1, size), size, dropped)


def _encode_gaps(positions: np.ndarray, size: int) -> bytes:
    dropped, gaps = _rarer(positions, size)
    written = gaps.astype(np.uint8)
    if (gaps >= ESCAPE).any():
        steps = gaps // ESCAPE + 1
        written = np.full(int(steps.sum()), ESCAPE, np.uint8)
        written[np.cumsum(steps) - 1] = gaps % ESCAPE
    return bytes([dropped]) + compress(written.data)


def _decode_gaps(body: memoryview, size: int) -> np.ndarray:
    expect(len(body) > 0 and not body[0] & ~DROPPED, "the gaps of positions have no valid first byte")
    # Each position costs one byte and each escape stands for 255 coordinates: never more than this.
    limit = size + size // ESCAPE + 1
    raw = _unzipped(body[1:], limit, f"a set of gaps of {size} coordinates")
    written = np.frombuffer(raw, np.uint8)
    expect(not len(written) or written[-1] != ESCAPE, "the last gap of positions has no end")
    ends = np.flatnonzero(written != ESCAPE)
    positions = np.cumsum(written, dtype=np.int64)[ends] + np.arange(len(ends))
    return _select(_within(positions, size), size, body[0])


def _encode_ans(positions: np.ndarray, size: int) -> bytes:
    stream = _constriction(ConfigError)
    dropped, gaps = _rarer(positions, size)
    head = bytes([dropped]) + _write_count(len(gaps), size)
    if not len(gaps):
        return head
    symbols = np.zeros(size, np.int32)
    symbols[np.cumsum(gaps + 1) - 1] = 1
    coder = stream.stack.AnsCoder()
    coder.encode_reverse(symbols, stream.model.Bernoulli(len(gaps) / size, perfect=False))
    return head + bytes(coder.get_compressed().astype("<u4").data)


def _decode_ans(body: memoryview, size: int) -> np.ndarray:
    dropped, shift, count, words = _read_head(body, size)
    expect(shift == 0 and len(words) % 4 == 0, "positions coded by ANS are no whole number of words")
    expect(bool(words) == bool(count), f"positions coded by ANS have {len(words)} bytes for {count} of {size}")
    coded = np.empty(0, np.int64)
    if count:
        stream = _constriction(WireError)
        numbers = np.frombuffer(words, "<u4").astype(np.uint32)
        expect(bool(numbers[-1]), "positions coded by ANS end in a word of zeros")
        coder = stream.stack.AnsCoder(numbers)
        coded = np.flatnonzero(coder.decode(stream.model.Bernoulli(count / size, perfect=False), size))
        expect(coder.is_empty(), "positions coded by ANS have bytes too many")
        expect(len(coded) == count, f"positions coded by ANS are {len(coded)}; {count} were declared")
    return _select(coded, size, dropped)


_ENCODERS = (_encode_bitmap, _encode_list, _encode_rice, _encode_gaps, _encode_ans, _encode_bitmap_zstd)
_DECODERS = (_decode_bitmap, _decode_list, _decode_rice, _decode_gaps, _decode_ans, _decode_bitmap_zstd)


# -- what they share -------------------------------------------------------------------------------------------------


def unpack_bits(data: bytes | memoryview, count: int, what: str) -> np.ndarray:
    """ceil(count / 8) bytes to bool (count,). Raises WireError, naming `what`."""
    expect(len(data) == _bytes_of(count), f"{what} of {len(data)} bytes cannot hold {count} bits")
    bits = np.unpackbits(np.frombuffer(data, np.uint8)).view(np.bool_)
    expect(not bits[count:].any(), f"{what} is not filled up with zeros")
    return bits[:count]


def _bytes_of(bits: int) -> int:
    return -(-bits // 8)


def _width(size: int) -> int:
    """Bits that write one position."""
    return max(1, (size - 1).bit_length())


def _count_bytes(size: int) -> int:
    return _bytes_of(size.bit_length())


def _write_count(count: int, size: int) -> bytes:
    return count.to_bytes(_count_bytes(size), "little")


def _read_head(body: memoryview, size: int) -> tuple[int, int, int, memoryview]:
    """DROPPED or 0, the Rice parameter, how many positions are coded, and the rest of the body."""
    at = 1 + _count_bytes(size)
    expect(len(body) >= at, f"coded positions of {size} have {len(body)} bytes; at least {at} were expected")
    count = int.from_bytes(body[1:at], "little")
    expect(2 * count <= size, f"{count} of {size} positions are coded; it must be the rarer half")
    return body[0] & DROPPED, body[0] & ~DROPPED, count, body[at:]


def _rarer(positions: np.ndarray, size: int) -> tuple[int, np.ndarray]:
    """DROPPED or 0, and the gaps in front of each of the rarer positions, int64, at least 0."""
    dropped = 2 * len(positions) > size
    rarer = _others(positions, size) if dropped else positions
    return DROPPED * dropped, np.diff(rarer, prepend=-1) - 1


def _others(positions: np.ndarray, size: int) -> np.ndarray:
    rest = np.ones(size, np.bool_)
    rest[positions] = False
    return np.flatnonzero(rest)


def _select(coded: np.ndarray, size: int, dropped: int) -> np.ndarray:
    return _others(coded, size) if dropped else coded


def _within(positions: np.ndarray, size: int) -> np.ndarray:
    """These ascending positions, which must end below `size`."""
    last = int(positions[-1]) if len(positions) else -1
    expect(last < size, f"positions reach {last}, and there are {size} coordinates")
    return positions


def _bits_of(values: np.ndarray, width: int) -> np.ndarray:
    """int64 (k,) to uint8 (k * width,) of 0 and 1, the most significant bit of each value first."""
    bits = np.empty((len(values), width), np.uint8)
    for place in range(width):
        bits[:, place] = values >> (width - 1 - place) & 1
    return bits.reshape(-1)


def _values_of(bits: np.ndarray, width: int, count: int | None = None) -> np.ndarray:
    """uint8 (k * width,) to int64 (k,); count: k, where width may be 0."""
    values = np.zeros(len(bits) // width if count is None else count, np.int64)
    for place in range(width):
        values = values << 1 | bits[place::width]
    return values


def _constriction(kind: type[FedrayError]) -> Any:
    """The package's streams; an error of this kind where it is missing, because it is optional."""
    try:
        from constriction import stream
    except ImportError as error:
        raise kind("entropy coding by ANS needs constriction: pip install fedray[compress]") from error
    return stream
