"""Every law is broken by somebody, and exactly its check says so, with a sentence that says where."""

import re

import pytest
from broken_pruners import (
    CountsClients,
    Fails,
    LeaksMomentum,
    LeavesWeights,
    MissesBudget,
    NeverMoves,
    NeverRests,
    ReadsNothing,
    RemembersFunctions,
    Resurrects,
    ShrinksWeights,
    Sound,
    Undeclared,
    UploadsOutside,
    WritesToInputs,
)

from fedray.testing import CHECKS, assert_conforms, check

BROKEN = {
    Fails: ("runs", r"round 2, client \d, pruner.end: KeyError: 'conv9.weight'"),
    Undeclared: ("cuts_what_it_says", r"round 0, the server: \d+ of conv1.weight is cut, and cuts is 'none'"),
    MissesBudget: (
        "budget_met",
        r"round 0: 390 of 488 are removed, .* promises 0.9, .* conv1.weight keeps 14 of 72",
    ),
    NeverMoves: ("masks_move_and_rest", r"rounds 2, 4, 6: .*in none of them one did"),
    NeverRests: ("masks_move_and_rest", r"round 1: .* rest, and the server's mask of conv1.weight moved by \d+"),
    LeaksMomentum: ("zeros_stay_zero", r"round 1, client \d: it trains \d+ of conv1.weight outside the mask"),
    LeavesWeights: ("zeros_stay_zero", r"round 0, the server with fedavg: \d+ weights of conv1.weight are not zero"),
    UploadsOutside: ("upload_inside_support", r"round 1, client \d: part 'score' has \d+ values outside its support"),
    Resurrects: ("regrown_starts_as_declared", r"round 2: \d+ of conv1.weight comes back with another value"),
    ShrinksWeights: ("sparsity_zero_is_fedavg", r"round 1: \d+ of \d+ in conv1.weight are not those of FedAvg"),
    CountsClients: ("identical_clients_are_one", r"round 1: norm1.running_mean of 6 identical clients is up to"),
    WritesToInputs: ("hooks_are_pure", r"round 1, client \d: end writes to its inputs"),
    RemembersFunctions: ("memories_can_be_stored", r"what the server remembers cannot be pickled"),
    ReadsNothing: ("settings_are_read", r"^ratio: no other value changes anything"),
}


def failures(policy, **options):
    return {result.check: result.sentence for result in check(policy, **options) if result.verdict == "failed"}


def test_a_pruner_that_keeps_every_law_passes():
    results = {result.check: result for result in check(Sound())}
    assert list(results) == list(CHECKS)
    assert {name for name, result in results.items() if result.verdict != "passed"} == {"shrunk_is_masked"}
    assert results["masks_move_and_rest"].sentence == "moved in rounds 2, 4, 6 of 2, 4, 6, rested in 1, 3, 5"
    assert_conforms(Sound(), only=["runs", "budget_met"])


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_the_check_of_the_broken_law_fails_and_says_where(kind):
    name, sentence = BROKEN[kind]
    found = failures(kind(), only=[name])
    assert list(found) == [name]
    assert re.search(sentence, found[name]), found[name]


@pytest.mark.full
@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_no_other_check_fails(kind):
    assert list(failures(kind())) == [BROKEN[kind][0]]
