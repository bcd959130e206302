"""Settings of the pruners with one global mask that moves: refused in one sentence, explained in their file."""

import pickle
from dataclasses import FrozenInstanceError, fields

import pytest
from yaml_checks import check_file, facts, made

from fedray.pruners import SET, FedTiny, PruneFL, RigL
from fedray.round import FieldError
from fedray.strategies import FedAvg

SWAPPING = (RigL, SET, FedTiny)
EXAMPLES = "it is a number of examples, at least 1, or null for all"
ROUNDS = "it is a number of rounds, at least 1"
BAD = [
    *[(p, "sparsity", value, "it is 0 to below 1; 0.9 keeps 1 in 10") for p in SWAPPING for value in (1.0, -0.1, 80)],
    *[(p, "allocation", "even", "choose uniform, er, erk") for p in SWAPPING],
    *[(p, "every", 0, ROUNDS) for p in (*SWAPPING, PruneFL)],
    *[(p, "until", -1, "it is a round, and 0 freezes the first mask") for p in SWAPPING],
    *[(p, "ratio", v, "it is the fraction of kept weights swapped, 0 to 1") for p in SWAPPING for v in (-0.1, 1.5)],
    *[(p, "ratio_decay", "linear", "choose constant or cosine") for p in SWAPPING],
    *[(p, "budget", "all", "choose prunable_weights or all_parameters") for p in SWAPPING],
    *[(p, "rounding", "up", "choose nearest or floor") for p in SWAPPING],
    *[(p, "gradient_batch_size", 0, EXAMPLES) for p in (RigL, FedTiny)],
    *[(p, "initial", "snip", "choose magnitude or random") for p in (RigL, SET)],
    (FedTiny, "candidates", 0, "it is a number of masks, at least 1"),
    (FedTiny, "noise", 1.0, "it is 0 to below 1, and 0 makes all candidates equal"),
    (FedTiny, "voters", "one", "choose all or cohort"),
    (FedTiny, "groups", 0, "it is a number of groups, at least 1"),
    (PruneFL, "removal", 1.5, "it is the fraction taken out, 0 to 1"),
    *[
        (PruneFL, name, value, "it must be above 0")
        for name in ("half_life", "constant_s", "transfer_s", "flops_per_second")
        for value in (0.0, -1.0)
    ],
    (PruneFL, "target_sparsity", 1.0, "it is 0 to below 1, and 0 bounds nothing"),
    (PruneFL, "finish", 0, "it is a round, at least 1"),
    (PruneFL, "initial_rounds", -1, "it is a whole number, at least 0"),
    (
        PruneFL,
        "initial_rounds",
        49,
        "it is 0, or at least initial_every (50), for else no mask is ever looked for",
    ),
    *[(PruneFL, f, 0, "it is a whole number, at least 1") for f in ("initial_steps", "initial_every", "patience")],
    (PruneFL, "tolerance", -0.1, "it is a fraction of the size, 0 or more"),
]


def build(policy, **values):
    return policy(**({"sparsity": 0.5} if policy in SWAPPING else {}) | values)


@pytest.mark.parametrize(("policy", "field", "value", "rule"), BAD)
def test_a_bad_setting_is_refused_in_one_sentence(policy, field, value, rule):
    with pytest.raises(FieldError) as caught:
        build(policy, **{field: value})
    assert str(caught.value) == f"{field} is {value!r}; {rule}"


def test_negative_seconds_of_a_tensor_are_refused_by_its_name():
    with pytest.raises(FieldError) as caught:
        PruneFL(computing_s={"fc.weight": -1.0})
    assert str(caught.value) == "computing_s.fc.weight is -1.0; it is a number of seconds, 0 or more"


@pytest.mark.parametrize("name", ["rigl", "set", "fedtiny", "prunefl", "feddst"])
def test_a_configuration_sets_and_explains_every_field_with_its_default(name):
    check_file(name, changed=("every", "until", "finish"))


SHARES = {"rigl": 0.75, "set": 0.75, "fedtiny": 0.75, "prunefl": 0.75, "feddst": 0.5}


@pytest.mark.parametrize(("name", "share"), SHARES.items())
def test_masks_move_a_few_times_and_never_last_in_a_run_of_any_length(name, share):
    for rounds in (10, 25, 40, 100, 333):
        policy = made(name, rounds)
        due = [number for number in range(2, rounds + 1) if policy.changes_masks(number)]
        assert (policy.every, policy.until) == (max(1, int(0.05 * rounds + 1e-9)), int(share * rounds + 1e-9))
        assert due
        assert max(due) < policy.until < rounds
        assert policy.warns(facts(policy, FedAvg(), rounds=rounds)) == ()


@pytest.mark.parametrize("policy", [*SWAPPING, PruneFL])
def test_a_policy_survives_pickling_and_cannot_be_changed(policy):
    built = build(policy)
    assert pickle.loads(pickle.dumps(built)) == built
    for field in fields(policy):
        with pytest.raises(FrozenInstanceError):
            setattr(built, field.name, None)
