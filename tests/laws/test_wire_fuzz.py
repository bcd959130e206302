"""Whatever bytes arrive, a decoder gives a message or a WireError, and never more memory than its layout explains."""

import struct
import tracemalloc
import zlib
from dataclasses import replace

import pytest
import torch
from laws_support import WIRES, Packed, population, run, spec, way

from fedray.errors import WireError
from fedray.keys import Key
from fedray.prune.select import random_mask
from fedray.pruners import NoPruning, Random
from fedray.round import Message, Part, PartSpec
from fedray.strategies import FedAvg
from fedray.tree import Layout, Mask, Tree, restrict
from fedray.wire import (
    QSGD,
    BFloat16,
    Codec,
    Delta,
    Float16,
    PowerSGD,
    RandomK,
    ScaledSign,
    Sign,
    Threshold,
    TopK,
    Uniform,
    Way,
    Wire,
    Zstd,
    stc,
)

LAYOUT = Layout(("conv.weight", "conv.bias", "fc.weight"), ((6, 2, 3, 3), (6,), (20, 30)))
PRUNABLE = ("conv.weight", "fc.weight")
SPECS = {
    "params": PartSpec(layout=LAYOUT, direction="down", absolute=True),
    "state": PartSpec(layout=LAYOUT, direction="both"),
    "delta": PartSpec(layout=LAYOUT, direction="up"),
}
KEY = Key.of(3)


def tree(*names):
    return Tree(LAYOUT, torch.randn(LAYOUT.size, generator=KEY.fold(*names).torch()))


def few(share, name):
    flat = torch.rand(LAYOUT.size, generator=KEY.fold(name).torch()) < share
    flat[LAYOUT.spans["conv.bias"]] = True
    return Mask(LAYOUT, flat)


def channels():
    kept = torch.zeros(20, 30, dtype=torch.bool)
    kept[:7] = True
    return Mask.of(LAYOUT, {"fc.weight": kept})


def nudged(mask):
    flat = mask.flat.clone()
    flat[torch.arange(0, 90, 30)] ^= True
    return Mask(LAYOUT, flat)


HALF, TENTH = few(0.5, "half"), few(0.1, "tenth")
MASKS = {
    "none": (None, None),
    "bitmap": (HALF, None),
    "few": (TENTH, None),
    "known": (HALF, HALF),
    "difference": (nudged(HALF), HALF),
    "structured": (channels(), None),
    "seed": (random_mask(LAYOUT, PRUNABLE, dict(zip(PRUNABLE, (60, 300), strict=True)), KEY), None),
}
CHAINS = {
    "float32": (),
    "float16": (Float16(),),
    "bfloat16, zstd": (BFloat16(), Zstd()),
    "int8": (Uniform(bits=8, level="channel"),),
    "int5": (Uniform(bits=5), Zstd()),
    "qsgd": (QSGD(levels=7, bucket=16),),
    "sign": (Sign(step=0.1),),
    "scaled sign": (ScaledSign(level="channel"),),
    "topk": (TopK(fraction=0.1), Uniform(bits=4)),
    "topk global": (TopK(fraction=0.3, level="global"), Float16(), Zstd()),
    "randomk": (RandomK(fraction=0.2),),
    "threshold": (Threshold(value=1.0), ScaledSign()),
    "stc": stc(fraction=0.05),
    "randomk of topk": (TopK(fraction=0.5), RandomK(fraction=0.5)),
    "powersgd": (PowerSGD(rank=2, min_ratio=1.1), Uniform(bits=8)),
}


def cases():
    """(codec, a good payload, the mask that its receiver knows) for every chain and every way to write a mask."""
    found = []
    for name, chain in CHAINS.items():
        codec = Codec(SPECS, LAYOUT, PRUNABLE, Wire(up=way(*chain, parts={"state": {"d": Delta(), "h": Float16()}})))
        for kind, (mask, known) in MASKS.items():
            if name == "powersgd" and mask is not None:
                continue
            for support in (None,) if mask is None else (None, mask):
                message = Message(mask=mask)
                message = message.put("delta", Part(value=restrict(tree("delta", kind), support), support=support))
                message = message.put("state", Part(value=tree("state"), support=None))
                held = {"state": tree("held")}
                packet = codec.encode(message, direction="up", known=known, key=KEY, reference=held)
                found.append((codec, packet.payload, known, held))
    return found


def sealed(payload):
    """The payload with the length and the checksum that its bytes call for: what is inside is looked at then."""
    head = payload[:12] + struct.pack("<Q", len(payload))
    return head + struct.pack("<I", zlib.crc32(payload[24:], zlib.crc32(head))) + payload[24:]


def mutations(payload, random):
    """One bad payload: cut, lengthened, spliced, with bytes or length fields changed; sealed again in three of four."""
    data = bytearray(payload)
    kind = int(random.integers(0, 6))
    at = int(random.integers(0, len(data)))
    if kind == 0:
        data = data[:at]
    elif kind == 1:
        data += random.bytes(int(random.integers(1, 40)))
    elif kind == 2:
        for _ in range(int(random.integers(1, 6))):
            data[int(random.integers(0, len(data)))] = int(random.integers(0, 256))
    elif kind == 3:  # the head, where lengths, codes and counts are
        for _ in range(int(random.integers(1, 4))):
            data[int(random.integers(0, min(160, len(data))))] = int(random.choice([0, 1, 2, 127, 128, 255]))
    elif kind == 4:
        other = int(random.integers(0, len(data)))
        data = data[:at] + data[other:]
    else:
        data[at : at + 4] = struct.pack("<I", int(random.choice([0, 1, 2**16, 2**31, 2**32 - 1])))
    data = bytes(data)
    return sealed(data) if len(data) >= 24 and random.integers(0, 4) else data


def fuzz(count, *, watch_memory):
    good, random = cases(), KEY.fold("fuzz").numpy()
    read = refused = 0
    largest = 0
    for number in range(count):
        codec, payload, known, held = good[number % len(good)]
        data = mutations(payload, random)
        if watch_memory:
            tracemalloc.start()
        try:
            message = codec.decode(data, direction="up", known=known, reference=held)
        except WireError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either outcome is allowed
            refused += 1
        else:
            assert all(part.value.flat.shape == (LAYOUT.size,) for part in message.parts.values())
            read += 1
        if watch_memory:
            largest = max(largest, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert refused > 0.6 * count
    assert read > 0.02 * count  # behind a good seal a changed value cannot be told from a value
    return largest


def test_good_payloads_are_read():
    for codec, payload, known, held in cases():
        message = codec.decode(payload, direction="up", known=known, reference=held)
        assert set(message.parts) == {"delta", "state"}
        assert sealed(payload) == payload


def test_bad_payloads_are_refused_or_read_and_never_break():
    largest = fuzz(2_000, watch_memory=True)
    # A few copies of a layout of 714 coordinates at eight bytes, and Python's own objects.
    assert largest < 40 * 8 * LAYOUT.size


@pytest.mark.full
def test_a_hundred_thousand_bad_payloads_are_refused_or_read_and_never_break():
    fuzz(100_000, watch_memory=False)


def test_no_payload_can_claim_more_than_its_layout():
    """Lengths and counts of four gigabytes in every field, one at a time."""
    for codec, payload, known, held in cases()[:40]:
        for at in range(8, min(len(payload) - 4, 140)):
            data = sealed(payload[:at] + b"\xff\xff\xff\xff" + payload[at + 4 :])
            tracemalloc.start()
            try:
                codec.decode(data, direction="up", known=known, reference=held)
            except WireError:
                pass
            finally:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
            assert peak < 40 * 8 * LAYOUT.size


class Corrupting(Packed):
    """Changes one upload on its way to the server."""

    def start(self, broadcast, clients, evaluations):
        for reply in super().start(broadcast, clients, evaluations):
            if getattr(reply, "payload", None) and reply.results[0].client == self.victim:
                payload = bytearray(reply.payload)
                payload[len(payload) // 2] ^= 4
                reply = replace(reply, payload=self.damage(bytes(payload)))
            yield reply


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda payload: payload, "checksum"),
        (lambda payload: payload[:-9], "declares"),
        (lambda payload: payload + bytes(8), "declares"),
        (lambda payload: payload[:10], "too short"),
    ],
    ids=["a flipped bit", "truncated", "oversized", "almost nothing"],
)
def test_a_bad_upload_ends_the_run_and_names_the_client_and_the_reason(wire, damage, reason):
    given = spec(Random(sparsity=0.5), FedAvg(), wire=WIRES[wire], cohort=6)
    runtime = Corrupting(given, population(), chunk=1)
    runtime.victim, runtime.damage = 4, damage
    with pytest.raises(WireError, match=rf"^client 4 in round 1: .*{reason}"):
        run(given, population(), runtime)


def test_a_way_that_says_nothing_is_float32():
    assert Way() == way()
    plain, empty = (spec(NoPruning(), FedAvg(), wire=wire) for wire in (Wire(), Wire(down=Way(), up=Way())))
    assert run(plain, population()).digests == run(empty, population()).digests
