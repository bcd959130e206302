"""In every round every layer keeps what schedule and allocation say, by an independent count."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from laws_support import Ran, label, population, run, spec
from torch import nn
from torch.nn.utils import prune as torch_prune

from fedray.pruners import FedDST, Magnitude, Random
from fedray.round import Optim, Policy, Server
from fedray.strategies import FedAvg

ROUNDS = 7


def kept(server, names):
    return None if server.mask is None else server.mask.counts(names)


def scheduled(pruner, round):
    """The sparsity after a round by the closed forms; None before the first pruning."""
    start, end, every, final = pruner.start, pruner.finish, pruner.every, pruner.sparsity
    if round < start:
        return None
    if pruner.schedule == "one_shot" or round >= end:
        return final
    event = (round - start) // every
    t = event * every / (end - start)
    if pruner.schedule == "linear":
        return final * t
    if pruner.schedule == "cubic":
        return final * (1 - (1 - t) ** 3)
    events = math.ceil((end - start) / every) + 1
    return 1 - (1 - final) ** ((event + 1) / events)


def shares(layout, names, allocation):
    """How many each tensor would keep, up to a factor (uniform: its size; ER, ERK: methods.md 1.1)."""
    found = {}
    for name in names:
        shape = layout.shape(name)
        outputs, inputs, *kernel = shape
        size = math.prod(shape)
        density = {
            "uniform": 1.0,
            "er": (outputs + inputs) / (outputs * inputs),
            "erk": (outputs + inputs + sum(kernel)) / size,
        }[allocation]
        found[name] = density * size
    return found


def water(total, parts, caps):
    """Real-valued counts with that total, proportional to `parts` and below `caps`, by bisection of the level."""
    low, high = 0.0, max(caps[n] / parts[n] for n in parts) + 1.0
    for _ in range(200):
        level = (low + high) / 2
        if sum(min(caps[n], level * parts[n]) for n in parts) < total:
            low = level
        else:
            high = level
    return {n: min(caps[n], high * parts[n]) for n in parts}


def expected_total(pruner, layout, names, sparsity):
    prunable = layout.select(names).size
    if pruner.budget == "prunable_weights":
        return round((1 - sparsity) * prunable)
    return round((1 - sparsity) * layout.size) - (layout.size - prunable)


def assert_allocated(counts, pruner, layout, names, sparsity, caps):
    total = expected_total(pruner, layout, names, sparsity)
    assert sum(counts.values()) == total
    if getattr(pruner, "ranking", "local") == "local":
        ideal = water(total, shares(layout, names, pruner.allocation), caps)
        for name in names:
            assert abs(counts[name] - ideal[name]) < 1.0 + 1e-6, (name, counts, ideal)


GRADUAL = [
    Magnitude(
        sparsity=sparsity,
        schedule=kind,
        start=start,
        finish=6,
        every=every,
        ranking=ranking,
        allocation=allocation,
        sticky=sticky,
    )
    for kind, (start, every), (ranking, allocation), sticky, sparsity in itertools.product(
        ("linear", "cubic", "iterative"),
        ((0, 1), (2, 3)),
        (("local", "uniform"), ("local", "er"), ("local", "erk"), ("global", "uniform")),
        (True, False),
        (0.83,),
    )
]
ONE_SHOT = [
    Magnitude(sparsity=0.7, start=start, ranking=ranking, allocation=allocation, sticky=sticky, budget=budget)
    for start, (ranking, allocation), sticky, budget in itertools.product(
        (0, 3),
        (("local", "uniform"), ("local", "er"), ("local", "erk"), ("global", "uniform")),
        (True, False),
        ("prunable_weights", "all_parameters"),
    )
]
TRAIN = {"optim": Optim(momentum=0.5), "rounds": ROUNDS, "cohort": 3}


@pytest.mark.parametrize("pruner", GRADUAL + ONE_SHOT, ids=label)
def test_magnitude_keeps_in_every_layer_and_round_what_schedule_and_allocation_say(pruner):
    model = "lenet" if pruner.schedule == "cubic" and pruner.start == 0 else "mlp"
    ran = run(spec(pruner, FedAvg(), model=model, **TRAIN), population(model))
    layout, names = ran.servers[0].params.layout, ran.driver.worker.prunable
    sizes = {name: math.prod(layout.shape(name)) for name in names}
    before = sizes
    for round, server in enumerate(ran.servers):
        sparsity, counts = scheduled(pruner, round), kept(server, names)
        if sparsity is None:
            assert counts is None
            continue
        assert_allocated(counts, pruner, layout, names, sparsity, before if pruner.sticky else sizes)
        before = counts
        row = ran.rows[round - 1] if round else {}
        if round:
            assert row["model/sparsity"] == pytest.approx(1 - sum(counts.values()) / sum(sizes.values()))
            assert row["model/sparsity_all"] == pytest.approx(
                (sum(sizes.values()) - sum(counts.values())) / layout.size
            )
            for name in names:
                assert row[f"model/layer_sparsity/{name}"] == pytest.approx(1 - counts[name] / sizes[name])
    assert scheduled(pruner, ROUNDS) == pruner.sparsity
    masks = [server.mask for server in ran.servers if server.mask is not None]
    if pruner.sticky:
        for wide, narrow in itertools.pairwise(masks):
            assert not (narrow.flat & ~wide.flat).any()


def test_what_was_pruned_returns_exactly_where_masks_are_not_sticky():
    pruner = Magnitude(sparsity=0.6, schedule="iterative", start=0, finish=6)
    returned = {}
    for sticky in (True, False):
        ran = run(spec(replace(pruner, sticky=sticky), FedAvg(), lr=0.5, **TRAIN), population())
        masks = [server.mask.flat for server in ran.servers]
        returned[sticky] = sum(int((after & ~before).sum()) for before, after in itertools.pairwise(masks))
    assert returned[True] == 0
    assert returned[False] > 0


@pytest.mark.parametrize("allocation", ["uniform", "er", "erk"])
@pytest.mark.parametrize("budget", ["prunable_weights", "all_parameters"])
@pytest.mark.parametrize("sparsity", [0.0, 0.31, 0.8])
@pytest.mark.parametrize("kind", [Random, FedDST])
def test_a_sparse_start_meets_its_budget_and_keeps_it(kind, sparsity, budget, allocation):
    if budget == "all_parameters" and sparsity == 0.8:
        sparsity = 0.6
    extra = {"every": 2, "until": 6} if kind is FedDST else {}
    pruner = kind(sparsity=sparsity, budget=budget, allocation=allocation, **extra)
    ran = run(spec(pruner, FedAvg(), model="lenet", **TRAIN), population("lenet"))
    layout, names = ran.servers[0].params.layout, ran.driver.worker.prunable
    sizes = {name: math.prod(layout.shape(name)) for name in names}
    assert_allocated(kept(ran.servers[0], names), pruner, layout, names, sparsity, sizes)
    assert all(kept(server, names) == kept(ran.servers[0], names) for server in ran.servers)


@pytest.mark.parametrize("regrow_dropped", [True, False])
@pytest.mark.parametrize("initial", ["magnitude", "random"])
def test_feddst_moves_its_mask_in_readjustments_and_rests_between(initial, regrow_dropped):
    pruner = FedDST(
        sparsity=0.6, every=2, until=6, initial=initial, regrow_dropped=regrow_dropped, ratio_decay="constant"
    )
    ran = run(spec(pruner, FedAvg(), **TRAIN), population())
    names = ran.driver.worker.prunable
    for round, (before, after) in enumerate(itertools.pairwise(ran.servers), start=1):
        due = round in (2, 4)
        assert (before.mask != after.mask) == due
        assert kept(after, names) == kept(before, names)
        masks = [message.mask for message, _ in ran.uploads[round - 1]]
        assert all((mask != before.mask) == due for mask in masks)
        for mask in masks:
            assert mask.counts(names) == kept(before, names)
        union = before.mask if not due else masks[0] | masks[1] | masks[2]
        assert not (after.mask.flat & ~union.flat).any()
        assert (ran.rows[round - 1]["prune/churn"] > 0) == due
        # A mask that rests costs one byte each way to whoever was there before.
        if due:
            coded = [
                t["mask_bytes"]
                for t in ran.records[round - 1].transfers
                if t["direction"] == "up" and t["part"] == "message"
            ]
            assert min(coded) > 1


# -- independent oracle: torch.nn.utils.prune ------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen(Policy):
    """A pruner that keeps what its settle was given and what it made of it."""

    inner: Policy
    events: list

    def init_server(self, server, ctx):
        after, memory = self.inner.init_server(server, ctx)
        self.events.append((server, after))
        return after, memory

    def begin(self, *arguments):
        return self.inner.begin(*arguments)

    def settle(self, server, sums, memory, ctx):
        after, sums, memory = self.inner.settle(server, sums, memory, ctx)
        self.events.append((server, after))
        return after, sums, memory


def by_torch(server: Server, names, amounts):
    """Kept weights by name: L1 pruning of each tensor by a count, or of all together where `amounts` is one."""
    module = nn.Module()
    for name in names:
        layer = nn.Module()
        layer.weight = nn.Parameter(server.params[name].clone())
        module.add_module(name.replace(".", "_"), layer)
    layers = [(getattr(module, name.replace(".", "_")), "weight") for name in names]
    if isinstance(amounts, int):
        torch_prune.global_unstructured(layers, pruning_method=torch_prune.L1Unstructured, amount=amounts)
    else:
        for (layer, field), name in zip(layers, names, strict=True):
            torch_prune.l1_unstructured(layer, field, amount=amounts[name])
    return {name: layer.weight_mask.bool() for (layer, _), name in zip(layers, names, strict=True)}


@pytest.mark.parametrize("ranking", ["local", "global"])
@pytest.mark.parametrize("sticky", [True, False])
@pytest.mark.parametrize("allocation", ["uniform", "erk"])
@pytest.mark.parametrize("model", ["mlp", "lenet"])
def test_masks_are_those_of_torch_pruning_on_the_same_weights(model, allocation, sticky, ranking):
    pruner = Magnitude(
        sparsity=0.8, schedule="linear", start=1, finish=4, ranking=ranking, sticky=sticky, allocation=allocation
    )
    events = []
    given = spec(pruner, FedAvg(), model=model, rounds=5)
    policies = (("pruner", Seen(pruner, events)), *given.policies[1:])
    ran: Ran = run(replace(given, policies=policies), population(model))
    names, compared = ran.driver.worker.prunable, 0
    for before, after in events:
        if after.mask is None or after.mask is before.mask:
            continue
        counts = after.mask.counts(names)
        removed = {name: before.params[name].numel() - counts[name] for name in names}
        if not any(removed.values()):
            continue
        theirs = by_torch(before, names, sum(removed.values()) if ranking == "global" else removed)
        for name in names:
            assert torch.equal(after.mask[name], theirs[name])
        compared += 1
    assert compared == 3
