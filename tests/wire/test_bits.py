"""Sets of positions: what was encoded comes back, sizes are those of the formulas, and no bytes break a decoder."""

import math
import struct
import sys
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.errors import ConfigError, WireError
from fedray.keys import Key
from fedray.wire import bits
from fedray.wire.bits import WAYS, decode_as, decode_positions, encode_as, encode_positions, entropy_bytes, way_of

SIZES = (0, 1, 2, 7, 8, 9, 1000, 100_000)
SHARES = (0.0, 1e-4, 0.01, 0.05, 0.3, 0.5, 0.7, 0.97, 1.0)
ANALYTIC = ("bitmap", "list", "rice")
ENTROPIES = ("none", "zstd", "ans")
ADMITTED = {"none": ANALYTIC, "zstd": (*ANALYTIC, "gaps", "bitmap_zstd"), "ans": WAYS}


def needs(name):
    if name == "ans":
        pytest.importorskip("constriction")


def drawn(size, share, seed=0):
    """round(share size) ascending positions, drawn without replacement."""
    random = Key.of(seed).fold("positions").numpy()
    return np.sort(random.choice(size, round(size * share), replace=False)).astype(np.int64)


def comes_back(back, positions):
    return back.dtype == np.int64 and np.array_equal(back, positions)


# -- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_each_way_gives_back_the_positions_and_has_the_bytes_of_its_formula(way):
    needs(way)
    for size in SIZES:
        for share in SHARES:
            positions = drawn(size, share)
            body = encode_as(way, positions, size)
            assert comes_back(decode_as(way, body, size), positions)
            formula = bits.sizes(positions, size)
            assert way in formula or way not in ANALYTIC
            assert len(body) == formula.get(way, len(body))


def test_bitmap_and_list_have_the_bytes_that_papers_count():
    for size in SIZES:
        width = max(1, math.ceil(math.log2(size))) if size > 1 else 1
        for share in SHARES:
            positions = drawn(size, share)
            assert len(encode_as("bitmap", positions, size)) == math.ceil(size / 8)
            assert len(encode_as("list", positions, size)) == math.ceil(len(positions) * width / 8)


@pytest.mark.parametrize("entropy", ENTROPIES)
def test_the_cheapest_way_that_is_admitted_is_taken_and_ties_go_to_the_lower_code(entropy):
    needs(entropy)
    for size in SIZES:
        for share in SHARES:
            positions = drawn(size, share, seed=1)
            data = encode_positions(positions, size, entropy=entropy)
            assert comes_back(decode_positions(data, size), positions)
            every = {way: 1 + len(encode_as(way, positions, size)) for way in ADMITTED[entropy]}
            assert way_of(data) == min(every, key=every.get)  # the order of a dict is that of the codes
            assert len(data) == every[way_of(data)]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    st.tuples(st.integers(0, 3000), st.binary(max_size=375)),
    st.sampled_from(("none", "zstd")),
    st.integers(0, 5000),
)
def test_any_set_comes_back_from_any_way(pattern, entropy, spread):
    size, noise = pattern
    positions = np.flatnonzero(np.unpackbits(np.frombuffer(noise, np.uint8))[:size])
    size += spread  # nothing at the end: gaps far above one byte
    data = encode_positions(positions, size, entropy=entropy)
    assert comes_back(decode_positions(data, size), positions)
    assert comes_back(decode_positions(memoryview(data), size), positions)
    for way in ADMITTED[entropy]:
        assert len(data) <= 1 + len(encode_as(way, positions, size)) or way in ("gaps", "bitmap_zstd")
        assert comes_back(decode_as(way, encode_as(way, positions, size), size), positions)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 700), st.binary(max_size=88))
def test_any_set_comes_back_from_ans(size, noise):
    pytest.importorskip("constriction")
    positions = np.flatnonzero(np.unpackbits(np.frombuffer(noise, np.uint8))[:size])
    assert comes_back(decode_as("ans", encode_as("ans", positions, size), size), positions)
    assert comes_back(decode_positions(encode_positions(positions, size, entropy="ans"), size), positions)


@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 509, 510, 511, 2000])
def test_gaps_around_the_escape_come_back(gap):
    for before in (0, 254, 255, 510):
        positions = np.array([before, before + gap + 1])
        assert comes_back(decode_as("gaps", encode_as("gaps", positions, 5000), 5000), positions)


def test_nothing_and_everything_cost_next_to_nothing():
    for size in (1, 1000, 100_000, 10_000_000):
        assert len(encode_positions(np.arange(0), size, entropy="zstd")) == 1
        assert len(encode_positions(np.arange(size), size, entropy="zstd")) <= 6
    assert encode_positions(np.arange(0), 0, entropy="zstd") == b"\0"


# -- sizes and choices -----------------------------------------------------------------------------------------------


def test_rice_codes_have_the_mean_length_of_the_formula():
    size = 100_000
    for share in (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.45):
        exponent = max(0, 1 + math.floor(math.log2(math.log((math.sqrt(5) - 1) / 2) / math.log(1 - share))))
        mean_bits = exponent + 1 / (1 - (1 - share) ** 2**exponent)
        for kept in (share, 1 - share):  # the rarer is coded
            lengths = [len(encode_as("rice", drawn(size, kept, seed), size)) for seed in range(4)]
            assert np.mean(lengths) == pytest.approx(size * share * mean_bits / 8 + 4, rel=0.02)


def test_list_and_bitmap_cross_where_a_position_costs_as_many_bits_as_it_saves():
    for size in (1000, 62_006, 100_000):
        crossing = 1 / math.ceil(math.log2(size))
        below, above = (bits.sizes(drawn(size, factor * crossing), size) for factor in (0.98, 1.02))
        assert below["list"] < below["bitmap"]
        assert above["list"] > above["bitmap"]


def test_rice_and_bitmap_cross_at_the_golden_ratio():
    size, crossing = 100_000, (3 - math.sqrt(5)) / 2  # 0.382, up to which the best parameter is above 0
    for factor, way in ((0.97, "rice"), (1.03, "bitmap")):
        for share in (factor * crossing, 1 - factor * crossing):
            assert way_of(encode_positions(drawn(size, share), size, entropy="none")) == way


@pytest.mark.parametrize("share", [0.05, 0.95])
def test_random_sets_come_close_to_their_entropy(share):
    size = 100_000
    for seed in range(5):
        positions = drawn(size, share, seed)
        least = -size * (share * math.log2(share) + (1 - share) * math.log2(1 - share)) / 8
        assert entropy_bytes(len(positions), size) == pytest.approx(least)
        assert least < len(encode_as("gaps", positions, size)) < 1.04 * least
        assert len(encode_positions(positions, size, entropy="none")) < 1.025 * least
    for other in (0.1, 0.2):
        assert len(encode_as("gaps", drawn(size, other), size)) < 1.04 * entropy_bytes(round(size * other), size)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.45, 0.95])
def test_ans_is_within_one_per_cent_of_the_entropy_and_taken_where_it_wins(share):
    pytest.importorskip("constriction")
    positions = drawn(100_000, share)
    data = encode_positions(positions, 100_000, entropy="ans")
    assert way_of(data) == "ans"
    assert 1 <= len(data) / entropy_bytes(len(positions), 100_000) < 1.01


def test_the_choice_goes_from_gaps_to_a_bitmap_and_back_as_the_set_fills():
    size = 1_000_000
    chosen = [way_of(encode_positions(drawn(size, share), size, entropy="zstd")) for share in (0.1, 0.42, 0.58, 0.9)]
    assert chosen == ["gaps", "bitmap", "bitmap", "gaps"]


def test_a_regular_set_goes_below_the_entropy_of_a_random_one():
    size = 100_000
    every_tenth = np.arange(0, size, 10)
    assert len(encode_positions(every_tenth, size, entropy="zstd")) < entropy_bytes(len(every_tenth), size) / 50
    half = np.arange(size // 2)
    assert len(encode_positions(half, size, entropy="zstd")) < 50


@pytest.mark.parametrize("pattern", [[True, False], [False, False, True, True]], ids=["every second", "2:4"])
def test_a_pattern_of_half_goes_below_its_bitmap(pattern):
    positions = np.flatnonzero(np.tile(pattern, 100_000 // len(pattern)))
    data = encode_positions(positions, 100_000, entropy="zstd")
    assert way_of(data) == "bitmap_zstd"
    assert len(data) < 100
    assert comes_back(decode_positions(data, 100_000), positions)


def test_two_of_every_four_cost_about_their_own_entropy():
    """Six patterns of four: log2(6) / 4 = 0.65 bits a coordinate, where a random half costs one."""
    six = np.array([[a, b, c, d] for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1) if a + b + c + d == 2])
    kept = six[Key.of(1).numpy().integers(0, 6, 25_000)].reshape(-1).astype(np.bool_)
    data = encode_positions(np.flatnonzero(kept), 100_000, entropy="zstd")
    assert way_of(data) == "bitmap_zstd"
    assert len(data) < 1.05 * 100_000 * np.log2(6) / 4 / 8
    assert len(encode_positions(np.flatnonzero(kept), 100_000, entropy="none")) == 1 + 12_500


def test_zstandard_and_ans_are_not_run_where_they_cannot_win(monkeypatch):
    def refuse(positions, size):
        raise AssertionError("was run")

    pytest.importorskip("constriction")
    monkeypatch.setattr(bits, "_ENCODERS", (*bits._ENCODERS[:3], refuse, refuse, *bits._ENCODERS[5:]))
    for share in (0.0, 0.5, 1.0):
        encode_positions(drawn(100_000, share), 100_000, entropy="ans")
    with pytest.raises(AssertionError, match="was run"):
        encode_positions(drawn(100_000, 0.1), 100_000, entropy="zstd")


def test_without_its_package_ans_is_refused_with_the_remedy(monkeypatch):
    positions = drawn(1000, 0.1)
    body = b"\0" + (100).to_bytes(2, "little") + b"\1\2\3\4"
    monkeypatch.setitem(sys.modules, "constriction", None)
    for entropy in ("none", "zstd"):
        assert comes_back(decode_positions(encode_positions(positions, 1000, entropy=entropy), 1000), positions)
    with pytest.raises(ConfigError, match=r"pip install fedray\[compress\]"):
        encode_positions(positions, 1000, entropy="ans")
    with pytest.raises(WireError, match=r"pip install fedray\[compress\]"):
        decode_as("ans", body, 1000)
    with pytest.raises(ConfigError, match="must be none, zstd or ans"):
        encode_positions(positions, 1000, entropy="lz4")


# -- bad bytes -------------------------------------------------------------------------------------------------------


def frame(written, **options):
    return b"\0" + zstandard.ZstdCompressor(level=1, **options).compress(bytes(written))


NINE = {
    "bitmap": encode_as("bitmap", np.array([0, 8]), 9),
    "list": encode_as("list", np.array([0, 8]), 9),
    "rice": encode_as("rice", np.array([0, 8]), 9),
    "gaps": encode_as("gaps", np.array([0, 8]), 9),
}
BAD = {
    "a bitmap with a bit behind its end": ("bitmap", b"\x80\x40"),
    "a list that does not ascend": ("list", b"\x32"),
    "a list that names a position twice": ("list", b"\x33"),
    "a list beyond the end": ("list", b"\x19"),
    "a list with a byte of nothing": ("list", NINE["list"] + b"\0"),
    "a list of more than there is": ("list", b"\x01\x23\x45\x67\x81\x11"),
    "Rice codes with no head": ("rice", b"\0"),
    "Rice codes of too many": ("rice", b"\0\x05\xff\xff"),
    "Rice codes of another parameter": ("rice", b"\x7f\x02\xff\xff"),
    "Rice codes of fewer than declared": ("rice", b"\0\x03\x0c"),
    "Rice codes that reach too far": ("rice", b"\x02\x02\x0f\xfc"),
    "Rice codes with bits behind their end": ("rice", NINE["rice"][:-1] + bytes([NINE["rice"][-1] | 1])),
    "Rice codes with a byte too many": ("rice", NINE["rice"] + b"\0"),
    "gaps of no kind": ("gaps", b"\x01" + NINE["gaps"][1:]),
    "gaps that are no frame": ("gaps", b"\0abcdef"),
    "gaps with bytes behind the frame": ("gaps", NINE["gaps"] + b"\0"),
    "gaps that do not say how many": ("gaps", frame([1, 2], write_content_size=False)),
    "gaps that reach too far": ("gaps", frame([8, 0])),
    "gaps without an end": ("gaps", frame([1, 255])),
    "a bomb of gaps": ("gaps", frame(bytes(10_000_000))),
}


@pytest.mark.parametrize("what", BAD)
def test_bytes_that_make_no_sense_are_refused(what):
    way, body = BAD[what]
    with pytest.raises(WireError):
        decode_as(way, body, 9)
    with pytest.raises(WireError):
        decode_positions(bytes([WAYS.index(way)]) + body, 9)


@pytest.mark.parametrize(
    ("way", "size", "body"),
    [
        ("list", 1000, b"\0\x41"),  # position 1 in ten bits, and a bit behind it
        ("list", 20, b"\x08\x86\0"),  # 1, 2, 3 in five bits each, and a byte of nothing
        ("rice", 200, b"\x40\1" + b"\xff" * 8 + b"\x80"),  # a remainder of 64 bits
        ("rice", 200, b"\0" + bytes([101]) + b"\xff" * 12 + b"\xf8"),  # more than the rarer half
    ],
)
def test_codes_that_are_not_those_of_an_encoder_are_refused(way, size, body):
    with pytest.raises(WireError):
        decode_as(way, body, size)


def test_bytes_of_ans_that_make_no_sense_are_refused():
    stream = pytest.importorskip("constriction").stream
    positions = drawn(1000, 0.1)
    body = encode_as("ans", positions, 1000)
    less, more = (body[:1] + count.to_bytes(2, "little") + body[3:] for count in (99, 101))
    zero, shifted = body[:3] + bytes(len(body) - 3), b"\1" + body[1:]
    ends = [body[:-1], body[:-4], body + b"\0\0\0\0", body + b"\1\0\0\0", body[:3]]
    ends += [body[:3] + struct.pack("<I", word << 20) + body[3:] for word in range(100)]  # read last, if at all
    coder, symbols = stream.stack.AnsCoder(), np.zeros(1000, np.int32)
    symbols[positions] = 1  # 100 of them, under a head and a model of 99
    coder.encode_reverse(symbols, stream.model.Bernoulli(0.099, perfect=False))
    denied = less[:3] + coder.get_compressed().astype("<u4").tobytes()
    beyond = body[:1] + (1001).to_bytes(2, "little") + body[3:]
    for bad in (*ends, less, more, zero, shifted, denied, beyond):
        with pytest.raises(WireError):
            decode_as("ans", bad, 1000)


def test_no_bytes_and_unknown_ways_are_refused():
    for data in (b"", b"\x05", b"\xff", memoryview(b"")):
        with pytest.raises(WireError):
            decode_positions(data, 10)
    for way in WAYS[1:]:
        if way != "list":  # whose empty body is no position
            with pytest.raises(WireError):
                decode_as(way, b"", 10)


@pytest.mark.parametrize("way", WAYS)
def test_what_a_decoder_allocates_is_bounded_by_the_size_and_the_input(way):
    needs(way)
    floods = [bytes([head]) + fill * 200_000 for head in (0, 0x80, 0x1F) for fill in (b"\0", b"\xff", b"\x55")]
    floods += [frame(bytes(50_000_000)), frame(bytes(50_000_000), write_content_size=False)]
    for body in floods:
        tracemalloc.start()
        try:
            with pytest.raises(WireError):
                decode_as(way, body, 50)
            assert tracemalloc.get_traced_memory()[1] < 4 * len(body) + 100_000
        finally:
            tracemalloc.stop()


def survives(data, size):
    """Decode; True for positions that are valid, False for a WireError. Anything else is the caller's failure."""
    try:
        positions = decode_positions(data, size)
    except WireError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is allowed here
        return False
    assert positions.dtype == np.int64
    assert not len(positions) or (positions[0] >= 0 and positions[-1] < size and (np.diff(positions) > 0).all())
    return True


def fuzz(count):
    """Random and mutated bytes; how many were refused and how many read."""
    random, outcomes = Key.of(0).fold("fuzz").numpy(), [0, 0]
    try:
        import constriction  # noqa: F401

        ways = WAYS
    except ImportError:
        ways = tuple(way for way in WAYS if way != "ans")
    good = []
    for size in (0, 1, 9, 300, 3000):
        for share in (0.0, 0.01, 0.2, 0.5, 0.9, 1.0):
            positions = drawn(size, share)
            good += [(bytes([WAYS.index(way)]) + encode_as(way, positions, size), size) for way in ways]
    for step in range(count):
        base, size = good[random.integers(len(good))]
        data = bytearray(base)
        kind = step % 6
        if kind == 0:
            data = bytearray(random.bytes(random.integers(0, 60)))
        elif kind == 1:
            data = data[:1] + random.bytes(random.integers(0, 60))
        elif kind == 2:
            del data[random.integers(len(data) + 1) :]
        elif kind == 3:
            data += random.bytes(random.integers(1, 9))
        else:
            for at in random.integers(0, min(len(data), 12 if kind == 4 else 1 << 20), random.integers(1, 4)).tolist():
                data[at] ^= 1 << random.integers(8)
        if step % 7 == 0:
            size = int(random.integers(0, 5000))
        outcomes[survives(bytes(data), size)] += 1
    return outcomes


def test_no_bytes_break_a_decoder():
    refused, read = fuzz(2000)
    assert min(refused, read) > 200


@pytest.mark.full
def test_no_bytes_break_a_decoder_in_the_long_run():
    fuzz(100_000)
