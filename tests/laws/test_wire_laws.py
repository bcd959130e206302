"""Every byte is a real byte, and what was encoded is what is decoded."""

import itertools
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.errors import NumericError, WireError
from fedray.keys import Key
from fedray.prune.select import random_mask
from fedray.round import Message, Part, PartSpec
from fedray.tree import Layout, Mask, Tree, equal, restrict
from fedray.wire import Codec, Float16, Float32
from fedray.wire.masks import BITMAP, GAPS, KNOWN, SEED, MaskCoder, decode_gaps, encode_bitmap, encode_gaps

PARAMS = Layout(("fc.weight", "fc.bias", "out.weight"), ((10, 20), (10,), (3, 10)))
BUFFERS = Layout(("norm.mean", "norm.var"), ((5,), (5,)))
PRUNABLE = ("fc.weight", "out.weight")
SPECS = {
    "params": PartSpec(layout=PARAMS, direction="down"),
    "buffers": PartSpec(layout=BUFFERS, direction="both"),
    "delta": PartSpec(layout=PARAMS, direction="up"),
}
STAGES = {"float32": (Float32(), 4), "float16": (Float16(), 2)}
FRAME_BYTES, PART_BYTES = 12, 20


def codec(stage="float32"):
    return Codec(SPECS, PARAMS, PRUNABLE, down=STAGES[stage][0], up=STAGES[stage][0])


def draw(*names, layout=PARAMS):
    return Tree(layout, torch.randn(layout.size, generator=Key.of(0).fold(*names).torch()))


def mask_of(seed, share=0.5):
    flat = torch.rand(PARAMS.size, generator=Key.of(seed).torch()) < share
    flat[PARAMS.spans["fc.bias"]] = True
    return Mask(PARAMS, flat)


def drawn_mask(seed=0, counts=(40, 6)):
    return random_mask(PARAMS, PRUNABLE, dict(zip(PRUNABLE, counts, strict=True)), Key.of(seed))


def none_of_it():
    return Mask.of(PARAMS, {name: torch.zeros(PARAMS.shape(name), dtype=torch.bool) for name in PRUNABLE})


def upload(mask, *, support="mask", with_buffers=True, values=None, weight=37.0):
    """A client's answer; support: its message's mask, all coordinates, or a mask of its own."""
    kept = {"mask": mask, "all": None, "own": mask_of(99, 0.3)}[support]
    value = restrict(draw("delta") if values is None else values, kept)
    message = Message(mask=mask).put("delta", Part(value=value, weight=weight, support=kept))
    if with_buffers:
        message = message.put("buffers", Part(value=draw("buffers", layout=BUFFERS), weight=weight))
    return message


def there_and_back(message, known, stage="float32", direction="up"):
    packet = codec(stage).encode(message, direction=direction, known=known)
    return packet, codec(stage).decode(packet.payload, direction=direction, known=known)


def halved(tree):
    return Tree(tree.layout, tree.flat.half().float())


MASKS = {
    "dense": None,
    "bitmap": mask_of(1),
    "gaps": mask_of(2, 0.02),
    "seed": drawn_mask(counts=(90, 12)),
    "full": Mask.full(PARAMS),
    "empty": none_of_it(),
}
CASES = [
    (mask, known, support, buffers, stage)
    for mask, known, support, buffers, stage in itertools.product(
        MASKS, ("nothing", "same", "another"), ("mask", "all", "own"), (True, False), STAGES
    )
    if not (mask == "dense" and known == "same")
]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mask", MASKS)
def test_decoding_gives_back_what_was_encoded(mask, stage):
    for kind, known, support, buffers, coder in CASES:
        if (kind, coder) != (mask, stage):
            continue
        held = {"nothing": None, "same": MASKS[mask], "another": mask_of(50)}[known]
        message = upload(MASKS[mask], support=support, with_buffers=buffers)
        packet, back = there_and_back(message, held, stage)
        assert list(back.parts) == list(message.parts)
        assert back.mask == message.mask
        for name, part in message.parts.items():
            expected = part.value if stage == "float32" else halved(part.value)
            assert equal(back[name], expected)
            assert back.parts[name].weight == part.weight
            assert back.parts[name].support == part.support
        assert len(packet.payload) == sum(size.total_bytes for size in packet.sizes)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    kept=st.lists(st.booleans(), min_size=230, max_size=230),
    own=st.none() | st.integers(0, 5),
    pattern=st.binary(min_size=240 * 4, max_size=240 * 4),
    weight=st.floats(allow_nan=False, min_value=1e-300),
    known=st.none() | st.integers(0, 3),
)
def test_float32_keeps_every_bit_pattern_and_every_mask(kept, own, pattern, weight, known):
    flat = torch.ones(PARAMS.size, dtype=torch.bool)
    flat[:200], flat[210:] = torch.tensor(kept[:200]), torch.tensor(kept[200:])
    mask = Mask(PARAMS, flat)
    support = mask if own is None else mask_of(own, own / 5)
    value = restrict(Tree(PARAMS, torch.from_numpy(np.frombuffer(pattern, np.float32).copy())), support)
    message = Message(mask=mask).put("delta", Part(value=value, weight=weight, support=support))
    packet, back = there_and_back(message, None if known is None else mask_of(known))
    assert equal(back["delta"], value)
    assert (back.mask, back.parts["delta"].support, back.parts["delta"].weight) == (mask, support, weight)
    assert len(packet.payload) == sum(size.total_bytes for size in packet.sizes)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.booleans(), max_size=3000) | st.tuples(st.integers(0, 5000), st.sets(st.integers(0, 4999), max_size=9))
)
def test_gaps_give_back_any_mask(drawn):
    if isinstance(drawn, tuple):  # few kept, far apart: gaps above one byte
        size, places = drawn
        kept = np.zeros(size, np.bool_)
        kept[[p for p in places if p < size]] = True
    else:
        kept = np.array(drawn, np.bool_)
    for one in (kept, ~kept):
        assert np.array_equal(decode_gaps(encode_gaps(one), len(one)), one)


@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 509, 510, 511, 2000])
def test_gaps_around_the_escape_come_back(gap):
    for before in (0, 254, 255, 510):
        kept = np.zeros(before + gap + 2, np.bool_)
        kept[before], kept[before + gap + 1] = True, True
        kept = np.concatenate([kept, np.zeros(len(kept), np.bool_)])
        assert np.array_equal(decode_gaps(encode_gaps(kept), len(kept)), kept)


@pytest.mark.parametrize("kept", [[True], [False], [True, False], []], ids=str)
def test_a_mask_of_one_coordinate_or_none_comes_back(kept):
    layout = Layout(("x",), ((len(kept),),))
    coder, mask = MaskCoder(layout, ("x",)), Mask(layout, torch.tensor(kept, dtype=torch.bool))
    code, data = coder.encode(mask, None)
    assert coder.decode(code, data, None) == mask
    wire = Codec({"x": PartSpec(layout=layout, direction="up")}, layout, ("x",), down=Float32(), up=Float32())
    value = restrict(Tree(layout, torch.ones(len(kept))), mask)
    packet = wire.encode(Message(mask=mask).put("x", Part(value=value, support=mask)), direction="up", known=None)
    assert equal(wire.decode(packet.payload, direction="up", known=None)["x"], value)


# -- sizes -----------------------------------------------------------------------------------------------------------


def padded(count):
    return -(-count // 8) * 8


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_a_payload_has_the_bytes_of_its_formula(mask, known, stage):
    kept, width = MASKS[mask], STAGES[stage][1]
    packet, _ = there_and_back(upload(kept), kept if known else None, stage)
    count = PARAMS.size if kept is None else int(kept.flat.sum())
    coded = {"bitmap": -(-230 // 8), "seed": 16 + 4 * 2}.get(packet.mask_coder)
    if packet.mask_coder in ("none", "known"):
        coded = 0
    if packet.mask_coder == "gaps":
        coded = len(encode_gaps(np.concatenate([kept[name].flatten().numpy() for name in PRUNABLE])))
    assert len(packet.payload) == padded(FRAME_BYTES + 2 * PART_BYTES + coded) + width * (count + BUFFERS.size)
    by_part = {size.part: size for size in packet.sizes}
    assert (by_part["delta"].params, by_part["delta"].value_bytes) == (count, width * count)
    assert (by_part["buffers"].params, by_part["buffers"].value_bytes) == (10, width * 10)
    assert by_part["message"].mask_bytes == coded + (0 if kept is None else 1)


def test_a_known_mask_costs_one_byte_and_a_drawn_one_its_seed():
    for mask in (mask_of(1), drawn_mask()):
        packet, _ = there_and_back(upload(mask), mask)
        assert packet.mask_coder == "known"
        assert packet.sizes[0].mask_bytes == 1
        assert all(size.mask_bytes == 0 for size in packet.sizes[1:])
    packet, back = there_and_back(upload(drawn_mask(counts=(100, 15))), None)
    assert packet.mask_coder == "seed"
    assert packet.sizes[0].mask_bytes == 1 + 16 + 4 * 2
    # Whoever draws a mask again keeps its seed, so passing it on is as cheap.
    assert back.mask.seed == drawn_mask(counts=(100, 15)).seed


def test_a_mask_of_equal_bits_is_known_whatever_object_it_is():
    mask = drawn_mask()
    packet, _ = there_and_back(upload(Mask(PARAMS, mask.flat.clone())), mask)
    assert packet.mask_coder == "known"


def test_a_support_that_is_the_mask_costs_nothing_and_one_of_its_own_is_coded():
    mask = mask_of(1)
    shared, _ = there_and_back(upload(mask), None)
    own, _ = there_and_back(upload(mask, support="own"), None)
    assert {s.part: s.mask_bytes for s in shared.sizes}["delta"] == 0
    assert {s.part: s.mask_bytes for s in own.sizes}["delta"] > 8


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("seeded", [False, True])
def test_the_cheapest_coder_is_taken(share, seeded):
    layout = Layout(("x", "y"), ((3000,), (1000,)))
    coder = MaskCoder(layout, ("x", "y"))
    counts = {"x": int(3000 * share), "y": int(1000 * share)}
    mask = random_mask(layout, ("x", "y"), counts, Key.of(1))
    if not seeded:
        mask = Mask(layout, mask.flat)
    code, data = coder.encode(mask, None)
    sizes = {BITMAP: len(encode_bitmap(mask.flat.numpy())), GAPS: len(encode_gaps(mask.flat.numpy()))}
    if seeded:
        sizes[SEED] = 16 + 4 * 2
    assert len(data) == min(sizes.values())
    assert sizes[code] == len(data)
    assert sizes[BITMAP] == 500
    assert coder.decode(code, data, None) == mask
    assert coder.encode(mask, mask) == (KNOWN, b"")


def test_the_choice_flips_between_gaps_and_bitmap_as_the_mask_fills():
    """Acceptance test 18: gaps where few are kept or few are cut, a bitmap in between."""
    layout = Layout(("x",), ((20_000,),))
    coder, chosen = MaskCoder(layout, ("x",)), []
    for share in (0.02, 0.1, 0.5, 0.9, 0.98):
        drawn = random_mask(layout, ("x",), {"x": int(20_000 * share)}, Key.of(2))
        chosen.append(coder.encode(Mask(layout, drawn.flat), None)[0])
    assert chosen == [GAPS, GAPS, BITMAP, GAPS, GAPS]


@pytest.mark.parametrize("kept", [0.05, 0.95])
def test_gaps_of_a_random_mask_are_within_four_per_cent_of_its_entropy(kept):
    size = 100_000
    mask = np.zeros(size, np.bool_)
    mask[Key.of(3).numpy().choice(size, int(size * kept), replace=False)] = True
    entropy_bytes = -size * (kept * np.log2(kept) + (1 - kept) * np.log2(1 - kept)) / 8
    assert entropy_bytes < len(encode_gaps(mask)) < 1.04 * entropy_bytes


def test_only_prunable_tensors_are_coded_and_a_cut_elsewhere_is_refused():
    mask = mask_of(1)
    _, data = MaskCoder(PARAMS, PRUNABLE).encode(mask, None)
    assert len(data) == -(-230 // 8)  # the bias is kept by definition
    flat = mask.flat.clone()
    flat[PARAMS.spans["fc.bias"].start] = False
    with pytest.raises(ValueError, match=r"fc\.bias"):
        codec().encode(upload(Mask(PARAMS, flat)), direction="up", known=None)


# -- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_values_travel_on_their_support_alone(stage):
    mask = mask_of(1)
    packet, back = there_and_back(upload(mask, with_buffers=False), mask, stage)
    assert len(packet.payload) == padded(FRAME_BYTES + PART_BYTES) + STAGES[stage][1] * int(mask.flat.sum())
    assert not back["delta"].flat[~mask.flat].view(torch.int32).any()


def test_float16_is_rounded_to_nearest_even_and_refuses_what_it_cannot_hold():
    values = draw("wide")
    values.flat[:6] = torch.tensor([65504.0, -65504.0, 65519.0, 1e-8, 6e-8, 1.0 + 2**-11])
    _, back = there_and_back(upload(None, values=values), None, "float16")
    assert equal(back["delta"], halved(values))
    for bad in (65520.0, -1e6, float("inf"), float("nan")):
        values.flat[7] = bad
        with pytest.raises(NumericError, match=r"part 'delta', tensor 'fc\.weight'.* does not fit float16"):
            there_and_back(upload(None, values=values), None, "float16")


def test_each_direction_has_its_own_stage():
    wire = Codec(SPECS, PARAMS, PRUNABLE, down=Float32(), up=Float16())
    down = wire.encode(Message().put("params", Part(value=draw("p"))), direction="down", known=None)
    up = wire.encode(Message().put("delta", Part(value=draw("p"))), direction="up", known=None)
    assert len(down.payload) - len(up.payload) == 2 * PARAMS.size
    assert equal(wire.decode(down.payload, direction="down", known=None)["params"], draw("p"))


def test_a_part_that_nobody_declared_in_that_direction_is_refused():
    for direction, name in (("up", "params"), ("down", "delta"), ("up", "other")):
        with pytest.raises(ValueError, match=name):
            codec().encode(Message().put(name, Part(value=draw("p"))), direction=direction, known=None)


# -- bad payloads ----------------------------------------------------------------------------------------------------


def payloads():
    for name, mask in MASKS.items():
        for support, known in (("mask", None), ("own", None), ("mask", mask)):
            message = upload(mask, support=support)
            yield name, known, codec().encode(message, direction="up", known=known).payload


def survives(payload, known):
    """Decode; True for a message, False for a WireError. Anything else is the caller's failure."""
    try:
        message = codec().decode(payload, direction="up", known=known)
    except WireError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is allowed here
        return False
    for part in message.parts.values():
        assert part.value.flat.shape == (part.value.layout.size,)
        assert part.support is None or part.support.layout == part.value.layout
    return True


def test_a_truncated_payload_is_refused():
    for _, known, payload in payloads():
        for length in [*range(0, 120), *range(120, len(payload), 37), len(payload) - 1]:
            assert not survives(payload[: min(length, len(payload) - 1)], known)


def test_a_payload_with_bytes_too_many_is_refused():
    for _, known, payload in payloads():
        for extra in (b"\0", b"\0" * 8, payload):
            assert not survives(payload + extra, known)


def test_a_corrupt_payload_is_refused_or_read_but_never_breaks():
    random, refused, read = Key.of(11).numpy(), 0, 0
    for _, known, payload in payloads():
        head = min(len(payload), 160)
        flips = [(at, bit) for at in range(head) for bit in (0, 1, 7)]
        for at, bit in flips:
            data = bytearray(payload)
            data[at] ^= 1 << bit
            good = survives(bytes(data), known)
            refused, read = refused + (not good), read + good
        for _ in range(40):  # several bytes of the head at once
            data = bytearray(payload)
            for at in random.integers(0, 80, 4).tolist():
                data[at % len(data)] = int(random.integers(0, 256))
            survives(bytes(data), known)
    assert refused > 500
    assert read > 500  # a changed value cannot be told from a value


def test_random_bytes_are_refused():
    random = Key.of(12).numpy()
    for size in range(0, 400, 7):
        noise = random.bytes(size)
        assert not survives(noise, None)
        assert not survives(b"FR\x01" + noise, mask_of(1))


def hand_made(*, mask_code=0, mask=b"", index=2, support=0, own_code=0, own=b"", count=240, num_values=240):
    """A payload of one part, by the format's description. Part 2 is `delta`."""
    head = struct.pack("<2sBBB3xI", b"FR", 1, 1, mask_code, len(mask))
    head += struct.pack("<BBBxIId", index, support, own_code, count, len(own), 1.0) + mask + own
    return head + bytes(-len(head) % 8) + bytes(4 * num_values)


def bits_of(mask):
    return encode_bitmap(np.concatenate([mask[name].flatten().numpy() for name in PRUNABLE]))


HALF = mask_of(1)
KEPT = int(HALF.flat.sum())
DRAWN_SEED = Key.of(1).digest
BAD = {
    "an unknown version": b"FR\x02" + hand_made()[3:],
    "a part that does not exist": hand_made(index=3),
    "a part of the other direction": hand_made(index=0),
    "a support that does not exist": hand_made(support=9),
    "the message's mask, where there is none": hand_made(support=1),
    "a mask coder that does not exist": hand_made(mask_code=77),
    "a known mask that nobody knows": hand_made(mask_code=1),
    "a bitmap that is too short": hand_made(mask_code=2, mask=bytes(28)),
    "gaps that are no frame": hand_made(mask_code=3, mask=b"\x01abcdef"),
    "no gaps at all": hand_made(mask_code=3),
    "gaps that go too far": hand_made(mask_code=3, mask=encode_gaps(np.eye(1, 900, 899, dtype=np.bool_)[0])),
    "a bomb of gaps": hand_made(mask_code=3, mask=encode_gaps(np.tile([True, False], 500_000))),
    "a seed that is too short": hand_made(mask_code=4, mask=bytes(16)),
    "a seed that keeps more than there is": hand_made(mask_code=4, mask=DRAWN_SEED + struct.pack("<2I", 201, 1)),
    "buffers under a mask of the parameters": hand_made(
        mask_code=2, mask=bits_of(HALF), index=1, support=1, count=KEPT, num_values=KEPT
    ),
    "buffers under a mask of their own": hand_made(
        index=1, support=2, own_code=2, own=bits_of(HALF), count=KEPT, num_values=KEPT
    ),
    "a mask of its own that is none": hand_made(support=2, own_code=0),
    "fewer values than the support": hand_made(mask_code=2, mask=bits_of(HALF), support=1, count=9, num_values=9),
    "more values than the support": hand_made(mask_code=2, mask=bits_of(HALF), support=1),
    "a part twice": (lambda one: one[:3] + b"\x02" + one[4:12] + 2 * one[12:32] + bytes(4) + 2 * one[32:])(hand_made()),
}


@pytest.mark.parametrize("what", BAD)
def test_a_payload_that_makes_no_sense_is_refused(what):
    assert survives(hand_made(), None)
    assert survives(hand_made(mask_code=2, mask=bits_of(HALF), support=1, count=KEPT, num_values=KEPT), None)
    assert not survives(BAD[what], None)


def test_the_other_direction_of_a_wire_does_not_take_its_payloads():
    packet = codec().encode(upload(None, with_buffers=False), direction="up", known=None)
    with pytest.raises(WireError):
        codec().decode(packet.payload, direction="down", known=None)
