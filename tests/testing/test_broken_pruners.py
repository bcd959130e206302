"""Every law that a pruner can break is broken by somebody, and exactly its check says so, with a sentence that says
where. The two that are the simulator's own are broken there."""

import re
from dataclasses import dataclass, replace

import pytest
from broken_pruners import (
    AnswersOutside,
    BreaksAtQuarter,
    CountsClients,
    CountsRoundsOnSelf,
    CountsTurnsOnSelf,
    Derives,
    Fails,
    Forgets,
    LeaksMomentum,
    LeavesWeights,
    MissesBudget,
    MovesOnce,
    NeverMoves,
    NeverRests,
    OffByOne,
    Plain,
    Quiet,
    ReadsNothing,
    RemembersFunctions,
    Resurrects,
    ShrinksWeights,
    Slotted,
    Sound,
    TellsClientsOnSelf,
    Undeclared,
    UploadsOutside,
    WritesToInputs,
)

from fedray.errors import ConfigError
from fedray.pruners import Structured
from fedray.testing import CHECKS, assert_conforms, check, conformance
from fedray.train import Engine
from fedray.tree import Tree
from fedray.wire import Codec

BROKEN = {
    Fails: ("runs", r"round 2, client \d, pruner.end: KeyError: 'conv9.weight'"),
    Undeclared: ("cuts_what_it_says", r"round 0, the server: \d+ of conv1.weight is cut, and cuts is 'none'"),
    MissesBudget: (
        "budget_met",
        r"round 0: 390 of 488 are removed, .* promises 0.9, .* conv1.weight keeps 14 of 72",
    ),
    OffByOne: ("budget_met", r"round 0: 387 of 488 are removed, .* promises 0.8, which is 390.4 within 1.5"),
    Forgets: (
        "masks_move_and_rest",
        r"in 6 rounds no mask moved, and neither changes_masks nor sparsity_after promises",
    ),
    MovesOnce: ("masks_move_and_rest", r"rounds 4, 6 of 2, 4, 6: changes_masks says that masks move, and none did"),
    NeverMoves: ("masks_move_and_rest", r"rounds 2, 4, 6 of 2, 4, 6: changes_masks says that masks move, and none did"),
    NeverRests: ("masks_move_and_rest", r"round 1: .* rest, and the server's mask of conv1.weight moved by \d+"),
    LeaksMomentum: ("zeros_stay_zero", r"round 1, client \d: it trains \d+ of conv1.weight outside the mask"),
    LeavesWeights: ("zeros_stay_zero", r"round 0, the server with fedavg: \d+ weights of conv1.weight are not zero"),
    UploadsOutside: ("upload_inside_support", r"round 1, client \d: part 'score' has \d+ values outside its support"),
    AnswersOutside: (
        "upload_inside_support",
        r"round 3, client \d, exchange 'looks': part 'score' has \d+ values outside its support in conv1.weight",
    ),
    Resurrects: ("regrown_starts_as_declared", r"round 2: \d+ of conv1.weight comes back with another value"),
    ShrinksWeights: ("sparsity_zero_is_fedavg", r"round 1: \d+ of \d+ in conv1.weight are not those of FedAvg"),
    CountsClients: ("identical_clients_are_one", r"round 1: norm1.running_mean of 6 identical clients is up to"),
    WritesToInputs: ("hooks_are_pure", r"round 1, client \d: end writes to its inputs"),
    RemembersFunctions: ("memories_can_be_stored", r"what the server remembers cannot be pickled"),
    ReadsNothing: ("settings_are_read", r"^ratio: no other value changes anything"),
    BreaksAtQuarter: (
        "settings_are_read",
        r"^with ratio=0.25: round 2, pruner.settle: IndexError: tuple index out of range",
    ),
    TellsClientsOnSelf: ("memories_can_be_stored", r"round 2: digest is \w+ with policies and values that travel by"),
    CountsRoundsOnSelf: ("resume_is_exact", r"round 4: digest is \w+ after a resume"),
    CountsTurnsOnSelf: ("order_changes_nothing", r"round 1: digest is \w+ with one client an actor"),
}
# What is remembered on `self` shows in more than one way.
ALSO = {
    TellsClientsOnSelf: {"hooks_are_pure", "resume_is_exact"},
    CountsRoundsOnSelf: {"hooks_are_pure"},
    CountsTurnsOnSelf: {
        "identical_clients_are_one", "hooks_are_pure", "memories_can_be_stored", "resume_is_exact"
    },
}  # fmt: skip
SIMULATORS = {"shrunk_is_masked", "ledger_is_consistent"}


def failures(policy, **options):
    return {result.check: result.sentence for result in check(policy, **options) if result.verdict == "failed"}


def test_a_pruner_that_keeps_every_law_passes():
    results = {result.check: result for result in check(Sound())}
    assert list(results) == list(CHECKS)
    assert {name for name, result in results.items() if result.verdict != "passed"} == {"shrunk_is_masked"}
    assert results["masks_move_and_rest"].sentence == "moved in rounds 2, 4, 6, rested in 1, 3, 5"
    assert_conforms(Sound(), only=["runs", "budget_met"])


def test_every_law_is_broken_by_a_pruner_or_is_the_simulators():
    assert {check for check, _ in BROKEN.values()} | SIMULATORS == set(CHECKS)


@pytest.mark.parametrize("kind", [Derives, Plain, Slotted, Quiet], ids=lambda kind: kind.__name__)
def test_a_policy_may_derive_what_it_holds_be_no_dataclass_and_print_as_it_likes(kind):
    skipped = {"shrunk_is_masked"}
    if kind in (Plain, Slotted):
        skipped.add("sparsity_zero_is_fedavg")
    if kind is Plain:
        skipped.add("settings_are_read")
    results = list(check(kind()))
    assert {result.check for result in results if result.verdict == "skipped"} == skipped
    assert [f"{one.check}: {one.sentence}" for one in results if one.verdict == "failed"] == []


@pytest.mark.parametrize("kind", ALSO, ids=lambda kind: kind.__name__)
def test_a_hook_that_writes_to_the_policy_is_not_pure(kind):
    found = failures(kind(), only=["hooks_are_pure"])
    assert re.search(
        r"^round 1(, client \d)?: (settle|end) writes (scale|count) to the policy itself", found["hooks_are_pure"]
    )


def test_a_hook_that_writes_to_the_class_is_not_pure():
    @dataclass(frozen=True, kw_only=True)
    class OnClass(Sound):
        seen = ()

        def settle(self, server, sums, memory, ctx):
            OnClass.seen = (*OnClass.seen, ctx.round)
            return super().settle(server, sums, memory, ctx)

    found = failures(OnClass(), only=["hooks_are_pure"])
    assert "settle writes OnClass.seen to the policy itself" in found["hooks_are_pure"]


def test_a_reason_in_exempt_stands_where_masks_rest_on_tiny_data_alone():
    @dataclass(frozen=True, kw_only=True)
    class Gated(Forgets):
        exempt = {"masks_move_and_rest": "the gate opens at an accuracy that tiny data do not reach"}  # noqa: RUF012

    (result,) = check(Gated(), only=["masks_move_and_rest"])
    assert (result.verdict, "the gate opens" in result.sentence) == ("skipped", True)


def test_a_check_that_does_not_exist_is_refused_wherever_it_is_named():
    for ask in (conformance, assert_conforms, lambda policy, only: list(check(policy, only=only))):
        with pytest.raises(ConfigError, match="'budget' is no check; there are runs, "):
            ask(Sound(), only=["budget"])


def test_a_smaller_model_that_trains_to_another_fit_is_seen(monkeypatch):
    fit = Engine.fit

    def worse(self, job, *given, **options):
        done = fit(self, job, *given, **options)
        if not job.shrink:
            return done
        return replace(done, params=Tree(done.params.layout, done.params.flat * (1.0 + 1e-4)))

    assert failures(Structured(sparsity=0.5, shrink=False), only=["shrunk_is_masked"]) == {}
    monkeypatch.setattr(Engine, "fit", worse)
    found = failures(Structured(sparsity=0.5, shrink=False), only=["shrunk_is_masked"])
    assert re.search(r"params of the smaller model are 0.0001 away", found["shrunk_is_masked"])


def test_a_ledger_that_misses_a_byte_is_seen(monkeypatch):
    encode = Codec.encode

    def cheaper(self, message, **options):
        packet = encode(self, message, **options)
        less = replace(packet.sizes[0], header_bytes=packet.sizes[0].header_bytes - 1)
        return replace(packet, sizes=(less, *packet.sizes[1:]))

    monkeypatch.setattr(Codec, "encode", cheaper)
    found = failures(Sound(), only=["ledger_is_consistent"])
    assert re.search(r"down: the rows have \d+ bytes in all, and payloads of \d+ bytes", found["ledger_is_consistent"])


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_the_check_of_the_broken_law_fails_and_says_where(kind):
    name, sentence = BROKEN[kind]
    found = failures(kind(), only=[name])
    assert list(found) == [name]
    assert re.search(sentence, found[name]), found[name]


@pytest.mark.full
@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_no_other_check_fails(kind):
    assert set(failures(kind())) == {BROKEN[kind][0]} | ALSO.get(kind, set())
