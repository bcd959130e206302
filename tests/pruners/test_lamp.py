from dataclasses import replace

import pytest
import torch
from yaml_checks import check_file, facts

from fedray.errors import ConfigError
from fedray.pruners import Lamp, Magnitude
from fedray.round import FieldError, Server
from fedray.strategies import FedAvg
from fedray.sums import Sums
from fedray.tree import Layout, Tree

LAYOUT = Layout(("a", "b"), ((4,), (4,)))
NOTHING = Tree.zeros(Layout((), ()))


def server_of(*values, mask=None):
    return Server(params=Tree(LAYOUT, torch.tensor(values)), buffers=NOTHING, mask=mask)


def prune(policy, server, world, number):
    ctx = replace(world.ctx(number), prunable=("a", "b"))
    return policy.settle(server, Sums(), None, ctx)[0]


def test_three_events_cut_what_scores_lowest_over_all_layers_by_hand(world):
    # a: 1, 4, 9, 16 over 30, 29, 25, 16; b, ten times smaller in magnitude and steeper: 1, 9, 81, 6561 over 6652 ...
    policy = Lamp(sparsity=0.75, schedule="linear", start=1, finish=3)
    server = server_of(1.0, -2.0, 3.0, 4.0, 0.01, -0.03, 0.09, 0.81)
    assert policy.init_server(server, replace(world.ctx(0), prunable=("a", "b")))[0] is server
    first = prune(policy, server, world, 1)
    assert first.mask.counts() == {"a": 4, "b": 4}
    second = prune(policy, first, world, 2)
    # round(0.625 * 8) = 5 stay: 1, 1, 9/25, 4/29, 1/30 (0.033); of b 81/6642 (0.012) goes.
    assert second.mask.flat.tolist() == [True] * 4 + [False] * 3 + [True]
    third = prune(policy, second, world, 3)
    assert third.mask.flat.tolist() == [False, False, False, True, False, False, False, True]
    assert third.params.flat.tolist() == pytest.approx([0, 0, 0, 4.0, 0, 0, 0, 0.81])
    assert prune(policy, third, world, 4) is third


def test_the_kept_count_is_what_the_schedule_says_and_masks_rest_between(world):
    policy = Lamp(sparsity=0.8, schedule="iterative", start=1, finish=5, every=2)
    servers = world.run([policy, FedAvg()], 6)
    kept = [world.all_prunable() if s.mask is None else world.kept(s) for s in servers]
    expected = [round(52 * 0.2 ** (i / 3)) for i in (1, 2, 3)]
    assert kept == [52, expected[0], expected[0], expected[1], expected[1], 10, 10]
    assert servers[1].mask == servers[2].mask
    assert [policy.changes_masks(number) for number in range(7)] == [False, True, False, True, False, True, False]


def test_a_layer_of_small_weights_keeps_its_share_where_a_plain_ranking_empties_it(world):
    params = world.server.params.flat.clone()
    params[world.layout.spans["fc.weight"]] *= 1e-3
    small = replace(world.server, params=Tree(world.layout, params))
    policies = Lamp(sparsity=0.8, schedule="one_shot", start=0), Magnitude(sparsity=0.8, ranking="global")
    lamp, plain = (policy.init_server(small, world.ctx(0))[0] for policy in policies)
    assert world.kept(lamp) == world.kept(plain) == 10
    assert plain.mask.counts()["fc.weight"] == 0
    same, _ = policies[0].init_server(world.server, world.ctx(0))
    assert lamp.mask == same.mask  # the scale of a layer plays no part
    assert lamp.mask.counts()["fc.weight"] >= 5


def test_the_file_is_complete_and_accepted_from_ten_rounds_on():
    check_file("lamp", changed=("start", "finish", "every"))


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("sparsity", 1.0, "it is 0 to below 1; 0.9 keeps 1 in 10"),
        ("schedule", "step", "choose one_shot, linear, cubic, iterative"),
        ("start", -1, "it is a round, and 0 prunes before the first"),
        (
            "finish",
            1,
            "a iterative schedule ends after its start (1): write the round of the last pruning",
        ),
        ("every", 0, "it is a number of rounds, at least 1"),
        ("budget", "all", "choose prunable_weights or all_parameters"),
        ("rounding", "up", "choose nearest or floor"),
    ],
)
def test_a_bad_value_is_refused_in_one_sentence(field, value, rule):
    with pytest.raises(FieldError) as caught:
        Lamp(**{"sparsity": 0.5, field: value})
    assert str(caught.value) == f"{field} is {value!r}; {rule}"


def test_a_sparsity_that_the_run_never_reaches_is_refused():
    with pytest.raises(ConfigError) as caught:
        facts(Lamp(sparsity=0.9, finish=11), rounds=10)
    assert str(caught.value) == (
        "pruner.finish is 11; it must be at most rounds (10), or the sparsity of 0.9 is never reached; lower it or "
        "raise rounds"
    )
