"""A run that starts from a pruned model starts within its mask, with every pruner that cuts single weights."""

import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch
from laws_support import MOMENTUM, label, population, run, spec

import fedray
from fedray.errors import ConfigError
from fedray.pruners import (
    SET,
    FedDST,
    FedTiny,
    GraSP,
    Iterative,
    Lamp,
    Magnitude,
    PruneFL,
    Random,
    RigL,
    Snip,
    SynFlow,
    Threshold,
)
from fedray.round import Policy
from fedray.strategies import FedAvg
from fedray.tree import Mask

LEFT = 0.4  # what the model comes with: less in one layer than most allocations would keep there
ROUNDS = 6
CUBIC = {"schedule": "cubic", "start": 1, "finish": 4}
SCHEDULED = [
    Magnitude(sparsity=0.8),
    Magnitude(sparsity=0.8, **CUBIC),
    Magnitude(sparsity=0.8, allocation="erk", **CUBIC),
    Magnitude(sparsity=0.8, allocation="erk", rounding="floor", **CUBIC),
    Magnitude(sparsity=0.8, ranking="global", **CUBIC),
    Lamp(sparsity=0.8, start=1, finish=4),
    Iterative(sparsity=0.8, start=1, finish=4),
    Iterative(sparsity=0.8, start=1, finish=4, ranking="global"),
]
AT_ONCE = [
    Random(sparsity=0.8),
    Random(sparsity=0.7, allocation="uniform"),
    Magnitude(sparsity=0.8, sticky=False),
    Snip(sparsity=0.8),
    GraSP(sparsity=0.8),
    SynFlow(sparsity=0.8),
]
MOVING = [
    RigL(sparsity=0.8, every=2, until=5),
    RigL(sparsity=0.8, every=2, until=5, initial="magnitude"),
    SET(sparsity=0.8, every=2, until=5),
    FedDST(sparsity=0.8, every=2, until=5),
    FedDST(sparsity=0.8, every=2, until=5, initial="random"),
]
FOUND = [
    Threshold(threshold=1.0, start=1, finish=4),
    PruneFL(every=2, until=5, removal=0.4, initial_rounds=0, constant_s=1e-4),
]
KEEPING = [*SCHEDULED, *AT_ONCE, *MOVING]


def inherited(layout, names, share=LEFT):
    """Every tensor to another sparsity."""
    kept = {}
    for at, name in enumerate(names):
        size = layout.spans[name].stop - layout.spans[name].start
        kept[name] = torch.arange(size) % 10 < round(10 * share) + (2 if at else -1)
    return Mask.of(layout, kept)


@cache
def ran(policy, share=LEFT):
    plain = spec(policy, FedAvg(), rounds=ROUNDS, optim=MOMENTUM)
    layout, names = facts()
    mask = inherited(layout, names, share)
    given = {name: mask[name] for name in names}
    return run(replace(plain, initial_mask=given), population()), mask, names


@cache
def facts():
    driver = run(spec(rounds=1), population()).driver
    return driver.worker.origin.layout, driver.worker.prunable


def left(mask, names):
    return sum(mask.counts(names).values())


@pytest.mark.parametrize("policy", [*KEEPING, *FOUND], ids=label)
def test_the_first_masks_lie_within_the_one_that_the_model_came_with(policy):
    observed, mask, names = ran(policy)
    servers = observed.servers
    assert left(servers[0].mask, names) <= left(mask, names)
    first = next((at for at, s in enumerate(servers) if s.mask != mask), len(servers) - 1)
    for server in servers[: first + (not isinstance(policy, PruneFL))]:
        assert not (server.mask.flat & ~mask.flat).any()
        assert not server.params.flat[~server.mask.flat].any()
    if not isinstance(policy, PruneFL):
        assert servers[-1].mask != mask
    for before, after in itertools.pairwise(servers[1:]) if policy not in [*MOVING, *FOUND] else ():
        assert not (after.mask.flat & ~before.mask.flat).any()


@pytest.mark.parametrize("policy", KEEPING, ids=label)
def test_a_run_from_a_pruned_model_ends_at_the_sparsity_that_is_asked(policy):
    observed, mask, names = ran(policy)
    total = sum(mask[name].numel() for name in names)
    kept = left(observed.servers[-1].mask, names)
    assert kept < left(mask, names)
    exact = round((1 - policy.sparsity) * total)
    assert exact - 2 * len(names) <= kept <= exact if policy.rounding == "floor" else kept == exact


@pytest.mark.parametrize("policy", SCHEDULED[1:], ids=label)
def test_a_model_that_is_ahead_of_a_schedule_rests_until_it_is_passed(policy):
    observed, mask, names = ran(policy)
    total = sum(mask[name].numel() for name in names)
    for round, server in enumerate(observed.servers):
        due = (1 - policy.sparsity_after(round)) * total
        if due >= left(mask, names) + len(names):
            assert server.mask == mask
        assert left(server.mask, names) <= due + 1


def test_a_random_mask_costs_its_seed_where_nothing_was_cut_before_and_its_positions_otherwise():
    observed, _, _ = ran(Random(sparsity=0.8, allocation="uniform"))
    assert observed.servers[0].mask.seed is None  # who does not know the other mask could not draw this one
    whole, _, _ = ran(Random(sparsity=0.8, allocation="uniform"), share=2.0)
    assert whole.servers[0].mask.seed is not None
    plain = run(spec(Random(sparsity=0.8, allocation="uniform"), FedAvg(), rounds=1), population())
    assert whole.servers[0].mask == plain.servers[0].mask


def test_prunefl_begins_with_the_mask_of_the_model():
    observed, mask, _ = ran(FOUND[-1])
    assert observed.servers[0].mask == observed.servers[1].mask == mask
    assert observed.servers[2].mask != mask


def checked(policy: Policy, share=LEFT):
    layout, names = facts()
    made = spec(policy, FedAvg(), rounds=ROUNDS)
    known = replace(made.facts(), layout=layout, prunable=names, initial_mask=inherited(layout, names, share))
    policy.check(known)


@pytest.mark.parametrize("policy", [p for p in KEEPING if getattr(p, "sticky", True)], ids=label)
def test_a_sparsity_below_that_of_the_model_is_refused_before_the_start(policy):
    checked(policy)
    with pytest.raises(ConfigError) as caught:
        checked(replace(policy, sparsity=0.2))
    assert str(caught.value).startswith("pruner.sparsity is 0.2; that keeps ")
    assert str(caught.value).endswith(": set a higher one, or pruner=none to go on with that mask")


def test_fedtiny_is_refused_with_a_model_that_has_a_mask():
    with pytest.raises(ConfigError, match=r"pruner is fedtiny; its candidates are masks of a whole model"):
        checked(FedTiny(sparsity=0.9))


def test_a_folder_of_a_pruned_run_gives_its_mask_to_the_next_and_refuses_less(tmp_path):
    common = ["model.hidden=[8]", "num_clients=4", "cohort=2", "trainer.engine=eager", "runtime=inline"]
    common += ["tracker.progress=none", "tracker.wandb.mode=disabled"]
    fedray.run([*common, "rounds=1", "pruner=magnitude", "pruner.sparsity=0.6"], folder=tmp_path / "first")
    source = f"+model.init_from.source={tmp_path / 'first'}"
    gradual = ["rounds=4", "pruner=gradual", "pruner.sparsity=0.8", "pruner.start=1", "pruner.finish=3"]
    run = fedray.run([*common, source, *gradual], folder=tmp_path / "next")
    # Cubic, 0.8 (1 - (1 - t)^3) at t of 0, a half and 1.
    assert [row["model/sparsity"] for row in run.rows] == pytest.approx([0.6, 0.7, 0.8, 0.8], abs=1e-2)
    for pruner in ("gradual", "rigl"):
        with pytest.raises(ConfigError, match=r"pruner\.sparsity is 0\.5; that keeps"):
            fedray.run([*common, source, "rounds=4", f"pruner={pruner}", "pruner.sparsity=0.5"], folder=tmp_path / "no")
    with pytest.raises(ConfigError, match="pruner is fedtiny"):
        fedray.run([*common, source, "rounds=4", "pruner=fedtiny"], folder=tmp_path / "no")
