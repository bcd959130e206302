"""Masks: what was encoded comes back, the cheapest way is taken, and no bytes break a decoder."""

import math
import struct
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.errors import ConfigError, WireError
from fedray.keys import Key
from fedray.prune.select import random_mask
from fedray.tree import Layout, Mask
from fedray.wire import bits
from fedray.wire.bits import WAYS, encode_as, entropy_bytes
from fedray.wire.masks import (
    ANS,
    BITMAP,
    CODER_NAMES,
    DIFFERENCE,
    GAPS,
    KNOWN,
    NONE,
    REMEMBERED,
    RICE,
    SEED,
    STRUCTURED,
    TENSORS,
    MaskCoder,
)

LAYOUT = Layout(
    ("conv.weight", "conv.bias", "norm.weight", "fc.weight", "scale", "nothing"),
    ((16, 8, 3, 3), (16,), (16,), (20, 64), (), (0, 4)),
)
PRUNABLE = ("conv.weight", "norm.weight", "fc.weight", "scale", "nothing")
WIDE = Layout(("x", "y"), ((300, 500), (100, 500)))
BOTH = ("x", "y")
ENTROPIES = ("none", "zstd", "ans")


def needs(entropy):
    if entropy == "ans":
        pytest.importorskip("constriction")


def mask_of(share, seed=0, layout=WIDE, names=BOTH):
    """A mask of no seed that keeps about this share, or a share by name, of each named tensor."""
    random = Key.of(seed).fold("mask").numpy()
    shares = share if isinstance(share, dict) else dict.fromkeys(names, share)
    kept = {name: torch.from_numpy(np.asarray(random.random(layout.shape(name)) < shares[name])) for name in names}
    return Mask.of(layout, kept)


def channels(seed=0, layout=LAYOUT, names=PRUNABLE, share=0.5):
    """A mask that keeps whole output and input channels."""
    random = Key.of(seed).fold("channels").numpy()
    kept = {}
    for name in names:
        block = np.ones(layout.shape(name), np.bool_)
        for axis, length in enumerate(block.shape[:2]):
            block &= np.expand_dims(random.random(length) < share, [a for a in range(block.ndim) if a != axis])
        kept[name] = torch.from_numpy(block)
    return Mask.of(layout, kept)


def change(mask, share, seed=0):
    """As many of the kept are dropped as are grown anew: this share of the kept of each tensor."""
    random, flat = Key.of(seed).fold("change").numpy(), mask.flat.clone()
    for span in mask.layout.spans.values():
        kept, rest = (np.flatnonzero(mask.flat[span].numpy() == bit) + span.start for bit in (True, False))
        count = min(round(share * len(kept)), len(rest))
        flat[random.choice(kept, count, replace=False)] = False
        flat[random.choice(rest, count, replace=False)] = True
    return Mask(mask.layout, flat)


def there_and_back(mask, known=None, *, entropy="zstd", layout=WIDE, names=BOTH):
    code, data = MaskCoder(layout, names, entropy).encode(mask, known)
    assert MaskCoder(layout, names, entropy).decode(code, data, known) == mask
    return code, data


def counted(monkeypatch):
    """A list with an entry for each set of positions that is encoded from now on."""
    calls, encode = [], bits.encode_positions
    monkeypatch.setattr(bits, "encode_positions", lambda *a, **k: calls.append(1) or encode(*a, **k))
    return calls


def h2(share):
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)


def coordinates(mask, names=BOTH):
    """Positions of what is kept among the prunable coordinates, and how many those are."""
    kept = np.concatenate([mask[name].flatten().numpy() for name in names])
    return np.flatnonzero(kept), len(kept)


# -- there and back --------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    share=st.sampled_from((0.0, 0.01, 0.1, 0.5, 0.9, 1.0)),
    known=st.none() | st.sampled_from((0.0, 0.01, 0.1, 0.5, 0.9, 1.0)),
    kind=st.sampled_from(("random", "changed", "channels", "apart")),
    entropy=st.sampled_from(("none", "zstd")),
    seed=st.integers(0, 1000),
)
def test_any_mask_comes_back(share, known, kind, entropy, seed):
    held = None if known is None else mask_of(known, seed, LAYOUT, PRUNABLE)
    mask = mask_of(share, seed + 1, LAYOUT, PRUNABLE)
    if kind == "changed":
        mask = change(mask if held is None else held, 0.05, seed)
    if kind == "channels":
        mask = channels(seed, share=share)
    if kind == "apart":
        shares = dict(zip(PRUNABLE, (share, 0.5, 0.02, 1.0, 1.0), strict=True))
        mask = mask_of(shares, seed, LAYOUT, PRUNABLE)
    there_and_back(mask, held, entropy=entropy, layout=LAYOUT, names=PRUNABLE)


@pytest.mark.parametrize("entropy", ENTROPIES)
@pytest.mark.parametrize("share", [0.0, 1e-4, 0.01, 0.05, 0.3, 0.5, 0.7, 0.97, 1.0])
def test_masks_of_every_density_come_back_and_are_no_larger_than_any_way(share, entropy):
    needs(entropy)
    mask, known = mask_of(share), mask_of(share, seed=1)
    code, data = there_and_back(mask, entropy=entropy)
    positions, size = coordinates(mask)
    for way in WAYS[: {"none": 3, "zstd": 4, "ans": 5}[entropy]]:
        assert len(data) <= len(encode_as(way, positions, size))
    if CODER_NAMES[code] in WAYS:
        assert data == encode_as(CODER_NAMES[code], positions, size)
    assert len(there_and_back(mask, known, entropy=entropy)[1]) <= len(data)
    assert there_and_back(mask, Mask(WIDE, mask.flat.clone()), entropy=entropy) == (KNOWN, b"")


@pytest.mark.parametrize("shape", [(0,), (), (1,), (2,), (0, 3), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("entropy", ENTROPIES)
def test_masks_of_next_to_nothing_come_back(shape, entropy):
    needs(entropy)
    layout = Layout(("x",), (shape,))
    for share in (0.0, 1.0):
        mask, other = mask_of(share, 0, layout, ("x",)), mask_of(1.0 - share, 0, layout, ("x",))
        for known in (None, other):
            assert len(there_and_back(mask, known, entropy=entropy, layout=layout, names=("x",))[1]) <= 1
    assert there_and_back(Mask.full(layout), layout=layout, names=())[1] == b""


def test_none_and_known_need_no_bytes():
    coder, mask = MaskCoder(WIDE, BOTH), mask_of(0.1)
    assert (CODER_NAMES[NONE], CODER_NAMES[KNOWN]) == ("none", "known")
    assert coder.decode(NONE, b"", mask) is None
    assert coder.decode(KNOWN, b"", mask) is mask


def test_only_prunable_tensors_are_coded_and_a_cut_elsewhere_is_refused():
    mask = mask_of(0.5)
    mask.flat[WIDE.spans["y"]] = True
    assert len(there_and_back(mask, names=("x",))[1]) == -(-WIDE.sizes[0] // 8)
    for known in (None, Mask.full(WIDE)):
        with pytest.raises(ValueError, match="'y', which is not prunable"):
            MaskCoder(WIDE, ("x",)).encode(mask_of(0.5), known)


# -- sizes and choices -----------------------------------------------------------------------------------------------


def test_the_choice_goes_from_gaps_to_a_bitmap_and_back_as_the_mask_fills():
    """Acceptance test 18: gaps where few are kept or few are cut, a bitmap in between."""
    chosen = [there_and_back(mask_of(share))[0] for share in (0.02, 0.1, 0.3, 0.42, 0.5, 0.58, 0.7, 0.9, 0.98)]
    few, many = chosen[:3], chosen[-3:]
    assert set(few) | set(many) <= {RICE, GAPS}
    assert chosen[3:-3] == [BITMAP] * 3


def test_with_ans_a_random_mask_is_within_one_per_cent_of_its_entropy():
    pytest.importorskip("constriction")
    layout = Layout(("x",), ((100_000,),))
    for share in (0.05, 0.3, 0.45, 0.95):
        flat = torch.zeros(100_000, dtype=torch.bool)
        flat[Key.of(0).fold("ans").permutation(100_000)[: round(share * 100_000)]] = True
        code, data = there_and_back(Mask(layout, flat), entropy="ans", layout=layout, names=("x",))
        assert code == ANS
        assert 1 <= (1 + len(data)) / entropy_bytes(round(share * 100_000), 100_000) < 1.01


def test_a_drawn_mask_costs_its_seed():
    drawn = random_mask(WIDE, BOTH, {"x": 15_000, "y": 5000}, Key.of(1))
    code, data = there_and_back(drawn)
    assert (code, len(data)) == (SEED, 16 + 4 * 2)
    # Whoever draws a mask again keeps its seed, so passing it on is as cheap.
    assert MaskCoder(WIDE, BOTH).decode(code, data, None).seed == drawn.seed
    half = random_mask(WIDE, ("x",), {"x": 75_000}, Key.of(1))
    assert there_and_back(half)[0] not in (SEED, KNOWN)  # it says nothing of y
    few = random_mask(WIDE, BOTH, {"x": 3, "y": 0}, Key.of(1))
    assert len(there_and_back(few)[1]) < 16 + 4 * 2


@pytest.mark.parametrize("entropy", ENTROPIES)
def test_a_change_is_close_to_its_formula_and_cheaper_than_the_mask(entropy):
    needs(entropy)

    for density, changed in ((0.1, 0.02), (0.1, 0.1), (0.3, 0.05), (0.5, 0.1)):
        known = mask_of(density)
        mask = change(known, changed)
        code, data = there_and_back(mask, known, entropy=entropy)
        kept = int(known.flat.sum())
        formula = (kept * h2(changed) + (WIDE.size - kept) * h2(changed * kept / (WIDE.size - kept))) / 8
        assert code == DIFFERENCE
        assert formula < len(data) < (1.01 if entropy == "ans" else 1.05) * formula + 20
        assert len(data) < len(there_and_back(mask, entropy=entropy)[1])


def test_an_unrelated_mask_is_coded_afresh():
    code, data = there_and_back(mask_of(0.1, seed=1), mask_of(0.1, seed=2))
    assert code != DIFFERENCE
    assert data == there_and_back(mask_of(0.1, seed=1))[1]


def test_a_change_can_only_be_read_with_the_mask_it_changed():
    known, coder = mask_of(0.1), MaskCoder(WIDE, BOTH)
    code, data = coder.encode(change(known, 0.02), known)
    assert code == DIFFERENCE
    with pytest.raises(WireError, match="does not know"):
        coder.decode(code, data, None)
    with pytest.raises(WireError, match="does not know"):
        coder.decode(KNOWN, b"", None)


def test_kept_channels_cost_a_bit_a_channel():
    channel_bits = (16 + 8) + 16 + (20 + 64) + 1 + (0 + 4)
    for seed in range(5):
        code, data = there_and_back(channels(seed), layout=LAYOUT, names=PRUNABLE)
        assert (code, len(data)) == (STRUCTURED, math.ceil(channel_bits / 8))
    mask = channels()
    flat = mask.flat.clone()
    flat[LAYOUT.spans["conv.weight"].start + int((~mask["conv.weight"]).flatten().nonzero()[0])] = True
    assert there_and_back(Mask(LAYOUT, flat), layout=LAYOUT, names=PRUNABLE)[0] != STRUCTURED


@pytest.mark.parametrize("entropy", ENTROPIES)
def test_tensors_of_different_densities_are_coded_one_by_one(entropy, monkeypatch):
    needs(entropy)
    mask = mask_of({"x": 0.03, "y": 0.6})
    code, data = there_and_back(mask, entropy=entropy)
    assert code == TENSORS
    sets = [coordinates(mask, (name,)) for name in BOTH]
    assert len(data) < 1.05 * sum(entropy_bytes(len(positions), size) for positions, size in sets) + 20
    positions, size = coordinates(mask)
    assert len(data) < 0.8 * entropy_bytes(len(positions), size)
    calls = counted(monkeypatch)
    assert there_and_back(mask_of(0.1), entropy=entropy)[0] != TENSORS
    assert len(calls) == 1  # nothing was tried in vain


def test_what_was_encoded_is_remembered_but_not_without_end(monkeypatch):
    tried = counted(monkeypatch)
    layout = Layout(("x",), ((200,),))
    coder = MaskCoder(layout, ("x",))
    masks = [mask_of(0.3, seed, layout, ("x",)) for seed in range(REMEMBERED + 1)]
    first = coder.encode(masks[0], None)
    assert coder.encode(Mask(layout, masks[0].flat.clone()), None) == first
    assert len(tried) == 1
    for mask in masks[1:]:
        coder.encode(mask, None)
    assert len(tried) == len(masks)
    assert coder.encode(masks[0], None) == first
    assert len(tried) == len(masks) + 1
    # What the receiver knows and what drew the mask are part of what was asked.
    near = change(masks[1], 0.02)
    assert coder.encode(near, masks[1])[0] == DIFFERENCE
    assert coder.encode(near, None)[0] == BITMAP
    wide, drawn = MaskCoder(WIDE, BOTH), random_mask(WIDE, BOTH, {"x": 15_000, "y": 5000}, Key.of(1))
    assert [wide.encode(mask, None)[0] == SEED for mask in (Mask(WIDE, drawn.flat), drawn)] == [False, True]


def test_entropies_are_checked_before_anything_is_coded(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ConfigError, match=r"pip install fedray\[compress\]"):
        MaskCoder(WIDE, BOTH, "ans")
    with pytest.raises(ConfigError, match="must be none, zstd or ans"):
        MaskCoder(WIDE, BOTH, "gzip")


# -- bad bytes -------------------------------------------------------------------------------------------------------

SIZE = sum(math.prod(LAYOUT.shape(name)) for name in PRUNABLE)
HELD = mask_of(0.2, 3, LAYOUT, PRUNABLE)
EMPTY = b"\1"  # a list of no positions
LAST = bytes([WAYS.index("gaps")]) + encode_as("gaps", np.array([SIZE - 1]), SIZE)
BAD = {
    "a coder that does not exist": (len(CODER_NAMES), b""),
    "nothing, with bytes": (NONE, b"\0"),
    "a known mask, with bytes": (KNOWN, b"\0"),
    "a bitmap that is too short": (BITMAP, bytes(SIZE // 8 - 1)),
    "gaps that go too far": (GAPS, encode_as("gaps", np.array([SIZE + 5]), SIZE + 900)),
    "a seed that is too short": (SEED, bytes(16)),
    "a seed that keeps more than there is": (SEED, bytes(16) + struct.pack("<5I", 1, 17, 1, 1, 0)),
    "a change without a length": (DIFFERENCE, b"\1\0\0"),
    "a change that ends early": (DIFFERENCE, struct.pack("<I", 9) + EMPTY),
    "a change without the grown": (DIFFERENCE, struct.pack("<I", 1) + EMPTY),
    "a change beyond what was kept": (DIFFERENCE, struct.pack("<I", len(LAST)) + LAST + EMPTY),
    "channels that are too few": (STRUCTURED, bytes(16)),
    "channels with a bit behind their end": (STRUCTURED, bytes(16) + b"\x01"),
    "tensors with lengths that overflow": (TENSORS, b"\xff" * 16 + 5 * EMPTY),
    "tensors that are too few": (TENSORS, struct.pack("<4I", 1, 1, 1, 1) + 4 * EMPTY),
    "no tensors": (TENSORS, b""),
}


@pytest.mark.parametrize("what", BAD)
def test_bytes_that_make_no_sense_are_refused(what):
    code, data = BAD[what]
    with pytest.raises(WireError):
        MaskCoder(LAYOUT, PRUNABLE).decode(code, data, HELD)


def test_no_tensor_is_no_set():
    coder = MaskCoder(LAYOUT, ())
    for data in (b"", b"\0", bytes(8)):
        with pytest.raises(WireError):
            coder.decode(TENSORS, data, None)


@pytest.mark.parametrize("code", range(len(CODER_NAMES)))
def test_what_a_decoder_allocates_is_bounded_by_the_size_and_the_input(code):
    coder = MaskCoder(LAYOUT, PRUNABLE)
    bomb = encode_as("gaps", np.arange(0, 4_000_000, 2), 4_000_000)
    sets = struct.pack("<4I", 0, 0, 0, 0) + b"\3" + bomb, struct.pack("<I", 1 + len(bomb)) + b"\3" + bomb + EMPTY
    for data in (bomb, *sets, b"\xff" * 500_000, bytes(500_000)):
        tracemalloc.start()
        try:
            with pytest.raises(WireError):
                coder.decode(code, data, HELD)
            assert tracemalloc.get_traced_memory()[1] < 4 * len(data) + 400 * SIZE
        finally:
            tracemalloc.stop()


def survives(coder, code, data, known):
    """Decode; True for a mask that is valid, False for a WireError. Anything else is the caller's failure."""
    try:
        mask = coder.decode(code, data, known)
    except WireError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is allowed here
        return False
    if mask is not None:
        assert mask.layout == LAYOUT
        assert mask["conv.bias"].all()
        assert set(np.unique(mask.flat.view(torch.uint8).numpy()).tolist()) <= {0, 1}
    return True


def fuzz(count):
    """Random and mutated bytes; how many were refused and how many read."""
    random, outcomes = Key.of(0).fold("fuzz").numpy(), [0, 0]
    try:
        coder = MaskCoder(LAYOUT, PRUNABLE, "ans")
    except ConfigError:
        coder = MaskCoder(LAYOUT, PRUNABLE)
    apart = dict(zip(PRUNABLE, (0.02, 0.5, 0.6, 1.0, 1.0), strict=True))
    masks = [mask_of(share, 5, LAYOUT, PRUNABLE) for share in (0.0, 0.02, 0.2, 0.5, 0.9, 1.0, apart)]
    masks += [random_mask(LAYOUT, PRUNABLE, {n: math.prod(LAYOUT.shape(n)) // 2 for n in PRUNABLE}, Key.of(1))]
    masks += [channels(), change(HELD, 0.05), change(HELD, 0.3)]
    good = [(*coder.encode(mask, known), known) for mask in masks for known in (None, HELD, masks[3])]
    kept = coordinates(masks[1], PRUNABLE)[0]
    good += [(BITMAP + index, encode_as(way, kept, SIZE), HELD) for index, way in enumerate(WAYS[:4])]
    assert len({code for code, _, _ in good}) >= 7
    for step in range(count):
        code, base, known = good[random.integers(len(good))]
        data, kind = bytearray(base), step % 6
        if kind == 0:
            code, data = int(random.integers(256)), bytearray(random.bytes(random.integers(0, 60)))
        elif kind == 1:
            code = int(random.integers(len(CODER_NAMES)))
        elif kind == 2:
            del data[random.integers(len(data) + 1) :]
        elif kind == 3:
            data += random.bytes(random.integers(1, 9))
        elif data:
            for at in random.integers(0, min(len(data), 12 if kind == 4 else 1 << 20), random.integers(1, 4)).tolist():
                data[at] ^= 1 << random.integers(8)
        if step % 7 == 0:
            known = None
        outcomes[survives(coder, code, bytes(data), known)] += 1
    return outcomes


def test_no_bytes_break_a_decoder():
    refused, read = fuzz(2000)
    assert min(refused, read) > 200


@pytest.mark.full
def test_no_bytes_break_a_decoder_in_the_long_run():
    fuzz(100_000)
