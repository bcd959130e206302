"""Error feedback and downloads that depend on earlier ones: nothing is lost for good, and everybody holds the same."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws_support import MOMENTUM, PRUNERS, SIZES, WIRES, label, population, run, spec, way

from fedray.errors import ConfigError, NumericError, RunError
from fedray.keys import Key
from fedray.pruners import FedDST, Magnitude, NoPruning, Random
from fedray.round import Message, Part, PartSpec, Policy
from fedray.sim.client import Worker
from fedray.sim.driver import Driver
from fedray.sim.runtime import InlineRuntime
from fedray.sim.spec import EvalSpec
from fedray.strategies import FedAvg
from fedray.train import LearningRate
from fedray.tree import Layout, Mask, Tree, equal, sub
from fedray.wire import (
    QSGD,
    BFloat16,
    Codec,
    Delta,
    Downlink,
    Float16,
    PowerSGD,
    RandomK,
    ScaledSign,
    Sign,
    Threshold,
    TopK,
    Uniform,
    Wire,
    Zstd,
    advance,
    stc,
)

EVERYONE = len(SIZES)
LOSSY = {
    "topk": (TopK(fraction=0.2),),
    "randomk": (RandomK(fraction=0.3),),
    "threshold": (Threshold(value=0.01),),
    "int8": (Uniform(bits=8),),
    "int3 stochastic": (Uniform(bits=3, rounding="stochastic"),),
    "float16": (Float16(),),
    "bfloat16": (BFloat16(),),
    "sign": (ScaledSign(),),
    "signsgd": (Sign(step=0.01),),
    "qsgd": (QSGD(levels=7, bucket=16),),
    "stc": stc(fraction=0.1),
    "topk, int8, zstd": (TopK(fraction=0.2), Uniform(bits=8), Zstd()),
    "powersgd": (PowerSGD(rank=1, min_ratio=1.1),),
}
SELECTION = ("topk", "randomk", "threshold")
GRADUAL = Magnitude(sparsity=0.8, schedule="cubic", start=1, finish=4)


class Listening(Worker):
    """A worker that notes what each client wanted to be received, what was received, and what it keeps."""

    notes: list

    def _one(self, broadcast, client, record, *, summed):
        wanted = {}
        encode = self.codec.encode

        def listen(message, *, direction, **known):
            wanted[direction] = message
            return encode(message, direction=direction, **known)

        self.codec.encode = listen
        try:
            done = super()._one(broadcast, client, record, summed=summed)
        finally:
            del self.codec.encode
        self.notes.append((broadcast.round, client, wanted["up"], done.received, record, done.record))
        return done


def listened(given, population_=None):
    population_ = population_ or population()
    worker = Listening(given, population_)
    worker.notes = []
    ran = run(given, population_, InlineRuntime(given, population_, worker))
    return ran, worker.notes


def ulp_of_larger(a, b):
    return torch.from_numpy(np.spacing(np.maximum(a.abs().numpy(), b.abs().numpy())))


PRUNED = (NoPruning(), GRADUAL, FedDST(sparsity=0.5, every=2, until=9))
PAIRS = [(chain, pruner) for chain in LOSSY for pruner in PRUNED if chain != "powersgd" or pruner == NoPruning()]


@pytest.mark.parametrize(("chain", "pruner"), PAIRS, ids=label)
def test_a_residual_is_what_was_wanted_less_what_was_received(chain, pruner):
    given = spec(pruner, FedAvg(), optim=MOMENTUM, wire=Wire(up=way(*LOSSY[chain], feedback=True)))
    _, notes = listened(given)
    assert len(notes) == 4 * 4
    lost = 0
    for _, _, wanted, received, before, after in notes:
        part, got = wanted.parts["delta"], received["delta"]
        residual = after.residuals["delta"]
        assert equal(residual, sub(part.value, got))
        if before is not None and before.residuals:
            assert torch.equal(part.value.flat[~_kept(part)], torch.zeros(int((~_kept(part)).sum())))
        # Nothing stays where the mask has left, and nothing is received there.
        assert not residual.flat[~_kept(part)].any()
        assert not got.flat[~_kept(part)].any()
        whole = got.flat + residual.flat
        if chain in SELECTION:
            assert torch.equal(whole, part.value.flat)
        else:
            assert bool(((whole - part.value.flat).abs() <= ulp_of_larger(got.flat, residual.flat)).all())
        lost += int(residual.flat.count_nonzero())
    assert lost


def _kept(part):
    return torch.ones(part.value.layout.size, dtype=torch.bool) if part.support is None else part.support.flat


def test_what_is_wanted_is_the_difference_and_the_last_residual_on_the_support():
    given = spec(GRADUAL, FedAvg(), wire=Wire(up=way(TopK(fraction=0.2), feedback=True)), cohort=EVERYONE)
    plain = spec(GRADUAL, FedAvg(), wire=Wire(up=way(TopK(fraction=0.2))), cohort=EVERYONE)
    _, notes = listened(given)
    # In the first round there is nothing to add: both want the same.
    firsts = [[n[2]["delta"] for n in listened(one)[1] if n[0] == 1] for one in (given, plain)]
    assert all(equal(a, b) for a, b in zip(*firsts, strict=True))
    last = {}
    moved = 0
    for _, client, wanted, _, before, after in notes:
        if client in last:
            assert before.residuals["delta"] is last[client]
            kept = _kept(wanted.parts["delta"])
            moved += int((last[client].flat != 0)[~kept].sum())  # lost weights take their residual with them
        last[client] = after.residuals["delta"]
    assert moved


def test_decay_weakens_what_is_added():
    given = {
        decay: spec(wire=Wire(up=way(TopK(fraction=0.2), feedback=True, decay=decay)), cohort=EVERYONE, rounds=2)
        for decay in (1.0, 0.25)
    }
    notes = {decay: listened(one)[1] for decay, one in given.items()}
    for whole, weak in zip(notes[1.0], notes[0.25], strict=True):
        if whole[0] != 2:
            continue
        added = [n[4].residuals["delta"].flat for n in (whole, weak)]
        assert torch.equal(added[0], added[1])  # the first round is the same
        assert torch.allclose(whole[2]["delta"].flat - weak[2]["delta"].flat, 0.75 * added[0], atol=1e-6)


def test_without_feedback_or_loss_nothing_is_kept():
    for wire in (Wire(), WIRES["float16"], Wire(up=way(Zstd()))):
        given = spec(wire=wire)
        ran = run(given, population())
        assert all(not record.residuals and not record.warm for record in ran.driver.runtime.records.values())
        assert not ran.driver.downlink.residuals


def test_a_stage_that_starts_warm_keeps_its_start_in_the_clients_record():
    given = spec(wire=Wire(up=way(PowerSGD(rank=1, min_ratio=1.1), feedback=True)))
    ran = run(given, population())
    trained = {client for record in ran.records for client in (c["client"] for c in record.clients)}
    assert {c for c, record in ran.driver.runtime.records.items() if record.warm} == trained


# -- a strongly convex problem ---------------------------------------------------------------------------------------


CONVEX = {
    "model": "linear",
    "batch_size": 64,
    "epochs": None,
    "steps": 1,
    "cohort": EVERYONE,
    "rounds": 300,
    "optim": replace(MOMENTUM, momentum=0.0, weight_decay=0.1),
}


@lru_cache
def optimum():
    return run(spec(**CONVEX, lr=0.5), population("linear")).servers[-1].params.flat


def distance_to_the_optimum(chain, feedback):
    """Logistic regression with weight decay, one full-batch step a round, everybody present, steps that get smaller."""
    wire = Wire(up=way(*chain, feedback=feedback))
    given = spec(**CONVEX, lr=LearningRate(lr=0.5, kind="cosine"), wire=wire)
    found = run(given, population("linear")).servers[-1].params.flat
    return float((found - optimum()).norm() / optimum().norm())


@pytest.mark.parametrize("chain", ["topk", "sign", "stc", "threshold", "int2"])
def test_on_a_strongly_convex_problem_feedback_converges_and_its_absence_does_not(chain):
    stages = {"int2": (Uniform(bits=2),)}.get(chain) or LOSSY[chain]
    with_feedback, without = (distance_to_the_optimum(stages, feedback) for feedback in (True, False))
    assert with_feedback < 0.025
    assert without > 0.15


# -- downloads -------------------------------------------------------------------------------------------------------


FOLLOWING = {
    "stc": (Delta(), *stc(fraction=0.1)),
    "int4": (Delta(), Uniform(bits=4)),
    "delta alone": (Delta(),),
    "topk, int8": (Delta(), TopK(fraction=0.1), Uniform(bits=8)),
}


class Reading(Worker):
    """A worker that notes what each client received and what it was charged for it."""

    notes: list

    def _receive_download(self, broadcast, record, ctx, whose):
        message, transfer, seconds = super()._receive_download(broadcast, record, ctx, whose)
        self.notes.append((broadcast, record, message, transfer))
        return message, transfer, seconds


def read(given, model="lenet"):
    worker = Reading(given, population(model))
    worker.notes = []
    return run(given, population(model), InlineRuntime(given, population(model), worker)), worker.notes


@pytest.mark.parametrize("pruner", [NoPruning(), *PRUNERS[7:13:2]], ids=label)
@pytest.mark.parametrize("chain", FOLLOWING)
def test_all_clients_of_a_round_hold_the_same_model_however_they_came_by_it(chain, pruner):
    wire = Wire(down=way(*FOLLOWING[chain], feedback=True))
    given = spec(pruner, FedAvg(), model="lenet", wire=wire, rounds=8, cohort=2)
    ran, notes = read(given)
    codec = ran.driver.worker.codec
    payloads = {}
    ways = set()
    for broadcast, record, message, transfer in notes:
        download = broadcast.download
        both = [
            codec.decode(download.whole.payload, direction="down", known=None),
            codec.decode(
                download.change.payload, direction="down", known=download.before_mask, reference=download.before
            ),
        ]
        for one in both:
            assert equal(one["params"], message["params"])
            assert one.mask == message.mask
        payloads[broadcast.round] = len(download.change.payload)
        # Whoever missed rounds pays for each of them, or for the whole, whichever is less.
        missed = [payloads[r] for r in range(record.version + 1, broadcast.round + 1)] if record.version else None
        whole = len(download.whole.payload)
        if missed is None or sum(missed) >= whole:
            assert (transfer.total_bytes, transfer.payloads) == (whole, 1)
            ways.add("whole")
        else:
            assert (transfer.total_bytes, transfer.payloads) == (sum(missed), len(missed))
            ways.add("one" if len(missed) == 1 else "several")
    assert "whole" in ways
    if chain == "stc" and isinstance(pruner, NoPruning):
        assert ways == {"whole", "one", "several"}


def test_what_one_change_loses_is_in_the_next_ones():
    """The server stands still: whoever follows by coarse changes comes as near as one likes."""
    layout = Layout(("w",), ((40, 10),))
    specs = {"params": PartSpec(layout=layout, direction="down", absolute=True)}
    codec = Codec(specs, layout, ("w",), Wire(down=way(Delta(), *stc(fraction=0.1), feedback=True)))
    state, key = Downlink(), spec().key
    start = Tree(layout, torch.zeros(400))
    goal = Tree(layout, torch.randn(400, generator=key.torch()))
    _, state = advance(codec, Message().put("params", Part(value=start)), state, round=1, key=key)
    gaps = []
    for round in range(2, 80):
        download, state = advance(
            codec, Message().put("params", Part(value=goal)), state, round=round, key=key.fold(round)
        )
        gaps.append(float((goal.flat - state.held["params"].flat).norm()))
    assert gaps[-1] < 0.02 * gaps[0]
    assert len(download.change.payload) < 0.06 * len(download.whole.payload)


def test_a_receiver_of_a_coarse_model_gets_what_was_rounded_off_in_later_rounds():
    """Feedback without following: the mean of what is received is nearer to the model than any one of them."""
    layout = Layout(("w",), ((40, 10),))
    specs = {"params": PartSpec(layout=layout, direction="down", absolute=True)}
    codec = Codec(specs, layout, ("w",), Wire(down=way(Uniform(bits=3), feedback=True)))
    state, key = Downlink(), spec().key
    goal = Tree(layout, torch.randn(400, generator=key.torch()))
    received = []
    for round in range(1, 41):
        download, state = advance(
            codec, Message().put("params", Part(value=goal)), state, round=round, key=key.fold(round)
        )
        packet = codec.encode(download.wanted, direction="down", known=None, key=key.fold(round))
        received.append(codec.decode(packet.payload, direction="down", known=None)["params"].flat)
        assert torch.equal(state.residuals["params"].flat, download.wanted["params"].flat - received[-1])
    once = float((received[0] - goal.flat).norm())
    mean = float((torch.stack(received).double().mean(0) - goal.flat).norm())
    assert mean < 0.1 * once


def test_a_mask_that_moves_takes_the_followed_copy_with_it():
    given = spec(GRADUAL, FedAvg(), wire=WIRES["stc"], rounds=6)
    ran = run(given, population())
    held, mask = ran.driver.downlink.held["params"], ran.driver.downlink.mask
    assert mask.sparsity() > 0.5
    assert not held.flat[~mask.flat].any()


def test_the_whole_and_the_change_decode_to_the_same_bits_also_where_stages_start_warm():
    layout = Layout(("w",), ((12, 10),))
    specs = {
        "params": PartSpec(layout=layout, direction="down", absolute=True),
        "control": PartSpec(layout=layout, direction="down"),
    }
    parts = {"control": {"low rank": PowerSGD(rank=1, min_ratio=1.1)}}
    codec = Codec(specs, layout, ("w",), Wire(down=way(Delta(), Uniform(bits=8), parts=parts, feedback=True)))
    state, key = Downlink(), Key.of(0)
    for round in range(1, 5):
        message = Message()
        for name in specs:
            value = Tree(layout, torch.randn(120, generator=key.fold(round, name).torch()))
            message = message.put(name, Part(value=value))
        before = state
        download, state = advance(codec, message, state, round=round, key=key.fold(round))
        assert state.warm
        if round == 1:
            continue
        change = codec.decode(download.change.payload, direction="down", known=None, reference=before.held)
        whole = codec.decode(download.whole.payload, direction="down", known=None)
        assert equal(change["params"], whole["params"])
        assert equal(change["control"], whole["control"])
        assert not download.change.warm


def test_who_was_away_pays_the_least_of_what_it_missed_and_the_whole():
    """Also when the whole was small for a while, because few weights were kept, and is large again."""
    layout = Layout(("w",), ((100, 100),))
    specs = {"params": PartSpec(layout=layout, direction="down", absolute=True)}
    codec = Codec(specs, layout, ("w",), Wire(down=way(Delta(), Uniform(bits=8), feedback=True)))
    state, key, sent = Downlink(), Key.of(0), {}
    for round, share in enumerate([1.0, 1.0, 0.1, 0.1, 0.1, 1.0, 1.0], 1):
        mask = Mask(layout, torch.rand(10_000, generator=key.fold("mask", share).torch()) < share)
        value = Tree(layout, torch.randn(10_000, generator=key.fold(round).torch()) * mask.flat)
        message = Message(mask=mask).put("params", Part(value=value, support=mask))
        download, state = advance(codec, message, state, round=round, key=key.fold(round))
        sent[round] = len(download.change.payload)
        whole = len(download.whole.payload)
        for version in range(1, round):
            missed = sum(sent[r] for r in range(version + 1, round + 1))
            found = download.sizes(version)
            charged = whole if found is None else sum(size.total_bytes for size in found[0])
            assert charged == min(missed, whole), (round, version)


@dataclass(frozen=True, kw_only=True)
class Each(Policy):
    """Sends every client a model of its own, or does as if it did not."""

    sends_each: ClassVar[bool] = True

    def send(self, server, message, memory, ctx):
        value = Tree(server.params.layout, server.params.flat * (1 + ctx.client.id))
        return message.put("params", Part(value=value))


@dataclass(frozen=True, kw_only=True)
class Silent(Each):
    sends_each: ClassVar[bool] = False


@pytest.mark.parametrize("wire", ["stc", "int8 with feedback on both sides"])
def test_a_message_for_each_client_and_downloads_that_follow_each_other_are_refused(wire):
    run(spec(NoPruning(), FedAvg(), Each(), wire=WIRES["int8"], rounds=1), population())
    with pytest.raises(ConfigError, match=r"wire\.down\.feedback is True; each sends each client a message of its own"):
        run(spec(NoPruning(), FedAvg(), Each(), wire=WIRES[wire]), population())
    with pytest.raises(RunError, match=r"round 1, silent\.send: AttributeError: .* says `sends_each = True`"):
        run(spec(NoPruning(), FedAvg(), Silent(), wire=WIRES[wire]), population())


@pytest.mark.parametrize("every", [0, 1])
def test_a_download_that_cannot_be_made_loses_no_finished_round(every):
    evaluation = EvalSpec(every=every, clients="cohort", batch_size=16)
    half = way(Float16(), feedback=True)
    given = spec(NoPruning(), FedAvg(lr=3e3), wire=Wire(down=half), rounds=12, evaluation=evaluation)
    driver = Driver(given, population(), InlineRuntime(given, population()), Worker(given, population()))
    finished = []

    def drive():
        for record in driver.rounds():
            finished.append(record.row["round"])

    with pytest.raises(NumericError, match=r"^the download of round (\d+): ") as raised:
        drive()
    failed = int(str(raised.value).split("round ")[1].split(":")[0])
    assert finished == list(range(1, failed))
    assert failed > 2


# -- what cannot go together -----------------------------------------------------------------------------------------


LAYOUT = Layout(("w", "b"), ((4, 3), (3,)))
SPECS = {
    "params": PartSpec(layout=LAYOUT, direction="down", absolute=True),
    "buffers": PartSpec(layout=LAYOUT, direction="both", lossy=False, absolute=True),
    "delta": PartSpec(layout=LAYOUT, direction="up"),
}
REFUSED = {
    "wire.down.chain is topk:0.1; part 'params' is no difference": Wire(down=way(TopK(fraction=0.1))),
    "wire.down.chain is scaled_sign; part 'params'": Wire(down=way(ScaledSign())),
    "wire.down.chain has a delta and wire.down.feedback is False": Wire(down=way(Delta(), TopK(fraction=0.1))),
    "wire.up.chain has a delta; part 'delta' goes up only": Wire(up=way(Delta(), Float16())),
    "wire.up.chain is randomk:0.1/unbiased and wire.up.feedback is True": Wire(
        up=way(RandomK(fraction=0.1, unbiased=True), feedback=True)
    ),
    "wire.up.parts.delte is not a part that goes up; did you mean delta": Wire(up=way(parts={"delte": {}})),
    "wire.up.parts.params is not a part that goes up": Wire(up=way(parts={"params": {}})),
    "wire.up.parts.buffers is float16; part 'buffers' admits no loss": Wire(
        up=way(parts={"buffers": {"half": Float16()}})
    ),
    "wire.up.decay is 0.0; it is above 0": Wire(up=way(decay=0.0)),
    "wire.up.decay is 1.5; it is above 0": Wire(up=way(decay=1.5)),
    "wire.up.decay is 0.5; nothing is fed back here": Wire(up=way(Float16(), decay=0.5)),
    "wire.down.decay is 0.5; changes have all that was lost": Wire(down=way(Delta(), feedback=True, decay=0.5)),
    "wire.up.feedback is True; wire.up.chain loses nothing": Wire(up=way(Zstd(), feedback=True)),
    "wire.up.chain.1 is a selection or low rank; it comes before a number format": Wire(
        up=way(Float16(), TopK(fraction=0.1))
    ),
    "wire.up.chain.1 is a second number format": Wire(up=way(Float16(), Uniform(bits=8))),
    "wire.up.chain.1 is a number format; it comes before a zstd": Wire(up=way(Zstd(), Float16())),
    "wire.down.chain.1 is a delta; it comes before a selection or low rank": Wire(
        down=way(TopK(fraction=0.1), Delta(), feedback=True)
    ),
    "wire.up.chain.1 cannot stand beside a low-rank stage": Wire(up=way(PowerSGD(rank=1), TopK(fraction=0.5))),
    "wire.up.chain.0 is a str; it must be a stage": Wire(up=way("float16")),
}


@pytest.mark.parametrize("says", REFUSED)
def test_chains_that_make_no_sense_are_refused_by_name(says):
    with pytest.raises(ConfigError) as refused:
        Codec(SPECS, LAYOUT, ("w",), REFUSED[says])
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)


def test_low_rank_is_refused_under_a_mask_without_structure():
    wire = Wire(up=way(PowerSGD(rank=1)))
    Codec(SPECS, LAYOUT, ("w",), wire)
    with pytest.raises(ConfigError, match=r"wire\.up\.chain is powersgd:1; it needs whole matrices"):
        Codec(SPECS, LAYOUT, ("w",), wire, unstructured=True)
    for pruner in (Random(sparsity=0.5), Magnitude(sparsity=0.5), FedDST(sparsity=0.5)):
        with pytest.raises(ConfigError, match="needs whole matrices"):
            run(spec(pruner, FedAvg(), wire=wire), population())


def test_each_part_has_its_own_chain_and_pruned_coordinates_never_travel():
    mask = Mask(LAYOUT, torch.tensor([True, False] * 6 + [True] * 3))
    specs = SPECS | {"evidence": PartSpec(layout=LAYOUT, direction="up")}
    up = way(TopK(fraction=0.5), parts={"evidence": {"half": Float16()}})
    codec = Codec(specs, LAYOUT, ("w",), Wire(up=up))
    dense = Tree(LAYOUT, torch.arange(1.0, 16.0))
    message = Message(mask=mask)
    message = message.put("delta", Part(value=Tree(LAYOUT, dense.flat * mask.flat), support=mask))
    message = message.put("evidence", Part(value=dense))
    packet = codec.encode(message, direction="up", known=mask, key=spec().key)
    back = codec.decode(packet.payload, direction="up", known=mask)
    sizes = {size.part: size for size in packet.sizes}
    assert (sizes["delta"].chain, sizes["delta"].kept, sizes["delta"].params) == ("topk:0.5", 9, 5)
    assert (sizes["evidence"].chain, sizes["evidence"].kept, sizes["evidence"].params) == ("float16", 15, 15)
    assert (sizes["delta"].size, sizes["delta"].weights, sizes["delta"].bits) == (15, 3, 32)
    assert (sizes["evidence"].weights, sizes["evidence"].bits, sizes["evidence"].value_bytes) == (12, 16, 30)
    assert not back["delta"].flat[~mask.flat].any()
    assert int(back["delta"].flat.count_nonzero()) == 5
    assert equal(back["evidence"], dense)


# -- any message -----------------------------------------------------------------------------------------------------

CHAINS = {"float32": (), **LOSSY}


@st.composite
def messages(draw):
    """A message of one part under a mask or none: shapes with empty tensors and single elements, any density."""
    shapes = draw(
        st.lists(
            st.one_of(st.just(()), st.tuples(st.integers(0, 9)), st.tuples(st.integers(1, 6), st.integers(1, 7))),
            min_size=1,
            max_size=4,
        )
    )
    layout = Layout(tuple(f"t{at}" for at in range(len(shapes))), tuple(shapes))
    scale = draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e4]))
    elements = st.floats(-1, 1, width=32)
    drawn = draw(st.lists(elements, min_size=layout.size, max_size=layout.size))
    flat = torch.tensor(drawn, dtype=torch.float32) * scale
    share = draw(st.sampled_from([None, 0.0, 0.1, 0.5, 1.0]))
    if share is None:
        return Message().put("x", Part(value=Tree(layout, flat)))
    kept = draw(st.lists(st.floats(0, 1), min_size=layout.size, max_size=layout.size))
    mask = Mask(layout, torch.tensor([one < share for one in kept], dtype=torch.bool))
    value = Tree(layout, torch.where(mask.flat, flat, torch.zeros(())))
    return Message(mask=mask).put("x", Part(value=value, support=mask))


@pytest.mark.parametrize("chain", CHAINS)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(message=messages(), known=st.booleans(), seed=st.integers(0, 99))
def test_any_message_comes_back_with_a_residual_that_is_what_it_lost(chain, message, known, seed):
    part = message.parts["x"]
    if chain == "powersgd" and message.mask is not None:
        return
    layout = part.value.layout
    specs = {"x": PartSpec(layout=layout, direction="up")}
    codec = Codec(specs, layout, layout.names, Wire(up=way(*CHAINS[chain], feedback=chain != "float32")))
    told = {"known": message.mask if known else None, "key": Key.of(seed), "direction": "up"}
    packet = codec.encode(message, **told)
    assert packet.payload == codec.encode(message, **told).payload
    assert len(packet.payload) == sum(size.total_bytes for size in packet.sizes)
    back = codec.decode(packet.payload, direction="up", known=told["known"])
    assert back.mask == message.mask
    lost = codec.residuals(message, back, {}, "up")
    got, wanted = back["x"].flat, part.value.flat
    assert torch.isfinite(got).all()
    assert not got[~_kept(part)].any()
    if chain == "float32":
        assert equal(back["x"], part.value)
        assert not lost
        return
    residual = lost["x"].flat
    assert torch.equal(residual, wanted - got)
    assert not residual[~_kept(part)].any()
    if chain in SELECTION:
        assert torch.equal(got + residual, wanted)
        assert bool(((got == 0) | (got == wanted)).all())
    else:
        assert bool(((got + residual - wanted).abs() <= ulp_of_larger(got, residual)).all())
    if chain == "int8":
        for name, tensor in part.value.items():
            step = float(tensor.abs().max()) / 127 if tensor.numel() else 0.0
            error = (tensor - back["x"][name]).abs()
            # Half a step, and what rounding the value that is decoded to float32 takes.
            assert bool((error <= step / 2 * (1 + 1e-5) + 2e-45).all())


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("chain", CHAINS)
def test_what_is_not_finite_is_refused_with_part_and_tensor(chain, bad):
    codec = Codec(SPECS, LAYOUT, ("w",), Wire(up=way(*CHAINS[chain])))
    for at, tensor in ((0, "w"), (11, "w"), (14, "b")):
        flat = torch.arange(15.0)
        flat[at] = bad
        with pytest.raises(NumericError, match=rf"part 'delta', tensor '{tensor}'.*trainer\.lr"):
            codec.encode(
                Message().put("delta", Part(value=Tree(LAYOUT, flat))), direction="up", known=None, key=Key.of(0)
            )
    large = torch.full((15,), 3e38)  # finite, though their sum is not
    if chain in ("float32", "topk", "int8", "threshold"):
        message = Message().put("delta", Part(value=Tree(LAYOUT, large)))
        packet = codec.encode(message, direction="up", known=None, key=Key.of(0))
        assert torch.isfinite(codec.decode(packet.payload, direction="up", known=None)["delta"].flat).all()
