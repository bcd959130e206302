"""What pruners whose clients have masks of their own refuse before a run starts, once everything about it is known."""

from dataclasses import replace

import pytest

from fedray.errors import ConfigError
from fedray.personal import FedBN, FedPer, StaticNorm
from fedray.pruners import LocalMagnitude, LotteryFL, SubFedAvg, SubFedAvgHybrid
from fedray.strategies import FedAvg
from fedray.tree import Layout

GATED = (LotteryFL(), SubFedAvg(), SubFedAvgHybrid())
KINDS = {"conv.weight": "weight", "norm.weight": "norm", "norm.bias": "norm", "fc.weight": "weight", "fc.bias": "bias"}
LAYOUT = Layout(("fc.weight", "fc.bias"), ((4, 5), (5,)))


def facts(world, *policies, **changes):
    return replace(world.facts(*policies, FedAvg(), epochs=5.0), validation=0.2, **changes)


@pytest.mark.parametrize("pruner", GATED, ids=repr)
def test_a_gate_goes_with_statistics_that_stay_at_clients_and_with_nothing_else_that_does(world, pruner):
    for kinds in (None, KINDS):
        pruner.check(facts(world, FedBN(keep="statistics"), pruner, kinds=kinds))
        for personal in (FedBN(), StaticNorm(), FedPer(), FedPer(names=("fc.*",))):
            run = facts(world, personal, pruner, kinds=kinds)
            with pytest.raises(ConfigError, match=r"^\w+ keeps tensors at the clients; pruner \w+ looks at the model"):
                pruner.check(run)


@pytest.mark.parametrize("pruner", GATED, ids=repr)
def test_a_client_that_could_not_judge_its_model_is_named_before_the_start(world, pruner):
    pruner.check(facts(world, pruner, unjudged=()))
    for clients, who in (((3,), "client 3 has"), ((1, 2, 7), "client 1, like 2 others, has")):
        with pytest.raises(ConfigError) as caught:
            pruner.check(facts(world, pruner, unjudged=clients))
        assert str(caught.value).startswith(f"{who} one training example, so nothing can be set apart of it; pruner ")
        assert str(caught.value).endswith("as with partition.min_size=2, or take another pruner")


@pytest.mark.parametrize("kind", [LotteryFL, SubFedAvg, LocalMagnitude])
def test_a_budget_that_the_model_cannot_meet_is_refused_before_the_start(world, kind):
    # 5 biases of 25 parameters are never pruned, so at most 20 of 25 may go.
    for sparsity, budget, good in ((0.8, "all_parameters", True), (0.9, "all_parameters", False)):
        policy = kind(sparsity=sparsity, budget=budget)
        known = {"layout": LAYOUT, "prunable": ("fc.weight",)}
        policy.check(facts(world, policy))
        if good:
            policy.check(facts(world, policy, **known))
            continue
        with pytest.raises(ConfigError, match=r"^pruner.sparsity is 0.9; with budget all_parameters it must be at"):
            policy.check(facts(world, policy, **known))
    policy = kind(sparsity=0.9)
    policy.check(facts(world, policy, **known))
