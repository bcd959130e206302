"""What holds of every pruner, strategy and correction, besides what tests/laws and tests/testing say of whole runs."""

import itertools
import pickle
from dataclasses import FrozenInstanceError, fields, replace
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from fedray.corrections import FedProx
from fedray.pruners import FedDST, Magnitude, NoPruning, Random
from fedray.round import FieldError, Message, Policy
from fedray.strategies import FedAvg, FedSGD

CONF = Path(__file__).parents[2] / "conf"
GROUPS = ("pruner", "strategy", "correction")
CUBIC = Magnitude(sparsity=0.8, schedule="cubic", start=1, finish=5)
PRUNERS = [
    Random(sparsity=0.8),
    Random(sparsity=0.5, allocation="uniform"),
    Magnitude(sparsity=0.8),
    Magnitude(sparsity=0.8, ranking="global"),
    CUBIC,
    replace(CUBIC, schedule="iterative", every=2, allocation="erk"),
    replace(CUBIC, schedule="linear", ranking="global"),
    replace(CUBIC, sticky=False),
    replace(CUBIC, sticky=False, ranking="global"),
    FedDST(sparsity=0.8, every=2, until=6),
    FedDST(sparsity=0.5, every=1, until=9, initial="random", regrow_dropped=False, ratio_decay="constant"),
]
OTHERS = [NoPruning(), FedAvg(), FedAvg(lr=0.5, weight_by="uniform"), FedSGD(), FedSGD(batch_size=3), FedProx(mu=0.3)]


def run_of(policy):
    """A whole run's policies around this one, inner to outer."""
    if isinstance(policy, (FedAvg, FedSGD)):
        return [Magnitude(sparsity=0.5), policy]
    if isinstance(policy, FedProx):
        return [Magnitude(sparsity=0.5), FedAvg(), policy]
    return [policy, FedAvg()]


@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
def test_the_final_budget_is_met_exactly(world, pruner):
    server = world.run([pruner, FedAvg()], 7)[-1]
    assert world.kept(server) == round((1 - pruner.sparsity) * world.all_prunable())


@pytest.mark.parametrize("sticky", [p for p in PRUNERS if isinstance(p, Magnitude) and p.sticky], ids=repr)
def test_a_sticky_mask_lies_within_the_one_before(world, sticky):
    servers = [s for s in world.run([sticky, FedAvg()], 7) if s.mask is not None]
    for before, after in itertools.pairwise(servers):
        assert not (after.mask.flat & ~before.mask.flat).any()


def copy_of(values):
    return pickle.loads(pickle.dumps(values))


@pytest.mark.parametrize("policy", PRUNERS + OTHERS, ids=repr)
def test_a_policy_survives_pickling_and_cannot_be_changed(policy):
    assert copy_of(policy) == policy
    for field in fields(policy):
        with pytest.raises(FrozenInstanceError):
            setattr(policy, field.name, None)


@pytest.mark.parametrize("policy", PRUNERS + OTHERS, ids=repr)
def test_no_hyper_parameter_hides_a_hook(policy):
    assert not {field.name for field in fields(policy)} & set(dir(Policy))


@pytest.mark.parametrize("policy", PRUNERS + OTHERS, ids=repr)
def test_what_a_policy_sends_is_what_it_declares(world, policy):
    policies = run_of(policy)
    server = world.start(*policies)
    specs = {}
    for one in policies:
        specs.update(one.parts(world.layout, world.stats))
    down, up = Message(), world.answer(policies, server, 1, 0)[2]
    for one in policies:
        down = one.send(server, down, None, world.ctx(1, 0))
    assert set(down.parts) == {name for name, spec in specs.items() if spec.direction != "up"}
    assert set(up.parts) == {name for name, spec in specs.items() if spec.direction != "down"}
    for name, part in [*down.parts.items(), *up.parts.items()]:
        assert part.value.layout == specs[name].layout


RATIO = "it is the fraction of kept weights swapped, 0 to 1"
SPARSITY = "it is 0 to below 1; 0.9 keeps 1 in 10"
EXAMPLES = "it is a number of examples, at least 1, or null for all"
ROUNDS = "it is a number of rounds, at least 1"
PLACES = "choose uniform, er, erk"
BAD = [
    *[(policy, "sparsity", value, SPARSITY) for policy in (Random, Magnitude, FedDST) for value in (1.0, -0.1, 80)],
    *[(policy, "sparsity", float("nan"), SPARSITY) for policy in (Random, Magnitude, FedDST)],
    *[(policy, "allocation", "even", PLACES) for policy in (Random, Magnitude, FedDST)],
    *[(p, "budget", "all", "choose prunable_weights or all_parameters") for p in (Random, Magnitude, FedDST)],
    *[(policy, "rounding", "up", "choose nearest or floor") for policy in (Random, Magnitude, FedDST)],
    *[(policy, "every", 0, ROUNDS) for policy in (Magnitude, FedDST)],
    (Magnitude, "ranking", "layer", "choose local or global"),
    (Magnitude, "schedule", "step", "choose one_shot, linear, cubic, iterative"),
    (Magnitude, "start", -1, "it is a round, and 0 prunes before the first"),
    (FedDST, "initial", "snip", "choose magnitude or random"),
    (FedDST, "until", -1, "it is a round, and 0 freezes the first mask"),
    *[(FedDST, "ratio", value, RATIO) for value in (-0.1, 1.5)],
    (FedDST, "ratio_decay", "linear", "choose constant or cosine"),
    (FedDST, "gradient_batch_size", 0, EXAMPLES),
    (FedAvg, "lr", 0.0, "it must be above 0; 1.0 is the plain mean"),
    (FedSGD, "lr", float("inf"), "it must be above 0; 1.0 steps with trainer.lr itself"),
    *[(policy, "weight_by", "steps", "choose examples or uniform") for policy in (FedAvg, FedSGD)],
    (FedSGD, "batch_size", 0, EXAMPLES + " of a client's"),
    (FedProx, "mu", -1.0, "it must be 0 or more; 0 switches the pull off"),
]


@pytest.mark.parametrize(("policy", "field", "value", "rule"), BAD)
def test_a_bad_hyper_parameter_is_refused_in_one_sentence(policy, field, value, rule):
    good = {"sparsity": 0.5} if "sparsity" in {f.name for f in fields(policy)} else {}
    with pytest.raises(FieldError) as caught:
        policy(**good | {field: value})
    assert str(caught.value) == f"{field} is {value!r}; {rule}"


FILES = [path for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
OURS = [f for f in FILES if f.stem in {"none", "random", "magnitude", "fedavg", "fedsgd", "fedprox"}]


@pytest.mark.parametrize("path", OURS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_configuration_sets_and_explains_every_field(path):
    values = yaml.safe_load(path.read_text())
    if path.parent.name == "correction":
        assert set(values) == ({path.stem} - {"none"})
        if not values:
            return
        values = values[path.stem]
    module, name = values.pop("_target_").rsplit(".", 1)
    policy = getattr(import_module(module), name)
    assert set(values) == {field.name for field in fields(policy)}
    made = policy(**values)
    for field in fields(policy):
        if field.name not in {"sparsity", "mu"}:
            assert getattr(made, field.name) == field.default
    lines = path.read_text().splitlines()
    for above, line in itertools.pairwise(lines):
        if ":" in line and not line.strip().startswith(("#", "_target_")):
            assert above.strip().startswith("#"), line
    assert max(map(len, lines)) <= 120
