"""Settings of the pruners with one global mask that moves: refused in one sentence, explained in their file."""

import itertools
import pickle
from dataclasses import MISSING, FrozenInstanceError, fields
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from fedray.pruners import SET, FedTiny, PruneFL, RigL
from fedray.round import FieldError

CONF = Path(__file__).parents[2] / "conf" / "pruner"
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


def make(policy, **values):
    return policy(**({"sparsity": 0.5} if policy in SWAPPING else {}) | values)


@pytest.mark.parametrize(("policy", "field", "value", "rule"), BAD)
def test_a_bad_setting_is_refused_in_one_sentence(policy, field, value, rule):
    with pytest.raises(FieldError) as caught:
        make(policy, **{field: value})
    assert str(caught.value) == f"{field} is {value!r}; {rule}"


def test_negative_seconds_of_a_tensor_are_refused_by_its_name():
    with pytest.raises(FieldError) as caught:
        PruneFL(computing_s={"fc.weight": -1.0})
    assert str(caught.value) == "computing_s.fc.weight is -1.0; it is a number of seconds, 0 or more"


@pytest.mark.parametrize("name", ["rigl", "set", "fedtiny", "prunefl"])
def test_a_configuration_sets_and_explains_every_field_with_its_default(name):
    text = (CONF / f"{name}.yaml").read_text()
    values = yaml.safe_load(text)
    module, target = values.pop("_target_").rsplit(".", 1)
    policy = getattr(import_module(module), target)
    made = policy(**values)
    assert set(values) == {field.name for field in fields(policy)}
    assert all(getattr(made, f.name) == f.default for f in fields(policy) if f.default is not MISSING)
    for above, line in itertools.pairwise(text.splitlines()):
        if not line.startswith(("#", "_target_")):
            assert above.startswith("# "), line
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("policy", [*SWAPPING, PruneFL])
def test_a_policy_survives_pickling_and_cannot_be_changed(policy):
    made = make(policy)
    assert pickle.loads(pickle.dumps(made)) == made
    for field in fields(policy):
        with pytest.raises(FrozenInstanceError):
            setattr(made, field.name, None)
