import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from yaml_checks import check_file, facts

from fedray.errors import ConfigError
from fedray.pruners import Threshold
from fedray.round import FieldError, Server
from fedray.strategies import FedAvg
from fedray.sums import Sums
from fedray.tree import Layout, Mask, Tree

LAYOUT = Layout(("a", "free", "b"), ((4,), (2,), (4,)))
NOTHING = Tree.zeros(Layout((), ()))


def server_of(*values, mask=None):
    return Server(params=Tree(LAYOUT, torch.tensor(values)), buffers=NOTHING, mask=mask)


def event(policy, server, world, number=1):
    return policy.settle(server, Sums(), None, replace(world.ctx(number), prunable=("a", "b")))[0]


def test_what_is_at_or_below_the_value_goes_by_hand(world):
    server = server_of(0.5, -0.6, 0.0, 2.0, 0.1, 0.1, 0.5, 0.51, -0.5, -1.0)
    after = event(Threshold(threshold=0.5, unit="value"), server, world)
    assert after.mask.flat.tolist() == [False, True, False, True, True, True, False, True, False, True]
    assert after.params.flat[0] == 0.0


def test_in_deviations_each_layer_has_a_threshold_of_its_own_by_hand(world):
    # a: mean 0, squares 1, 1, 9, 9, so the deviation is sqrt(5) = 2.236; b is a tenth of it.
    server = server_of(1.0, -1.0, 3.0, -3.0, 0.0, 0.0, 0.1, -0.1, 0.3, -0.3)
    kept = [False, False, True, True]
    after = event(Threshold(threshold=1.3), server, world)  # 2.907 and 0.2907
    assert after.mask.flat.tolist() == [*kept, True, True, *kept]
    less = event(Threshold(threshold=0.4), server, world)  # 0.894
    assert bool(less.mask.flat.all())


def test_the_deviation_is_that_of_the_whole_tensor_so_that_a_second_event_hardly_cuts_more(world):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    layout = Layout(("a",), ((1000,),))
    server = Server(params=Tree(layout, values), buffers=NOTHING)
    ctx = replace(world.ctx(1), prunable=("a",))
    policy, kept = Threshold(threshold=1.0), []
    for _ in range(4):
        server = policy.settle(server, Sums(), None, ctx)[0]
        kept.append(server.mask.counts()["a"])
    assert kept[0] == int((values.abs() > values.std(correction=0)).sum())
    assert kept[0] >= kept[3] > 0.85 * kept[0]  # of what is left alone it would halve every time


def test_an_absolute_threshold_is_that_of_torch(world):
    params = world.server.params
    module = nn.Linear(10, 4)
    module.weight.data = params["fc.weight"].clone()
    cut = int((params["fc.weight"].abs() <= 0.7).sum())
    prune.l1_unstructured(module, "weight", amount=cut)
    after = Threshold(threshold=0.7, unit="value").settle(world.server, Sums(), None, world.ctx(1))[0]
    assert torch.equal(after.mask["fc.weight"], module.weight_mask.bool())


def test_a_layer_keeps_its_largest_weights_where_the_threshold_would_empty_it(world):
    server = server_of(0.1, -0.4, 0.2, 0.3, 0.0, 0.0, 9.0, 8.0, 7.0, 6.0)
    after = event(Threshold(threshold=5.0, unit="value"), server, world)
    assert after.mask.flat.tolist() == [False, True, False, False] + [True] * 6
    more = event(Threshold(threshold=5.0, unit="value", at_least=3), server, world)
    assert more.mask.flat.tolist() == [False, True, True, True] + [True] * 6


def test_events_come_at_start_and_finish_and_every_so_often_and_masks_rest_between(world):
    policy = Threshold(threshold=0.8, unit="value", start=1, finish=6, every=3)
    servers = world.run([policy, FedAvg()], 7)
    assert servers[0].mask is None
    moved = [number for number in range(1, 8) if servers[number].mask != servers[number - 1].mask]
    due = [number for number in range(8) if policy.changes_masks(number)]
    assert due == [1, 4, 6]
    assert {1, 4} <= set(moved) <= set(due)
    for number in due:
        for name in world.prunable:
            kept = servers[number].mask[name]
            values = servers[number].params[name].abs()
            assert values[kept].min() > 0.8
    assert [policy.sparsity_after(number) for number in (0, 1, 7)] == [0.0, None, None]


def test_what_is_sticky_never_returns_and_what_is_not_trains_densely_in_rounds_of_pruning(world):
    policy = Threshold(threshold=0.4, unit="value", start=1, finish=5, every=2)
    sticky, free = (world.run([replace(policy, sticky=s), FedAvg()], 5) for s in (True, False))
    for before, after in itertools.pairwise(sticky[1:]):
        assert not (after.mask.flat & ~before.mask.flat).any()
    assert any((b.mask.flat & ~a.mask.flat).any() for a, b in itertools.pairwise(free[1:]))
    for number, dense in ((2, False), (3, True)):
        job, _, upload = world.answer([replace(policy, sticky=False), FedAvg()], free[number - 1], number, 0)
        assert (job.mask is None, upload.mask is None) == (dense, dense)


def test_a_sticky_event_keeps_no_more_than_there_is(world):
    mask = Mask.of(LAYOUT, {"a": torch.tensor([True, False, False, False])})
    server = server_of(0.1, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 3.0, 4.0, mask=mask)
    after = event(Threshold(threshold=2.5, unit="value", at_least=2), server, world)
    assert after.mask.counts() == {"a": 1, "free": 2, "b": 2}


def test_the_file_is_complete_and_accepted_from_ten_rounds_on():
    check_file("threshold", changed=("start", "finish", "every"))


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        (
            "threshold",
            -1.0,
            "it is at least 0; 1 cuts what is within one deviation of zero, or with unit=value what is below 1",
        ),
        ("unit", "quantile", "choose deviations or value"),
        ("start", -1, "it is a round, and 0 prunes before the first"),
        ("finish", 0, "it is the round of the last pruning, at least start (1)"),
        ("every", 0, "it is a number of rounds, at least 1"),
        ("at_least", 0, "it is a number of weights, at least 1"),
    ],
)
def test_a_bad_value_is_refused_in_one_sentence(field, value, rule):
    with pytest.raises(FieldError) as caught:
        Threshold(**{field: value})
    assert str(caught.value) == f"{field} is {value!r}; {rule}"


def test_a_pruning_after_the_last_round_is_refused():
    with pytest.raises(ConfigError) as caught:
        facts(Threshold(finish=11), rounds=10)
    assert str(caught.value) == (
        "pruner.finish is 11; it must be at most rounds (10), or the last pruning never comes; lower it or raise rounds"
    )
