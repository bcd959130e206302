"""How real values become bytes: floats of three widths, whole multiples of a step, signs.

All of them write little-endian. What a scale belongs to (a tensor, a channel, a bucket) is known to both ends,
and where nothing of it is sent, its scale is not written.
"""

# A writer that needs neither the coordinates nor the key still takes both.
# ruff: noqa: ARG002

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import numpy as np
import torch

from fedray.errors import NumericError
from fedray.keys import Key
from fedray.round import refuse
from fedray.tree import tensor_view
from fedray.wire.values import Level, Where, expect

Rounding = Literal["nearest", "stochastic"]
Norm = Literal["l2", "max"]

LARGEST = float(np.finfo(np.float32).max)
# Bits of a lane and the lower lane of every two, for words of 64 bits.
_LANES = ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF))
# Row b is the eight signs that byte b stands for: a bit that is set is a minus.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_SIGNS = np.where(_BITS, np.float32(-1), np.float32(1))


# -- floats ----------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, kw_only=True)
class Float32:
    """Lossless: four bytes a value. Copies nothing in either direction."""

    label = "float32"
    lossy = False
    changes_only = False
    bits = 32.0

    def num_bytes(self, where: Where) -> int:
        return 4 * where.size

    def encode(self, values: np.ndarray, where: Where, *, key: Key) -> memoryview:
        return np.ascontiguousarray(values, "<f4").view(np.uint8).data

    def decode(self, data: memoryview, where: Where) -> np.ndarray:
        _expect_length(self.label, data, self.num_bytes(where))
        return np.frombuffer(data, "<f4")


class _Half:
    """What the two formats of two bytes a value share. infinity: the bits of +inf, the sign left out."""

    label: ClassVar[str]
    dtype: ClassVar[torch.dtype]
    infinity: ClassVar[int]
    end: ClassVar[str]
    lossy = True
    changes_only = False
    bits = 16.0

    def num_bytes(self, where: Where) -> int:
        return 2 * where.size

    def encode(self, values: np.ndarray, where: Where, *, key: Key) -> memoryview:
        half = tensor_view(values).to(self.dtype).view(torch.int16).numpy()
        # Two reductions and no temporary array: +inf is the largest as signed, -inf the largest as unsigned.
        if len(half) and (half.max() >= self.infinity or half.view(np.uint16).max() >= self.infinity + 0x8000):
            at = int(np.argmax((half & 0x7FFF) >= self.infinity))
            raise NumericError(
                f"a value of {values[at]:g} in tensor {where.name_of(at)!r} does not fit {self.label}, which ends at "
                f"{self.end} or lower trainer.lr"
            )
        return half.view(np.uint8).data

    def decode(self, data: memoryview, where: Where) -> np.ndarray:
        _expect_length(self.label, data, self.num_bytes(where))
        widened: np.ndarray = tensor_view(np.frombuffer(data, np.int16)).view(self.dtype).float().numpy()
        return widened


@final
@dataclass(frozen=True, kw_only=True)
class Float16(_Half):
    """IEEE half precision, rounded to nearest even: two bytes a value.

    Holds magnitudes up to 65,504, at full precision from 6.1e-5; a NumericError names what is too large.
    """

    label = "float16"
    dtype = torch.float16
    infinity = 0x7C00
    end = "65504; use wire=float32, wire=bfloat16"


@final
@dataclass(frozen=True, kw_only=True)
class BFloat16(_Half):
    """The upper half of a float32, rounded to nearest even: two bytes a value.

    The range of float32 at 8 bits of precision. A NumericError names a value that would round to infinity (from
    3.396e38 on).
    """

    label = "bfloat16"
    dtype = torch.bfloat16
    infinity = 0x7F80
    end = "3.3895e38; use wire=float32"


# -- whole multiples of a step -----------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Signed integers times a step that a group of values shares; symmetric, so zero stays zero.

    step = max|x| / (2^(bits-1) - 1) of the group, as float32, rounded up so that the largest value still fits;
    q = round(x / step), written as q + 2^(bits-1) - 1 in `bits` bits, one after the other. 4 bytes a group of which
    anything is sent and ceil(n bits / 8) bytes. Rounding to nearest is off by half a step at most, and biased;
    stochastic rounding (up with the probability of the fraction that is left) is off by less than a step, and right
    on average. To this comes the rounding of the decoded value to float32, which is felt above about 10 bits.

    bits:     of a value, 2 to 16.
    level:    what shares a step: "tensor", or "channel" (a slice along the first dimension).
    rounding: "nearest" or "stochastic".
    """

    bits: int = 8
    level: Level = "tensor"
    rounding: Rounding = "nearest"

    lossy = True
    changes_only = False

    def __post_init__(self) -> None:
        refuse(not 2 <= self.bits <= 16, "bits", self.bits, "it is 2 to 16 bits a value; choose float32 for more")
        _refuse_level(self.level)
        ways = ("nearest", "stochastic")
        refuse(self.rounding not in ways, "rounding", self.rounding, f"choose {' or '.join(ways)}")

    @property
    def label(self) -> str:
        return f"int{self.bits}{'~' if self.rounding == 'stochastic' else ''}{_suffix(self.level)}"

    @property
    def _most(self) -> int:
        """The largest q."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def _largest_step(self) -> float:
        """The step beyond which the largest q would stand for infinity."""
        return float(np.nextafter(np.float32(LARGEST / self._most), np.float32(0)))

    def num_bytes(self, where: Where) -> int:
        return 4 * len(_groups(where, self.level)[0]) + _packed_size(where.size, self.bits)

    def encode(self, values: np.ndarray, where: Where, *, key: Key) -> bytes:
        starts, lengths = _groups(where, self.level)
        exact = np.maximum.reduceat(np.abs(values), starts).astype(np.float64) / self._most
        steps = np.minimum(_round_up(exact), np.float32(self._largest_step))
        scaled = values / np.repeat(_or_one(steps), lengths)
        whole = np.rint(scaled, out=scaled) if self.rounding == "nearest" else _round_randomly(scaled, key)
        # Only next to the end of float32 may a step be a hair too small.
        np.clip(whole, -self._most, self._most, out=whole)
        whole += self._most
        return b"".join([steps.tobytes(), _pack(whole.astype(_code_type(self.bits)), self.bits)])

    def decode(self, data: memoryview, where: Where) -> np.ndarray:
        lengths = _groups(where, self.level)[1]
        steps, rest = _read_scales(self.label, data, len(lengths), self.num_bytes(where), self._largest_step)
        codes = _unpack(rest, self.bits, where.size)
        expect(not len(codes) or int(codes.max()) <= 2 * self._most, f"{self.label} has a value beyond its range")
        values = codes.astype(np.float32)
        values -= self._most
        values *= np.repeat(steps, lengths)
        return values


@final
@dataclass(frozen=True, kw_only=True)
class QSGD:
    """Stochastic levels between zero and the norm of a bucket, and signs; right on average.

    Alistarh et al. 2017, "QSGD", section 3.1: x_i is sent as ||x|| sign(x_i) xi_i / s, where xi_i is
    floor(s |x_i| / ||x||) or, with the probability of the fraction that is left, one more. For the Euclidean norm and
    buckets of b values, E ||sent - x||^2 <= min(b / s^2, sqrt(b) / s) ||x||^2 (lemma 3.1). Deviation: levels have a
    fixed width, where the paper's are Elias-coded (a Squeeze takes a part of what that saves). 4 bytes a bucket and
    1 + ceil(log2(s + 1)) bits a value, packed.

    levels: s, 1 to 32,767.
    bucket: how many consecutive values, as they are sent, share a norm; null for one norm a tensor.
    norm:   "l2" as in the paper, or "max", which has less variance and fewer zeros.
    """

    levels: int = 127
    bucket: int | None = 512
    norm: Norm = "l2"

    lossy = True
    changes_only = False

    def __post_init__(self) -> None:
        refuse(not 1 <= self.levels <= 32767, "levels", self.levels, "it is 1 to 32767; 127 makes a byte of each value")
        short = self.bucket is not None and self.bucket < 1
        refuse(short, "bucket", self.bucket, "it is a number of values, at least 1, or null for one bucket a tensor")
        refuse(self.norm not in ("l2", "max"), "norm", self.norm, "choose l2 or max")

    @property
    def label(self) -> str:
        return f"qsgd:{self.levels}/{self.bucket or 'tensor'}{'/max' if self.norm == 'max' else ''}"

    @property
    def bits(self) -> float:
        return float(self._width)

    @property
    def _width(self) -> int:
        return 1 + self.levels.bit_length()  # 1 + ceil(log2(levels + 1))

    def _buckets(self, where: Where) -> tuple[np.ndarray, np.ndarray]:
        if self.bucket is None:
            return _groups(where, "tensor")
        starts = np.arange(0, where.size, self.bucket)
        return starts, np.diff(starts, append=where.size)

    def num_bytes(self, where: Where) -> int:
        return 4 * len(self._buckets(where)[0]) + _packed_size(where.size, self._width)

    def encode(self, values: np.ndarray, where: Where, *, key: Key) -> bytes:
        """Raises NumericError where a norm does not fit float32."""
        starts, lengths = self._buckets(where)
        # Rounded up, a norm is no less than the largest value, and no level exceeds s.
        norms = _round_up(self._norms(values, starts))
        if not np.isfinite(norms).all():
            name = where.name_of(int(starts[np.argmax(~np.isfinite(norms))]))
            raise NumericError(
                f"the norm of values in tensor {name!r} does not fit float32; use norm=max or lower trainer.lr"
            )
        scaled = np.abs(values)
        scaled /= np.repeat(_or_one(norms), lengths)
        scaled *= self.levels
        codes = _round_randomly(scaled, key).astype(_code_type(self._width))
        codes |= (values < 0).astype(codes.dtype) << (self._width - 1)
        return b"".join([norms.tobytes(), _pack(codes, self._width)])

    def decode(self, data: memoryview, where: Where) -> np.ndarray:
        lengths = self._buckets(where)[1]
        norms, rest = _read_scales(self.label, data, len(lengths), self.num_bytes(where), LARGEST)
        codes = _unpack(rest, self._width, where.size)
        sign = 1 << (self._width - 1)
        reached = codes & (sign - 1)
        expect(not len(codes) or int(reached.max()) <= self.levels, f"{self.label} has a value beyond its levels")
        values = reached.astype(np.float32)
        values /= self.levels
        values *= np.repeat(norms, lengths)
        float_bits = values.view(np.uint32)
        float_bits |= (codes >= sign).astype(np.uint32) << 31
        return values

    def _norms(self, values: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """float64, one a bucket."""
        if self.norm == "max":
            return np.maximum.reduceat(np.abs(values), starts).astype(np.float64)
        return np.sqrt(np.add.reduceat(np.multiply(values, values, dtype=np.float64), starts))


# -- signs -----------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, kw_only=True)
class Sign:
    """The sign of each value: one bit. A zero is plus or minus at random: always plus would push what stands still.

    Bernstein et al. 2018, "signSGD", algorithm 1. Both ends know the step, so nothing else is written:
    ceil(n / 8) bytes.

    step: the magnitude that a sign stands for.
    """

    step: float = 1.0

    lossy = True
    changes_only = True
    bits = 1.0

    @property
    def label(self) -> str:
        return f"sign:{self.step:g}"

    def __post_init__(self) -> None:
        refuse(not 1e-37 <= self.step <= 1e38, "step", self.step, "it is a positive magnitude, 1e-37 to 1e38; try 1.0")

    def num_bytes(self, where: Where) -> int:
        return _packed_size(where.size, 1)

    def encode(self, values: np.ndarray, where: Where, *, key: Key) -> bytes:
        return _sign_bits(values, key)

    def decode(self, data: memoryview, where: Where) -> np.ndarray:
        _expect_length(self.label, data, self.num_bytes(where))
        values = _signs(data, where.size)
        values *= np.float32(self.step)
        return values


@final
@dataclass(frozen=True, kw_only=True)
class ScaledSign:
    """The sign of each value, times the mean magnitude of its group. A zero is plus or minus at random.

    Karimireddy et al. 2019, "Error feedback fixes signSGD", algorithm 1 (EF-signSGD; here by tensor or channel). On
    what TopK keeps it is the ternary code of Sattler et al. 2019, "Robust and communication-efficient federated
    learning from non-i.i.d. data" (see `transforms.stc`). 4 bytes a group of which anything is sent and ceil(n / 8)
    bytes.

    level: what shares a magnitude: "tensor", or "channel" (a slice along the first dimension).
    """

    level: Level = "tensor"

    lossy = True
    changes_only = True
    bits = 1.0

    def __post_init__(self) -> None:
        _refuse_level(self.level)

    @property
    def label(self) -> str:
        return f"scaled_sign{_suffix(self.level)}"

    def num_bytes(self, where: Where) -> int:
        return 4 * len(_groups(where, self.level)[0]) + _packed_size(where.size, 1)

    def encode(self, values: np.ndarray, where: Where, *, key: Key) -> bytes:
        starts, lengths = _groups(where, self.level)
        means = np.add.reduceat(np.abs(values), starts, dtype=np.float64) / lengths
        return b"".join([means.astype(np.float32).tobytes(), _sign_bits(values, key)])

    def decode(self, data: memoryview, where: Where) -> np.ndarray:
        lengths = _groups(where, self.level)[1]
        means, rest = _read_scales(self.label, data, len(lengths), self.num_bytes(where), LARGEST)
        values = _signs(rest, where.size)
        values *= np.repeat(means, lengths)
        return values


def _sign_bits(values: np.ndarray, key: Key) -> bytes:
    """A bit that is set for each negative value and for half of the zeros, the first in the lowest bit."""
    minus = values < 0
    if np.count_nonzero(values) < len(values):
        zeros = np.flatnonzero(values == 0)
        minus[zeros] = key.numpy().random(len(zeros), dtype=np.float32) < 0.5
    return np.packbits(minus, bitorder="little").tobytes()


def _signs(data: memoryview, count: int) -> np.ndarray:
    """ceil(count / 8) bytes to float32 (count,) of 1.0 and -1.0, which the caller may write into."""
    _expect_filled(data, count)
    return _SIGNS.take(np.frombuffer(data, np.uint8), axis=0).reshape(-1)[:count]


# -- scales ----------------------------------------------------------------------------------------------------------


def _groups(where: Where, level: Level) -> tuple[np.ndarray, np.ndarray]:
    """Where each group that is not empty begins, and how many values it has; they follow one another."""
    bounds = where.bounds(level)
    lengths = np.diff(bounds)
    filled = lengths > 0
    return bounds[:-1][filled], lengths[filled]


def _read_scales(
    label: str, data: memoryview, count: int, num_bytes: int, largest: float
) -> tuple[np.ndarray, memoryview]:
    """The float32 scales that data begins with, and the rest. Raises WireError unless all are within [0, largest]."""
    _expect_length(label, data, num_bytes)
    scales = np.frombuffer(data[: 4 * count], "<f4")
    # Comparisons with NaN are false, so it is refused as well.
    good = (scales >= 0) & (scales <= largest)
    if not good.all():
        expect(False, f"{label} has a scale of {scales[~good][0]:g}; it must be 0 to {largest:g}")
    return scales, data[4 * count :]


def _expect_length(label: str, data: memoryview, num_bytes: int) -> None:
    expect(len(data) == num_bytes, f"values as {label} have {len(data)} bytes; {num_bytes} were expected")


def _refuse_level(level: str) -> None:
    refuse(level not in ("tensor", "channel"), "level", level, "choose tensor or channel")


def _suffix(level: Level) -> str:
    return "" if level == "tensor" else f"/{level}"


def _or_one(scales: np.ndarray) -> np.ndarray:
    """What to divide by: a group of zeros has the scale 0."""
    return np.where(scales > 0, scales, np.float32(1))


def _round_up(exact: np.ndarray) -> np.ndarray:
    """float64 >= 0 to the next float32 that is no less: positive stays positive, also where float32 is subnormal."""
    with np.errstate(over="ignore"):
        near = exact.astype(np.float32)
        raised: np.ndarray = np.where(near < exact, np.nextafter(near, np.float32(np.inf)), near)
    return raised


def _round_randomly(scaled: np.ndarray, key: Key) -> np.ndarray:
    """To a whole number next to each value, which is the value itself on average (to 2^-24)."""
    whole: np.ndarray = np.floor(scaled)
    # The fraction is exact, where floor(scaled + u) would round the sum to more than its nearest whole numbers.
    whole += key.numpy().random(len(scaled), dtype=np.float32) < scaled - whole
    return whole


# -- packed integers -------------------------------------------------------------------------------------------------


def _packed_size(count: int, width: int) -> int:
    return (count * width + 7) // 8


def _expect_filled(data: memoryview, bits: int) -> None:
    """Raise WireError unless the bits that fill up the last byte are zeros: a value has one way to be written."""
    expect(bits % 8 == 0 or data[-1] >> bits % 8 == 0, "packed values are not filled up with zeros")


def _code_type(width: int) -> np.dtype:
    return np.dtype(np.uint8 if width <= 8 else np.uint16)


def _pack(codes: np.ndarray, width: int) -> bytes:
    """uint8 or uint16 (n,), all below 2^width, to ceil(n width / 8) bytes, the first code in the lowest bits.

    Codes of more than a byte are written as their low bytes, then what is above those, packed.
    """
    if width > 8:
        return codes.astype(np.uint8).tobytes() + _pack((codes >> 8).astype(np.uint8), width - 8)
    if width == 8:
        return codes.tobytes()
    padded = np.zeros(-(-len(codes) // 8) * 8, np.uint8)
    padded[: len(codes)] = codes
    words = padded.view("<u8")
    # Eight codes in eight bytes move together: two in each 16 bits, four in each 32, eight in 64.
    for lane, mask in _LANES:
        words = (words & mask) | ((words >> lane) & mask) << (lane // 8 * width)
    packed = words.view(np.uint8).reshape(-1, 8)[:, :width]
    return packed.tobytes()[: _packed_size(len(codes), width)]


def _unpack(data: memoryview, width: int, count: int) -> np.ndarray:
    """ceil(count width / 8) bytes to uint8 or uint16 (count,); may be a read-only view of the data."""
    if width > 8:
        codes = _unpack(data[count:], width - 8, count).astype(np.uint16) << 8
        codes |= np.frombuffer(data[:count], np.uint8)
        return codes
    if width == 8:
        return np.frombuffer(data, np.uint8)
    _expect_filled(data, count * width)
    packed = np.zeros(-(-count // 8) * width, np.uint8)
    packed[: len(data)] = np.frombuffer(data, np.uint8)
    padded = np.zeros((len(packed) // width, 8), np.uint8)
    padded[:, :width] = packed.reshape(-1, width)
    words = padded.reshape(-1).view("<u8")
    for lane, mask in reversed(_LANES):
        shift = lane // 8 * width
        low = mask // ((1 << lane) - 1) * ((1 << shift) - 1)  # the lowest `shift` bits of those lanes
        words = (words & low) | ((words >> shift) & low) << lane
    return words.view(np.uint8)[:count]
