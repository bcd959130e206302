"""Gradual magnitude pruning from a warm start, and defaults that follow the length of a run."""

import itertools
from dataclasses import replace

import pytest
import torch
from yaml_checks import check_file, composed, made

from fedray.prune.allocate import total_kept, uniform
from fedray.pruners import FedDST, Iterative, Magnitude, NoPruning, Random
from fedray.round import Server
from fedray.strategies import FedAvg
from fedray.sums import Sums
from fedray.tree import Layout, Tree

TIMES = ("start", "finish", "every")


@pytest.mark.parametrize(
    ("share", "rounds", "expected"),
    [("0.5", 10, 5), ("0.5", 11, 5), ("0.1", 3, 1), ("0.29", 100, 29), ("0.1", 30, 3), ("1", 7, 7), ("0.04", 100, 4)],
)
def test_a_share_of_the_rounds_is_rounded_down_and_at_least_one(share, rounds, expected):
    start = composed("magnitude", rounds=rounds, start=f"${{share_of_rounds:{share}}}")["start"]
    assert (start, type(start)) == (expected, int)


def test_the_warm_start_and_the_end_follow_the_length_of_a_run():
    policy = made("gradual", 100)
    assert isinstance(policy, Magnitude)
    assert (policy.schedule, policy.start, policy.finish, policy.every) == ("cubic", 20, 60, 4)
    assert (made("gradual", 10).start, made("gradual", 10).finish, made("gradual", 10).every) == (2, 6, 1)


def test_the_file_is_complete_and_accepted_from_ten_rounds_on():
    check_file("gradual", changed=("schedule", "start", "finish", "every"))


def test_training_is_dense_until_the_start_and_exact_from_the_end_on(world):
    policies = [replace(made("gradual"), sparsity=0.8), FedAvg()]
    servers = world.run(policies, 8)
    kept = [world.all_prunable() if s.mask is None else world.kept(s) for s in servers]
    # Cubic from 0 at round 2 to 0.8 at round 6: 0.8 (1 - (1 - t)^3) of 52.
    expected = [52 - round(52 * 0.8 * (1 - (1 - t) ** 3)) for t in (0, 0.25, 0.5, 0.75, 1)]
    assert expected == [52, 28, 16, 11, 10]
    assert kept == [52, 52, *expected, 10, 10]
    assert servers[1].mask is None


PROMISES = [
    Magnitude(sparsity=0.8, schedule="cubic", start=1, finish=5, every=2),
    Magnitude(sparsity=0.8, schedule="linear", start=2, finish=4, ranking="global", sticky=False),
    Magnitude(sparsity=0.5, start=3),
    Random(sparsity=0.7),
    FedDST(sparsity=0.6, every=2, until=5, ratio_decay="constant"),
    NoPruning(),
]


@pytest.mark.parametrize("policy", PROMISES, ids=repr)
def test_a_pruner_keeps_what_it_promises_and_its_mask_moves_in_no_other_round(world, policy):
    servers = world.run([policy, FedAvg()], 7)
    moved = []
    for number, server in enumerate(servers):
        kept = world.all_prunable() if server.mask is None else world.kept(server)
        assert kept == round((1 - policy.sparsity_after(number)) * world.all_prunable())
    for number, (before, after) in enumerate(itertools.pairwise(servers), start=1):
        if before.mask != after.mask:
            moved.append(number)
            assert policy.changes_masks(number)
    due = [number for number in range(1, 8) if policy.changes_masks(number)]
    # The first event of a gradual schedule removes nothing.
    assert set(due) - set(moved) <= {policy.start} if isinstance(policy, Magnitude) else due == moved
    assert policy.changes_masks(0) == (policy.sparsity_after(0) > 0)


@pytest.mark.parametrize("name", ["magnitude", "random", "none"])
def test_files_of_settings_are_complete(name):
    check_file(name)


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 5, 7, 10])
@pytest.mark.parametrize("pruner", ["gradual", "lamp", "threshold"])
def test_a_run_of_any_length_has_room_for_the_schedule(pruner, rounds):
    found = composed(pruner, rounds=rounds)
    assert 0 <= found["start"] <= found["finish"] <= rounds
    if pruner != "threshold":
        assert found["start"] < found["finish"]


MLP = Layout(("0.weight", "0.bias", "1.weight", "2.weight"), ((200, 64), (200,), (200, 200), (10, 200)))
WEIGHTS = ("0.weight", "1.weight", "2.weight")


LATE = {"sparsity": 0.9, "start": 20, "finish": 60, "rounding": "floor"}
FLOORED = [
    *[Magnitude(schedule="cubic", allocation=allocation, **LATE) for allocation in ("uniform", "er", "erk")],
    Iterative(**LATE),
]


@pytest.mark.parametrize("policy", FLOORED, ids=repr)
def test_a_sticky_schedule_with_counts_that_are_rounded_down_comes_to_its_end(world, policy):
    """Rounding down leaves fewer weights after one event than the whole budget of the next may be."""
    params = Tree(MLP, torch.randn(MLP.size, generator=torch.Generator().manual_seed(0)))
    server, memory = Server(params=params, buffers=Tree.zeros(Layout((), ()))), None
    ctx = replace(world.ctx(20), prunable=WEIGHTS)
    before = {name: params[name].numel() for name in WEIGHTS}
    for number in range(20, 61):
        server, _, memory = policy.settle(server, Sums(), memory, replace(ctx, round=number))
        counts = server.mask.counts(WEIGHTS)
        total = total_kept(MLP, WEIGHTS, policy.sparsity_after(number), rounding="floor")
        assert all(counts[name] <= before[name] for name in WEIGHTS)
        assert total - 2 * len(WEIGHTS) <= sum(counts.values()) <= total + len(WEIGHTS)
        before = counts
    if policy.allocation == "uniform":
        assert counts == uniform(MLP, WEIGHTS, 0.9, rounding="floor")
