"""Laws of the writers, and of Zstd: sizes, rounding, bias, refusals."""

import math
import re

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedray.errors import ConfigError, NumericError, WireError
from fedray.keys import Key
from fedray.tree import Layout
from fedray.wire.squeeze import Zstd
from fedray.wire.values import Where
from fedray.wire.writers import QSGD, BFloat16, Float16, Float32, ScaledSign, Sign, Uniform

KEY = Key.of(11).fold("writer")
DRAWS = 10_000
laws = settings(max_examples=60, deadline=None, derandomize=True, database=None)

SCALED = (
    Uniform(),
    Uniform(bits=2),
    Uniform(bits=5, level="channel"),
    Uniform(bits=4, rounding="stochastic"),
    Uniform(bits=11),
    Uniform(bits=16, level="channel", rounding="stochastic"),
    QSGD(),
    QSGD(levels=1, bucket=3),
    QSGD(levels=5, bucket=None, norm="max"),
    QSGD(levels=1000, bucket=7),
    ScaledSign(),
    ScaledSign(level="channel"),
)
SHAPES = st.sampled_from([(), (0,), (1,), (7,), (3, 0), (1, 5), (4, 3), (2, 2, 3)])


def where_all(*shapes):
    return Where(Layout(tuple(f"t{number}" for number in range(len(shapes))), shapes))


@st.composite
def places(draw):
    """All coordinates of a few small tensors, or a subset of them, perhaps none."""
    where = where_all(*draw(st.lists(SHAPES, max_size=4)))
    if draw(st.booleans()):
        return where
    kept = draw(arrays.arrays(np.bool_, where.layout.size))
    return where.pick(np.flatnonzero(kept))


@st.composite
def cases(draw, largest=3e38):
    """Coordinates and finite values for them, which nobody may write into."""
    where = draw(places())
    largest = float(np.float32(largest))
    numbers = st.floats(-largest, largest, width=32) | st.floats(-1, 1, width=32) | st.sampled_from([0.0, -0.0, 1e-45])
    return where, frozen(draw(arrays.arrays(np.float32, where.size, elements=numbers)))


def frozen(values):
    values = np.asarray(values, np.float32)
    values.flags.writeable = False
    return values


def groups_of(where, level):
    """Indices of the values of each group that has any, found coordinate by coordinate."""
    owners, at = [], 0
    for number, shape in enumerate(where.layout.shapes):
        size = math.prod(shape)
        rows = shape[0] if level == "channel" and len(shape) > 1 else 1
        owners += [(number, index * rows // size) for index in range(size)]
        at += size
    if where.positions is not None:
        owners = [owners[position] for position in where.positions]
    return [[i for i, one in enumerate(owners) if one == owner] for owner in sorted(set(owners))]


def buckets_of(writer, where):
    if writer.bucket is None:
        return groups_of(where, "tensor")
    return [list(range(where.size))[at : at + writer.bucket] for at in range(0, where.size, writer.bucket)]


def written_formula(writer, where):
    n = where.size
    if isinstance(writer, QSGD):
        return 4 * len(buckets_of(writer, where)) + math.ceil(n * (1 + math.ceil(math.log2(writer.levels + 1))) / 8)
    scales = 4 * len(groups_of(where, writer.level)) if hasattr(writer, "level") else 0
    return scales + math.ceil(n * writer.bits / 8)


def there_and_back(writer, values, where, key=KEY):
    return writer.decode(memoryview(writer.encode(values, where, key=key)), where)


# -- what all of them keep -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", [Float32(), Float16(), BFloat16(), Sign(), *SCALED], ids=lambda one: one.label)
@settings(laws, max_examples=40)
@given(case=cases(largest=6e4))
def test_a_writer_gives_the_bytes_that_it_announces_and_reads_them(writer, case):
    where, values = case
    data = writer.encode(values, where, key=KEY)
    assert len(data) == writer.num_bytes(where) == written_formula(writer, where)
    assert bytes(data) == bytes(writer.encode(values.copy(), where, key=KEY))
    decoded = writer.decode(memoryview(data), where)
    assert decoded.dtype == np.float32
    assert decoded.shape == (where.size,)
    assert np.isfinite(decoded).all()
    # A part may begin anywhere in a payload.
    shifted = memoryview(b"x" + bytes(data) + b"y")[1:-1]
    assert writer.decode(shifted, where).tobytes() == decoded.tobytes()
    for wrong in (bytes(data) + b"\0", bytes(data)[:-1] if len(data) else b"\0\0"):
        with pytest.raises(WireError, match="bytes"):
            writer.decode(memoryview(wrong), where)


@pytest.mark.parametrize("writer", [Sign(), *SCALED], ids=lambda one: one.label)
@laws
@given(data=st.data())
def test_garbage_of_the_right_length_is_refused_or_finite(writer, data):
    where = data.draw(places())
    size = writer.num_bytes(where)
    garbage = memoryview(data.draw(st.binary(min_size=size, max_size=size)))
    try:
        decoded = writer.decode(garbage, where)
    except WireError:
        return
    assert np.isfinite(decoded).all()
    assert decoded.shape == (where.size,)


@pytest.mark.parametrize("writer", SCALED, ids=lambda one: one.label)
@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1.0])
def test_a_scale_that_cannot_be_is_refused(writer, scale):
    where = where_all((4, 3), (5,))
    data = bytearray(writer.encode(frozen(np.arange(17)), where, key=KEY))
    data[:4] = np.float32(scale).tobytes()
    with pytest.raises(WireError, match="has a scale of"):
        writer.decode(memoryview(data), where)


def test_codes_beyond_the_range_are_refused_and_so_is_what_fills_up_the_last_byte():
    where = where_all((3,))
    for writer in (Uniform(), Uniform(bits=5), Uniform(bits=12), QSGD(levels=5), QSGD(levels=1000)):
        ones = np.float32(1).tobytes() + b"\xff" * (writer.num_bytes(where) - 4)
        with pytest.raises(WireError, match=r"beyond its|not filled up"):
            writer.decode(memoryview(ones), where)
    step = np.float32(1).tobytes()
    with pytest.raises(WireError, match="int8 has a value beyond its range"):
        Uniform().decode(memoryview(step + b"\x00\x00\xff"), where)
    with pytest.raises(WireError, match="qsgd:5/512 has a value beyond its levels"):
        QSGD(levels=5).decode(memoryview(step + b"\x06\x00"), where)
    assert QSGD(levels=5).decode(memoryview(step + b"\x05\x00"), where).tolist() == [1.0, 0.0, 0.0]
    for writer, data in ((Sign(), b"\x08"), (ScaledSign(), step + b"\x80"), (Uniform(bits=5), step + b"\x00\x80")):
        with pytest.raises(WireError, match="not filled up with zeros"):
            writer.decode(memoryview(data), where)


def test_keys_decide_what_is_random_and_nothing_else():
    where = where_all((30, 20))
    values = frozen(np.random.default_rng(1).standard_normal(600))
    random = [Uniform(rounding="stochastic"), Uniform(bits=4, rounding="stochastic"), QSGD(), QSGD(levels=3)]
    for writer in [Float32(), Float16(), BFloat16(), Uniform(), Sign(), ScaledSign(), *random]:
        first, again, other = (bytes(writer.encode(values, where, key=Key.of(seed))) for seed in (1, 1, 2))
        assert first == again
        assert (first != other) == (writer in random), writer.label


@pytest.mark.parametrize(
    ("writer", "label", "lossy", "changes_only", "bits"),
    [
        (Float32(), "float32", False, False, 32),
        (Float16(), "float16", True, False, 16),
        (BFloat16(), "bfloat16", True, False, 16),
        (Uniform(), "int8", True, False, 8),
        (Uniform(bits=4, rounding="stochastic"), "int4~", True, False, 4),
        (Uniform(bits=5, level="channel"), "int5/channel", True, False, 5),
        (QSGD(), "qsgd:127/512", True, False, 8),
        (QSGD(levels=128, bucket=None, norm="max"), "qsgd:128/tensor/max", True, False, 9),
        (Sign(step=0.1), "sign:0.1", True, True, 1),
        (ScaledSign(), "scaled_sign", True, True, 1),
        (ScaledSign(level="channel"), "scaled_sign/channel", True, True, 1),
        (Zstd(), "zstd:3", False, False, None),
    ],
    ids=lambda one: getattr(one, "label", None),
)
def test_labels_and_what_a_chain_needs_to_know(writer, label, lossy, changes_only, bits):
    assert (writer.label, writer.lossy, writer.changes_only) == (label, lossy, changes_only)
    assert getattr(writer, "bits", None) == bits


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Uniform(bits=1), "bits"),
        (lambda: Uniform(bits=17), "bits"),
        (lambda: Uniform(level="row"), "level"),
        (lambda: Uniform(rounding="up"), "rounding"),
        (lambda: QSGD(levels=0), "levels"),
        (lambda: QSGD(levels=32768), "levels"),
        (lambda: QSGD(bucket=0), "bucket"),
        (lambda: QSGD(norm="l1"), "norm"),
        (lambda: Sign(step=0.0), "step"),
        (lambda: Sign(step=float("nan")), "step"),
        (lambda: Sign(step=1e39), "step"),
        (lambda: ScaledSign(level="row"), "level"),
        (lambda: Zstd(level=0), "level"),
        (lambda: Zstd(level=23), "level"),
    ],
)
def test_hyper_parameters_that_cannot_be_are_refused(make, name):
    with pytest.raises(ConfigError, match=rf"^{name} is .+; "):
        make()


# -- floats ----------------------------------------------------------------------------------------------------------


@laws
@given(bits=arrays.arrays(np.uint32, st.integers(0, 40)))
def test_float32_keeps_every_finite_bit_pattern(bits):
    values = bits.view(np.float32)
    values = frozen(values[np.isfinite(values)])
    where = where_all((len(values),))
    assert there_and_back(Float32(), values, where).tobytes() == values.tobytes()


def test_float32_copies_nothing():
    values, where = frozen(np.arange(1000)), where_all((1000,))
    data = Float32().encode(values, where, key=KEY)
    assert np.shares_memory(np.frombuffer(data, np.float32), values)
    assert np.shares_memory(Float32().decode(data, where), values)


def bfloat16_bits(values):
    """Round to nearest even by integer arithmetic."""
    bits = values.view(np.uint32).astype(np.uint64)
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


@laws
@given(bits=arrays.arrays(np.uint32, st.integers(0, 40)))
def test_half_precision_is_that_of_numpy_and_torch_and_integer_arithmetic(bits):
    values = bits.view(np.float32)
    small = frozen(values[np.abs(values) < 65519.99])
    where = where_all((len(small),))
    data = Float16().encode(small, where, key=KEY)
    assert bytes(data) == small.astype("<f2").tobytes()
    assert Float16().decode(data, where).tobytes() == torch.tensor(small).half().float().numpy().tobytes()
    large = frozen(values[np.abs(values) < 3.3961e38])
    where = where_all((len(large),))
    data = BFloat16().encode(large, where, key=KEY)
    assert bytes(data) == bfloat16_bits(large).astype("<u2").tobytes()
    assert BFloat16().decode(data, where).tobytes() == torch.tensor(large).bfloat16().float().numpy().tobytes()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("writer", "fits", "largest", "remedy"),
    [
        (Float16(), 65519.996, 65504.0, r"float16, which ends at 65504; use wire=float32, wire=bfloat16 or lower"),
        (
            BFloat16(),
            np.nextafter(np.float32(2.0**128 - 2.0**119), np.float32(0)),
            3.3895314e38,
            r"bfloat16, which ends at 3\.3895e38; use wire=float32 or lower",
        ),
    ],
)
def test_a_value_that_would_become_infinite_is_named(writer, fits, largest, remedy, sign):
    where = where_all((3,), (2, 2)).pick(np.array([0, 4, 5]))
    values = np.float32([1.0, sign * fits, 2.0])
    assert there_and_back(writer, values, where)[1] == np.float32(sign * largest)
    values[1] = np.nextafter(values[1], np.float32(sign * np.inf))
    named = re.escape(f"a value of {values[1]:g} in tensor 't1' does not fit ")
    with pytest.raises(NumericError, match=named + remedy):
        writer.encode(values, where, key=KEY)


# -- whole multiples of a step ---------------------------------------------------------------------------------------


def steps_of(writer, data, where):
    """The step of each value, as written."""
    groups = groups_of(where, writer.level)
    steps = np.zeros(where.size)
    for group, step in zip(groups, np.frombuffer(data, "<f4", len(groups)), strict=True):
        steps[group] = step
    return groups, steps


@pytest.mark.parametrize("level", ["tensor", "channel"])
@settings(laws, max_examples=150)
@given(case=cases(), bits=st.integers(2, 16))
def test_uniform_is_off_by_half_a_step_at_most(level, case, bits):
    where, values = case
    writer = Uniform(bits=bits, level=level)
    data = writer.encode(values, where, key=KEY)
    groups, steps = steps_of(writer, data, where)
    most = 2 ** (bits - 1) - 1
    exact = values.astype(np.float64)
    for group in groups:
        share = np.abs(exact[group]).max() / most
        assert share <= steps[group[0]] <= max(share * (1 + 2.0**-22), share + 1.5e-45)
    decoded = writer.decode(memoryview(data), where).astype(np.float64)
    ulp = np.spacing(np.abs(values)).astype(np.float64)
    assert (np.abs(decoded - exact) <= steps / 2 + ulp).all()
    assert (decoded[values == 0] == 0).all()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("bits", [2, 8, 9, 16])
def test_uniform_holds_the_ends_of_float32(bits, rounding):
    largest, smallest = np.finfo(np.float32).max, np.float32(1e-45)
    where = where_all((2,), (2,), (3,))
    values = frozen([largest, -largest, smallest, -smallest, 190 * smallest, -smallest, 0])
    writer = Uniform(bits=bits, rounding=rounding)
    data = writer.encode(values, where, key=KEY)
    decoded = writer.decode(memoryview(data), where).astype(np.float64)
    _, steps = steps_of(writer, data, where)
    assert (steps > 0).all()
    assert np.isfinite(decoded).all()
    np.testing.assert_allclose(decoded[:2], values[:2], rtol=1e-6)
    assert decoded[2:4].tolist() == values[2:4].tolist()
    assert (np.abs(decoded - values)[4:] <= steps[4:]).all()


def test_stochastic_rounding_does_not_go_beyond_the_largest_code():
    # Next to the end of float32 the step is a hair too small, so that about 1 in 250 would be rounded up.
    values, where = frozen(np.full(DRAWS, np.finfo(np.float32).max)), where_all((DRAWS,))
    decoded = there_and_back(Uniform(bits=16, rounding="stochastic"), values, where)
    np.testing.assert_allclose(decoded, values, rtol=1e-6)


@settings(laws, max_examples=120)
@given(case=cases(largest=1e3), bits=st.integers(2, 16))
def test_uniform_packs_each_code_into_its_bits(case, bits):
    where, values = case
    data = Uniform(bits=bits).encode(values, where, key=KEY)
    groups, steps = steps_of(Uniform(), data, where)
    most = 2 ** (bits - 1) - 1
    ratios = np.divide(values, steps.astype(np.float32), out=np.zeros_like(values), where=steps > 0)
    codes = [round(float(ratio)) + most for ratio in ratios]
    body = data[4 * len(groups) :]
    low, planes = min(bits, 8), []
    if bits > 8:
        planes, body = list(body[: where.size]), body[where.size :]
        low = bits - 8
    stream = int.from_bytes(body, "little")
    upper = [stream >> (low * at) & (2**low - 1) for at in range(where.size)]
    assert codes == ([high * 256 + byte for high, byte in zip(upper, planes, strict=True)] if planes else upper)


def test_int8_and_int4_byte_for_byte():
    where, values = where_all((5,)), frozen([7, -7, 3, 0, -1])
    assert Uniform(bits=4).encode(values, where, key=KEY) == np.float32(1).tobytes() + bytes([0x0E, 0x7A, 0x06])
    values = frozen([127, -127, 3, 0, -1])
    assert Uniform().encode(values, where, key=KEY) == np.float32(1).tobytes() + bytes([254, 0, 130, 127, 126])


def test_groups_of_zeros_and_groups_that_are_not_sent():
    where = where_all((2, 3), (4,), (0,)).pick(np.array([0, 1, 2, 3]))  # both channels of t0, nothing of t1
    values = frozen([0, 0, -0.0, 5])
    for writer in (Uniform(), QSGD(bucket=None), ScaledSign()):
        assert writer.num_bytes(where) == 4 + math.ceil(4 * writer.bits / 8)
    for writer in (Uniform(level="channel"), ScaledSign(level="channel")):
        assert writer.num_bytes(where) == 8 + math.ceil(4 * writer.bits / 8)
        assert there_and_back(writer, values, where).tolist() == pytest.approx([0, 0, 0, 5], rel=2e-7)


def unbiased(decoded, values, chances, unit):
    """Whether means over DRAWS rows are within 4 sigma of `values`, for values a `unit` apart at these chances."""
    sigma = unit * np.sqrt(chances * (1 - chances) / DRAWS)
    error = np.abs(decoded.reshape(DRAWS, -1).astype(np.float64).mean(axis=0) - values)
    return error <= 4 * sigma + 1e-6 * np.abs(values).max()


VALUES = np.float32([1.0, -0.83, 0.31, -0.049, 0.0071, 0.0, -1e-4, 0.5])


@pytest.mark.parametrize("bits", [2, 4, 8, 11])
def test_stochastic_rounding_is_right_on_average_and_off_by_less_than_a_step(bits):
    where = where_all((DRAWS, len(VALUES)))
    writer = Uniform(bits=bits, rounding="stochastic")
    decoded = there_and_back(writer, frozen(np.tile(VALUES, DRAWS)), where)
    step = 1 / (2 ** (bits - 1) - 1)
    chances = np.abs(VALUES) / step % 1
    assert unbiased(decoded, VALUES, chances, step).all()
    assert (np.abs(decoded.reshape(DRAWS, -1) - VALUES) < step * (1 + 1e-5)).all()
    nearest = there_and_back(Uniform(bits=bits), frozen(np.tile(VALUES, DRAWS)), where)
    assert not unbiased(nearest, VALUES, chances, step).all()


@pytest.mark.parametrize(("levels", "norm"), [(1, "l2"), (4, "l2"), (127, "l2"), (5, "max"), (300, "l2")])
def test_qsgd_is_right_on_average_within_the_variance_of_the_paper(levels, norm):
    size = len(VALUES)
    writer = QSGD(levels=levels, bucket=size, norm=norm)
    decoded = there_and_back(writer, frozen(np.tile(VALUES, DRAWS)), where_all((DRAWS, size)))
    length = np.sqrt((VALUES.astype(np.float64) ** 2).sum())
    unit = (length if norm == "l2" else 1.0) / levels
    chances = np.abs(VALUES) / unit % 1
    assert unbiased(decoded, VALUES, chances, unit).all()
    # Each value is a level of the bucket.
    ratios = decoded.astype(np.float64) / unit
    np.testing.assert_allclose(ratios, np.rint(ratios), atol=1e-4)
    assert np.abs(np.rint(ratios)).max() <= levels
    variance = ((decoded.reshape(DRAWS, size) - VALUES.astype(np.float64)) ** 2).sum(axis=1).mean()
    assert variance == pytest.approx((chances * (1 - chances)).sum() * unit**2, rel=0.06)
    assert norm == "max" or variance <= min(size / levels**2, math.sqrt(size) / levels) * length**2


@laws
@given(case=cases(largest=1e37), levels=st.integers(1, 600), bucket=st.sampled_from([None, 1, 2, 5]))
def test_qsgd_takes_the_next_level_below_or_above(case, levels, bucket):
    where, values = case
    writer = QSGD(levels=levels, bucket=bucket)
    decoded = there_and_back(writer, values, where).astype(np.float64)
    for group in buckets_of(writer, where):
        exact = values[group].astype(np.float64)
        norm = np.linalg.norm(exact)
        assert (np.abs(decoded[group] - exact) <= norm / levels * (1 + 1e-3) + 3e-45).all()
        assert ((decoded[group] * exact >= 0) | (exact == 0)).all()
        if len(group) == 1:
            assert decoded[group].tolist() == exact.tolist()


def test_a_norm_beyond_float32_is_refused_and_max_holds_it():
    where, values = where_all((2,), (3,)), frozen([1, 2, 3e38, -3e38, 0])
    with pytest.raises(NumericError, match=r"the norm of values in tensor 't1' does not fit float32; use norm=max"):
        QSGD(bucket=None).encode(values, where, key=KEY)
    np.testing.assert_allclose(there_and_back(QSGD(norm="max"), values, where)[2:], values[2:])


# -- signs -----------------------------------------------------------------------------------------------------------


@laws
@given(case=cases())
def test_a_sign_is_decoded_to_the_step(case):
    where, values = case
    decoded = there_and_back(Sign(), values, where)
    assert decoded[values != 0].tolist() == np.sign(values[values != 0]).tolist()
    assert set(there_and_back(Sign(step=0.25), values, where).tolist()) <= {0.25, -0.25}
    assert Sign().encode(frozen([1, -1, 3, 1e-45, -2]), where_all((5,)), key=KEY) == bytes([0b10010])


@pytest.mark.parametrize("writer", [Sign(step=0.5), ScaledSign()])
def test_zeros_are_plus_and_minus_alike_so_that_what_stands_still_is_not_pushed(writer):
    where, values = where_all((10_001,)), np.zeros(10_001, np.float32)
    values[0] = 10_001.0
    values.flags.writeable = False
    decoded = there_and_back(writer, values, where)[1:]
    assert abs(float(np.sign(decoded).sum())) < 4 * np.sqrt(10_000)  # within 4 sigma
    other = writer.decode(memoryview(writer.encode(values, where, key=KEY.fold("other"))), where)[1:]
    assert (other != decoded).any()


@pytest.mark.parametrize("level", ["tensor", "channel"])
@laws
@given(case=cases())
def test_scaled_sign_is_the_mean_magnitude_of_the_group(level, case):
    where, values = case
    decoded = there_and_back(ScaledSign(level=level), values, where)
    expected = np.zeros(where.size, np.float32)
    for group in groups_of(where, level):
        mean = np.float32(math.fsum(abs(float(values[i])) for i in group) / len(group))
        expected[group] = [-mean if values[i] < 0 else mean for i in group]
    zeros = values == 0  # of either sign
    np.testing.assert_allclose(decoded[~zeros], expected[~zeros], rtol=2e-7, atol=1e-45)
    np.testing.assert_allclose(np.abs(decoded), np.abs(expected), rtol=2e-7, atol=1e-45)


# -- zstd ------------------------------------------------------------------------------------------------------------


@laws
@given(data=st.binary(max_size=300), level=st.sampled_from([1, 3, 19]))
def test_zstd_gives_back_what_it_took(data, level):
    squeezed = Zstd(level=level).encode(memoryview(data))
    assert Zstd().decode(memoryview(squeezed), len(data)) == data
    for wrong in (len(data) + 1, len(data) - 1):
        with pytest.raises(WireError, match=rf"declares {len(data)} bytes; {wrong} were expected"):
            Zstd().decode(memoryview(squeezed), wrong)


def test_zstd_makes_runs_of_zeros_small():
    assert len(Zstd().encode(bytes(100_000))) < 100


def test_a_frame_that_declares_too_much_is_refused_before_it_is_allocated():
    header = bytes.fromhex("28b52ffd e0") + (1 << 50).to_bytes(8, "little")
    with pytest.raises(WireError, match=f"declares {1 << 50} bytes; 10 were expected"):
        Zstd().decode(memoryview(header + bytes(20)), 10)


def test_what_is_no_single_whole_frame_is_refused():
    data = bytes(range(200))
    frame = Zstd().encode(data)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(data)
    for wrong in (b"", b"nothing of the kind", frame[:-3], frame[:6], frame + b"\0", frame + frame, unsized):
        with pytest.raises(WireError, match="zstd"):
            Zstd().decode(memoryview(wrong), len(data))
    for at in range(len(frame)):
        broken = bytearray(frame)
        broken[at] ^= 0x55
        try:
            assert len(Zstd().decode(memoryview(broken), len(data))) == len(data)
        except WireError:
            pass
