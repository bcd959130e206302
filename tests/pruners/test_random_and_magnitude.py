from dataclasses import replace

import pytest
import torch
from torch.nn.utils import prune

from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.prune.allocate import erk
from fedray.prune.select import random_mask
from fedray.pruners import Magnitude, Random
from fedray.round import Context, Server
from fedray.strategies import FedAvg
from fedray.sums import Sums
from fedray.tree import Layout, Mask, Tree


def prune_once(pruner, server, number):
    layout, key = server.params.layout, Key.of(0)
    ctx = Context(
        round=number,
        key=key,
        run_key=key,
        num_clients=1,
        cohort=(),
        origin=server.params,
        prunable=layout.names,
        lr=0.1,
    )
    return pruner.settle(server, Sums(), None, ctx)[0] if number else pruner.init_server(server, ctx)[0]


def test_a_random_mask_depends_on_the_seed_alone_and_costs_its_seed(world):
    pruner = Random(sparsity=0.8)
    one, same, other = (world.start(pruner, seed=seed).mask for seed in (0, 0, 1))
    assert one == same != other
    assert one.counts(world.prunable) == erk(world.layout, world.prunable, 0.8)
    digest, counts, names = one.seed
    assert random_mask(world.layout, names, dict(zip(names, counts, strict=True)), Key(digest)) == one


def test_a_random_mask_never_changes(world):
    servers = world.run([Random(sparsity=0.7), FedAvg()], 4)
    assert all(server.mask == servers[0].mask for server in servers)


def test_one_shot_global_magnitude_prunes_what_torch_prunes(world):
    mask = world.start(Magnitude(sparsity=0.75, ranking="global")).mask
    modules = {name: torch.nn.Linear(*reversed(world.layout.shape(name))) for name in world.prunable}
    for name, module in modules.items():
        module.weight.data = world.server.params[name].clone()
    cut = world.all_prunable() - round(0.25 * world.all_prunable())
    prune.global_unstructured([(m, "weight") for m in modules.values()], prune.L1Unstructured, amount=cut)
    assert all(torch.equal(mask[name], module.weight_mask.bool()) for name, module in modules.items())


def test_one_shot_local_magnitude_prunes_what_torch_prunes(world):
    mask = world.start(Magnitude(sparsity=0.5)).mask
    for name in world.prunable:
        module = torch.nn.Linear(*reversed(world.layout.shape(name)))
        module.weight.data = world.server.params[name].clone()
        prune.l1_unstructured(module, "weight", amount=0.5)
        assert torch.equal(mask[name], module.weight_mask.bool())


def test_one_shot_later_trains_densely_until_its_round_and_prunes_the_average_of_it(world):
    servers = world.run([Magnitude(sparsity=0.5, start=2), FedAvg()], 3)
    assert [server.mask is None for server in servers] == [True, True, False, False]
    dense = world.run([FedAvg()], 2)[2].params
    for name in world.prunable:
        kept = servers[2].mask[name]
        assert dense[name].abs()[kept].min() > dense[name].abs()[~kept].max()
        assert torch.equal(servers[2].params[name][kept], dense[name][kept])


@pytest.mark.parametrize(
    ("schedule", "sparsities"),
    [
        ("linear", [0.0, 0.2, 0.4, 0.6, 0.8, 0.8]),
        ("cubic", [0.0, 0.8 * (1 - 0.75**3), 0.8 * (1 - 0.5**3), 0.8 * (1 - 0.25**3), 0.8, 0.8]),
        ("iterative", [1 - 0.2 ** (i / 5) for i in (1, 2, 3, 4, 5)] + [0.8]),
    ],
)
@pytest.mark.parametrize("ranking", ["local", "global"])
@pytest.mark.parametrize("sticky", [True, False])
def test_the_kept_count_is_what_the_schedule_says(world, schedule, sparsities, ranking, sticky):
    pruner = Magnitude(sparsity=0.8, schedule=schedule, finish=4, ranking=ranking, sticky=sticky, allocation="erk")
    kept = [world.kept(server) for server in world.run([pruner, FedAvg()], 5)]
    assert kept == [round((1 - sparsity) * world.all_prunable()) for sparsity in sparsities]


def test_what_is_not_sticky_trains_densely_in_a_round_of_pruning_alone_and_may_return(world):
    pruner = Magnitude(sparsity=0.8, schedule="iterative", finish=6, every=3, sticky=False)
    policies, server = [pruner, FedAvg()], world.start(pruner)
    returned = 0
    for number in range(1, 9):
        before = server
        job, _, upload = world.answer(policies, server, number, 0)
        server, _ = world.round(policies, server, number)
        if number in (3, 6):
            assert job.mask is None
            assert upload.mask is None
            assert upload.parts["delta"].support is None
            returned += int((server.mask.flat & ~before.mask.flat).sum())
        else:
            assert job.mask == upload.mask == before.mask == server.mask
    assert returned > 0
    job, _, _ = world.answer([replace(pruner, sticky=True), FedAvg()], world.start(pruner), 3, 0)
    assert job.mask is not None


def test_a_sticky_mask_keeps_a_zero_that_is_alive_rather_than_revive_one_that_is_not():
    layout = Layout(("w",), ((2, 4),))
    mask = Mask(layout, torch.tensor([False] * 4 + [True] * 4))
    server = Server(params=Tree.zeros(layout), buffers=Tree.zeros(layout), mask=mask)
    for ranking in ("local", "global"):
        pruner = Magnitude(sparsity=0.75, start=1, ranking=ranking)
        assert prune_once(pruner, server, 1).mask.flat.tolist() == [False] * 4 + [True] * 2 + [False] * 2


def test_a_sticky_mask_shrinks_also_where_exact_rounding_would_give_a_layer_one_more():
    # Of 46, 43 kept divide into 5, 19, 19 but 42 kept into 6, 18, 18: largest remainders have the Alabama paradox.
    layout = Layout(("a", "b", "c"), ((2, 3), (4, 5), (4, 5)))
    server = Server(params=Tree(layout, torch.arange(1.0, 47.0)), buffers=Tree.zeros(layout))
    first = prune_once(Magnitude(sparsity=3 / 46), server, 0)
    assert first.mask.counts() == {"a": 5, "b": 19, "c": 19}
    second = prune_once(Magnitude(sparsity=4 / 46, start=1), first, 1)
    assert second.mask.counts() == {"a": 5, "b": 19, "c": 18}
    free = prune_once(Magnitude(sparsity=4 / 46, start=1, sticky=False), first, 1)
    assert free.mask.counts() == {"a": 6, "b": 18, "c": 18}


def test_an_event_happens_although_nobody_answered(world):
    pruner = Magnitude(sparsity=0.5, start=1)
    server, _, _ = pruner.settle(world.server, Sums(), None, world.ctx(1))
    assert world.kept(server) == world.all_prunable() // 2


def test_a_gradual_schedule_without_an_end_is_refused():
    with pytest.raises(ConfigError) as caught:
        Magnitude(sparsity=0.5, schedule="cubic", start=3, finish=3)
    assert str(caught.value) == (
        "finish is 3; a cubic schedule ends after its start (3): write the round of the last pruning"
    )


@pytest.mark.parametrize(
    ("pruner", "field"),
    [
        (Magnitude(sparsity=0.9, schedule="linear", finish=21), "finish"),
        (Magnitude(sparsity=0.9, start=21), "start"),
    ],
)
def test_a_sparsity_that_the_run_never_reaches_is_refused(world, pruner, field):
    pruner.check(world.facts(rounds=21))
    with pytest.raises(ConfigError) as caught:
        pruner.check(world.facts(rounds=20))
    assert str(caught.value) == (
        f"pruner.{field} is 21; it must be at most rounds (20), or the sparsity of 0.9 is never reached; lower it "
        f"or raise rounds"
    )
