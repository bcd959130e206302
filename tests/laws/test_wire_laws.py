"""Every byte is a real byte, and what was encoded is what is decoded."""

import itertools
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from laws_support import way

from fedray.errors import NumericError, WireError
from fedray.keys import Key
from fedray.prune.select import random_mask
from fedray.round import Message, Part, PartSpec
from fedray.tree import Layout, Mask, Tree, equal, restrict
from fedray.wire import Codec, Float16, Float32, Wire
from fedray.wire.bits import encode_as
from fedray.wire.masks import BITMAP, GAPS, SEED, MaskCoder

PARAMS = Layout(("fc.weight", "fc.bias", "out.weight"), ((10, 20), (10,), (3, 10)))
BUFFERS = Layout(("norm.mean", "norm.var"), ((5,), (5,)))
PRUNABLE = ("fc.weight", "out.weight")
SPECS = {
    "params": PartSpec(layout=PARAMS, direction="down", absolute=True),
    "buffers": PartSpec(layout=BUFFERS, direction="both", lossy=False, absolute=True),
    "delta": PartSpec(layout=PARAMS, direction="up"),
}
STAGES = {"float32": (Float32(), 4), "float16": (Float16(), 2)}
FRAME_BYTES, PART_BYTES = 24, 24
KEY = Key.of(5)


def codec(stage="float32"):
    return Codec(SPECS, PARAMS, PRUNABLE, Wire(down=way(STAGES[stage][0]), up=way(STAGES[stage][0])))


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
    packet = codec(stage).encode(message, direction=direction, known=known, key=KEY)
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
            expected = part.value if stage == "float32" or name == "buffers" else halved(part.value)
            assert equal(back[name], expected)
            assert back.parts[name].weight == part.weight
            assert back.parts[name].support == part.support
        assert len(packet.payload) == sum(size.total_bytes for size in packet.sizes)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    kept=st.lists(st.booleans(), min_size=230, max_size=230),
    own=st.none() | st.integers(0, 5),
    pattern=arrays(np.float32, 240, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    weight=st.floats(allow_nan=False, allow_infinity=False, min_value=1e-300),
    known=st.none() | st.integers(0, 3),
)
def test_float32_keeps_every_finite_value_and_every_mask(kept, own, pattern, weight, known):
    flat = torch.ones(PARAMS.size, dtype=torch.bool)
    flat[:200], flat[210:] = torch.tensor(kept[:200]), torch.tensor(kept[200:])
    mask = Mask(PARAMS, flat)
    support = mask if own is None else mask_of(own, own / 5)
    value = restrict(Tree(PARAMS, torch.from_numpy(pattern)), support)
    message = Message(mask=mask).put("delta", Part(value=value, weight=weight, support=support))
    packet, back = there_and_back(message, None if known is None else mask_of(known))
    assert equal(back["delta"], value)
    assert (back.mask, back.parts["delta"].support, back.parts["delta"].weight) == (mask, support, weight)
    assert len(packet.payload) == sum(size.total_bytes for size in packet.sizes)


@pytest.mark.parametrize("kept", [[True], [False], [True, False], []], ids=str)
def test_a_mask_of_one_coordinate_or_none_comes_back(kept):
    layout = Layout(("x",), ((len(kept),),))
    coder, mask = MaskCoder(layout, ("x",)), Mask(layout, torch.tensor(kept, dtype=torch.bool))
    code, data = coder.encode(mask, None)
    assert coder.decode(code, data, None) == mask
    wire = Codec({"x": PartSpec(layout=layout, direction="up")}, layout, ("x",), Wire())
    value = restrict(Tree(layout, torch.ones(len(kept))), mask)
    packet = wire.encode(
        Message(mask=mask).put("x", Part(value=value, support=mask)), direction="up", known=None, key=KEY
    )
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
    if coded is None:
        coded = len(MaskCoder(PARAMS, PRUNABLE).encode(kept, None)[1])
    head = padded(FRAME_BYTES + 2 * PART_BYTES + coded)
    assert len(packet.payload) == padded(head + width * count) + 4 * BUFFERS.size
    by_part = {size.part: size for size in packet.sizes}
    assert (by_part["delta"].params, by_part["delta"].value_bytes) == (count, width * count)
    assert (by_part["buffers"].params, by_part["buffers"].value_bytes) == (10, 4 * 10)
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


def test_only_prunable_tensors_are_coded_and_a_cut_elsewhere_is_refused():
    mask = mask_of(1)
    _, data = MaskCoder(PARAMS, PRUNABLE).encode(mask, None)
    assert len(data) == -(-230 // 8)  # the bias is kept by definition
    flat = mask.flat.clone()
    flat[PARAMS.spans["fc.bias"].start] = False
    with pytest.raises(ValueError, match=r"fc\.bias"):
        codec().encode(upload(Mask(PARAMS, flat)), direction="up", known=None, key=KEY)


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
        with pytest.raises(NumericError, match=r"part 'delta', .*tensor 'fc\.weight'"):
            there_and_back(upload(None, values=values), None, "float16")


def test_each_direction_has_its_own_stage():
    wire = Codec(SPECS, PARAMS, PRUNABLE, Wire(up=way(Float16())))
    down = wire.encode(Message().put("params", Part(value=draw("p"))), direction="down", known=None, key=KEY)
    up = wire.encode(Message().put("delta", Part(value=draw("p"))), direction="up", known=None, key=KEY)
    assert len(down.payload) - len(up.payload) == 2 * PARAMS.size
    assert equal(wire.decode(down.payload, direction="down", known=None)["params"], draw("p"))


def test_a_part_that_nobody_declared_in_that_direction_is_refused():
    for direction, name in (("up", "params"), ("down", "delta"), ("up", "other")):
        with pytest.raises(ValueError, match=name):
            codec().encode(Message().put(name, Part(value=draw("p"))), direction=direction, known=None, key=KEY)


# -- bad payloads ----------------------------------------------------------------------------------------------------


def payloads():
    for name, mask in MASKS.items():
        for support, known in (("mask", None), ("own", None), ("mask", mask)):
            message = upload(mask, support=support)
            yield name, known, codec().encode(message, direction="up", known=known, key=KEY).payload


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
            assert not survives(bytes(data), known)  # the checksum
            good = survives(sealed(bytes(data)), known)
            refused, read = refused + (not good), read + good
        for _ in range(40):  # several bytes of the head at once
            data = bytearray(payload)
            for at in random.integers(0, 80, 4).tolist():
                data[at % len(data)] = int(random.integers(0, 256))
            survives(sealed(bytes(data)), known)
    assert refused > 500
    assert read > 500  # behind a checksum that fits, a changed value cannot be told from a value


def test_random_bytes_are_refused():
    random = Key.of(12).numpy()
    for size in range(0, 400, 7):
        noise = random.bytes(size)
        assert not survives(noise, None)
        assert not survives(sealed(b"FR\x02" + noise + bytes(30)), mask_of(1))


def sealed(payload):
    """The same bytes with the length and checksum that belong to them, so that what is wrong inside is looked at."""
    length = struct.pack("<Q", len(payload))
    head = payload[:12] + length
    return head + struct.pack("<I", zlib.crc32(payload[24:], zlib.crc32(head))) + payload[24:]


def hand_made(
    *, mask_code=0, mask=b"", index=2, support=0, own_code=0, own=b"", whole=0, num_values=240, weight=1.0, parts=1
):
    """A payload of one part (or the same part several times), by the format's description. Part 2 is `delta`."""
    head = struct.pack("<2sBBB3xI", b"FR", 2, parts, mask_code, len(mask)) + bytes(12)
    head += parts * struct.pack("<BBBBIQd", index, support, own_code, whole, len(own), 4 * num_values, weight)
    head += mask + own * parts
    return sealed(head + bytes(-len(head) % 8) + bytes(4 * num_values * parts))


def bits_of(mask):
    return np.packbits(np.concatenate([mask[name].flatten().numpy() for name in PRUNABLE])).tobytes()


HALF = mask_of(1)
KEPT = int(HALF.flat.sum())
DRAWN_SEED = Key.of(1).digest
BAD = {
    "an unknown version": sealed(b"FR\x01" + hand_made()[3:]),
    "a part that does not exist": hand_made(index=3),
    "a part of the other direction": hand_made(index=0),
    "a support that does not exist": hand_made(support=9),
    "the message's mask, where there is none": hand_made(support=1),
    "a mask coder that does not exist": hand_made(mask_code=77),
    "a known mask that nobody knows": hand_made(mask_code=1),
    "a bitmap that is too short": hand_made(mask_code=BITMAP, mask=bytes(28)),
    "gaps that are no frame": hand_made(mask_code=GAPS, mask=b"\x01abcdef"),
    "no gaps at all": hand_made(mask_code=GAPS),
    "gaps that go too far": hand_made(mask_code=GAPS, mask=encode_as("gaps", np.array([899]), 900)),
    "a bomb of gaps": hand_made(mask_code=GAPS, mask=encode_as("gaps", np.arange(0, 1_000_000, 2), 1_000_000)),
    "a seed that is too short": hand_made(mask_code=SEED, mask=bytes(16)),
    "a seed that keeps more than there is": hand_made(mask_code=SEED, mask=DRAWN_SEED + struct.pack("<2I", 201, 1)),
    "buffers under a mask of the parameters": hand_made(
        mask_code=BITMAP, mask=bits_of(HALF), index=1, support=1, num_values=KEPT
    ),
    "buffers under a mask of their own": hand_made(
        index=1, support=2, own_code=BITMAP, own=bits_of(HALF), num_values=KEPT
    ),
    "a mask of its own that is none": hand_made(support=2, own_code=0),
    "fewer values than the support": hand_made(mask_code=BITMAP, mask=bits_of(HALF), support=1, num_values=9),
    "more values than the support": hand_made(mask_code=BITMAP, mask=bits_of(HALF), support=1),
    "a part twice": hand_made(parts=2),
    "a part in full that is never a change": hand_made(whole=1),
    "a mask that nothing refers to": hand_made(own=bytes(5_000)),
    "a mask's code that nothing refers to": hand_made(own_code=2),
    "a weight of nothing": hand_made(weight=0.0),
    "a weight that is no number": hand_made(weight=float("nan")),
    "a wrong checksum": hand_made()[:20] + bytes(4) + hand_made()[24:],
    "a wrong length": hand_made()[:12] + struct.pack("<Q", 1) + hand_made()[20:],
    "a mask longer than the payload": sealed(hand_made()[:8] + struct.pack("<I", 2**32 - 1) + hand_made()[12:]),
    "values longer than the payload": sealed(hand_made()[:32] + struct.pack("<Q", 2**62) + hand_made()[40:]),
}


@pytest.mark.parametrize("what", BAD)
def test_a_payload_that_makes_no_sense_is_refused(what):
    assert survives(hand_made(), None)
    assert survives(hand_made(mask_code=BITMAP, mask=bits_of(HALF), support=1, num_values=KEPT), None)
    assert not survives(BAD[what], None)


def test_the_other_direction_of_a_wire_does_not_take_its_payloads():
    packet = codec().encode(upload(None, with_buffers=False), direction="up", known=None, key=KEY)
    with pytest.raises(WireError):
        codec().decode(packet.payload, direction="down", known=None)
