"""Whole units by the server: by hand on a chain of linear layers, a normalised convolution and a residual stream."""

import itertools
import pickle
from dataclasses import replace

import pytest
import torch
from unit_worlds import chain, normed, placed, residual
from yaml_checks import check_file

from fedray.errors import ConfigError
from fedray.pruners import Hybrid, Structured
from fedray.round import FieldError, Message, Server
from fedray.strategies import FedAvg
from fedray.sums import Sums
from fedray.tree import Tree, equal, restrict

GRADUAL = Structured(sparsity=0.8, schedule="linear", start=1, finish=5, every=2)


@pytest.fixture
def here(world):
    return placed(world, chain())


def server_of(here, **tensors):
    params = Tree.zeros(here.layout)
    params = Tree(here.layout, params.flat + 100.0)
    for name, rows in tensors.items():
        params[name.replace("__", ".")].copy_(torch.tensor(rows))
    return Server(params=params, buffers=Tree.zeros(here.stats))


def test_the_units_of_least_norm_go_with_bias_and_with_what_reads_them_by_hand(here):
    a = [[1.0, -1.0, 1.0], [0.0, 0.0, 5.0], [2.0, 2.0, -2.0], [-1.0, -1.0, 0.0]]  # norms 3, 5, 6 and 2
    b = [[float(at)] * 4 for at in (3, -5, 1, 4, -2)]
    server = server_of(here, a__weight=a, b__weight=b)
    pruned, _ = Structured(sparsity=0.5).init_server(server, here.ctx(0))
    mask = pruned.mask
    # 2 of 4 stay, and of 5 the ceiling of 2.5.
    assert mask["a.bias"].tolist() == [False, True, True, False]
    assert mask["b.bias"].tolist() == [True, True, False, True, False]
    assert torch.equal(mask["a.weight"], mask["a.bias"][:, None].expand(4, 3))
    assert torch.equal(mask["b.weight"], mask["b.bias"][:, None] & mask["a.bias"][None])
    assert torch.equal(mask["c.weight"], mask["b.bias"][None].expand(2, 5))
    assert bool(mask["c.bias"].all())
    # A matrix keeps the product: 2 * 3, 3 * 2 and 2 * 3; all outputs stay.
    assert mask.counts() == {"a.weight": 6, "a.bias": 2, "b.weight": 6, "b.bias": 3, "c.weight": 6, "c.bias": 2}
    assert equal(pruned.params, restrict(server.params, mask))


def test_one_mask_cuts_filters_norms_and_the_run_of_inputs_behind_the_flattening(world):
    here = placed(world, normed())
    conv = torch.ones(4, 1, 3, 3) * torch.tensor([4.0, 1.0, 3.0, 2.0]).view(4, 1, 1, 1)
    server = server_of(here, conv__weight=conv.tolist(), norm__weight=[0.1, 0.4, -0.3, 0.2])
    by_norm = {"l1": [True, False, True, False], "norm_scale": [False, True, True, False]}
    for score, stays in by_norm.items():
        mask = Structured(sparsity=0.5, score=score).init_server(server, here.ctx(0))[0].mask
        assert [mask[name].tolist() for name in ("norm.weight", "norm.bias")] == [stays, stays]
        assert mask["conv.weight"].flatten(1).all(1).tolist() == stays
        assert mask["fc.weight"].tolist() == [[keep for keep in stays for _ in range(2)]] * 3
        assert mask.counts()["conv.weight"] == 18


def test_channels_of_a_residual_stream_go_everywhere_at_once(world):
    here = placed(world, residual())
    mask = Structured(sparsity=0.5).init_server(here.server, here.ctx(0))[0].mask
    stream = mask["stem.weight"].flatten(1).all(1)
    assert int(stream.sum()) == 2
    assert torch.equal(mask["one.out.weight"].flatten(1).any(1), stream)
    assert torch.equal(mask["two.out.weight"].flatten(1).any(1), stream)
    assert torch.equal(mask["one.in.weight"].flatten(2).all(2).any(0), stream)
    # 2 * 2 * 9, (3 * 2 * 9) twice, (1 * 2 * 9) twice, 3 * 2.
    assert list(mask.counts().values()) == [36, 54, 54, 18, 18, 6]


def test_whole_residual_blocks_go_where_they_are_named(world):
    here = placed(world, residual())
    params = Tree(here.layout, torch.ones(here.layout.size))
    params["one.in.weight"].mul_(0.5)
    server = Server(params=params, buffers=Tree.zeros(here.stats))
    mask = Structured(sparsity=0.5, units=("block",)).init_server(server, here.ctx(0))[0].mask
    # The mean of |w| is 0.75 in the first block and 1 in the other.
    assert list(mask.counts().values()) == [72, 0, 0, 72, 72, 12]


def counts_by_round(servers, names):
    return [[int(server.mask[name].sum()) for name in names] for server in servers if server.mask is not None]


def test_the_mask_moves_on_pruning_rounds_rests_between_and_keeps_exact_counts(here):
    servers = here.run([GRADUAL, FedAvg()], 8)
    assert servers[0].mask is None
    moved = [before.mask != after.mask for before, after in itertools.pairwise(servers)]
    # Events in rounds 1, 3 and 5, of sparsity 0, 0.4 and 0.8: 4, 3, 1 of 4 units stay, and 5, 3, 1 of 5.
    assert moved == [True, False, True, False, True, False, False, False]
    assert counts_by_round(servers, ("a.bias", "b.bias")) == [[4, 5]] * 2 + [[3, 3]] * 2 + [[1, 1]] * 4
    for number, change in enumerate(moved, start=1):
        assert GRADUAL.changes_masks(number) is change
    for before, after in itertools.pairwise(servers[1:]):
        assert not (after.mask.flat & ~before.mask.flat).any()


def test_a_warm_start_trains_densely_until_its_round(here):
    policy = Structured(sparsity=0.5, start=3)
    servers = here.run([policy, FedAvg()], 4)
    assert [server.mask is None for server in servers] == [True, True, True, False, False]
    assert [policy.changes_masks(number) for number in range(5)] == [False, False, False, True, False]


def test_clients_train_the_smaller_model_where_there_is_one(here):
    for shrink in (True, False):
        policies = [Structured(sparsity=0.5, start=1, shrink=shrink), FedAvg()]
        server = here.start(*policies)
        assert here.answer(policies, server, 1, 0)[0].shrink is False
        server = here.round(policies, server, 1)[0]
        job, fit, upload = here.answer(policies, server, 2, 0)
        assert job.shrink is shrink
        assert job.mask == fit.mask == upload.mask == upload.parts["delta"].support == server.mask


def test_parameters_are_zero_outside_the_mask_after_every_round(here):
    for policy in (GRADUAL, replace(GRADUAL, ranking="global")):
        for server in here.run([policy, FedAvg()], 6):
            assert server.mask is None or not server.params.flat[~server.mask.flat].any()


def test_sparsity_zero_is_the_dense_run_bit_for_bit(here):
    for policy in (Structured(sparsity=0.0), Structured(sparsity=0.0, ranking="global")):
        dense, run = here.run([FedAvg()], 3), here.run([policy, FedAvg()], 3)
        assert all(equal(a.params, b.params) for a, b in zip(dense, run, strict=True))


CHANGES = [
    {"sparsity": 0.4},
    {"units": ("block",)},
    {"units": ("filter", "block")},
    {"score": "l2"},
    {"score": "group"},
    {"score": "fpgm"},
    {"ranking": "global"},
    {"ranking": "global", "most": 1.0},
    {"schedule": "cubic"},
    {"start": 2},
    {"finish": 4},
    {"every": 1},
]


@pytest.mark.parametrize("change", CHANGES, ids=repr)
def test_every_hyper_parameter_is_read(world, change):
    here = placed(world, residual())
    other = replace(GRADUAL, **change)
    one, two = ([s.params.flat for s in here.run([p, FedAvg()], 6)] for p in (GRADUAL, other))
    assert not torch.equal(torch.stack(one), torch.stack(two))


def test_a_global_ranking_is_capped_by_most(world):
    here = placed(world, residual())
    size = {most: here.start(Structured(sparsity=0.6, ranking="global", most=most)).mask for most in (0.6, 1.0)}
    # At most 2 of 4, 3 of 6 and 1 of 2 may go: then 2, 3 and 1 are left, where 5 of 12 were asked for.
    left = here.ctx(0).structure.kept(size[0.6])
    assert [int(left[name].sum()) for name in ("stem", "one.in", "two.in")] == [2, 3, 1]
    left = here.ctx(0).structure.kept(size[1.0])
    assert sum(int(left[name].sum()) for name in ("stem", "one.in", "two.in")) == 5


def test_hooks_write_to_no_input_answer_the_same_twice_and_the_policy_is_a_value(here):
    policy = replace(GRADUAL, start=0, ranking="global")
    policies = [policy, FedAvg()]
    server = here.round(policies, here.start(*policies), 1)[0]
    answer = here.answer(policies, server, 2, 1)[2]
    sums = Sums().add(answer)
    before = pickle.dumps((server, answer))
    for _ in range(2):
        after = [
            policy.init_server(here.server, here.ctx(0)),
            policy.begin(Message(), here.job(), None, here.ctx(2, 1)),
            policy.settle(server, sums, None, here.ctx(2))[0],
        ]
        assert pickle.dumps((server, answer)) == before
    again = policy.settle(server, sums, None, here.ctx(2))[0]
    assert again.mask == after[2].mask != server.mask
    assert pickle.loads(pickle.dumps(policy)) == policy


BAD = [
    ("sparsity", 1.0, "it is 0 to below 1; 0.9 keeps 1 in 10"),
    ("units", ["filters"], "list some of filter, neuron, head, block"),
    ("units", [], "list some of filter, neuron, head, block"),
    ("score", "taylor", "choose l1, l2, group, norm_scale, fpgm"),
    ("ranking", "layer", "choose local or global"),
    ("most", 1.5, "it is a fraction of a group's units, at most 1, and under a global ranking at least the sparsity"),
    ("schedule", "step", "choose one_shot, linear, cubic, iterative"),
    ("start", -1, "it is a round, and 0 prunes before the first"),
    ("every", 0, "it is a number of rounds, at least 1"),
]


@pytest.mark.parametrize(("field", "value", "rule"), BAD)
def test_a_bad_hyper_parameter_is_refused_in_one_sentence(field, value, rule):
    with pytest.raises(FieldError) as caught:
        Structured(**{"sparsity": 0.5, field: value})
    assert str(caught.value) == f"{field} is {value!r}; {rule}"


def test_a_cap_below_the_sparsity_is_refused_under_a_global_ranking():
    Structured(sparsity=0.9, most=0.5)
    with pytest.raises(FieldError, match=r"most is 0\.5; it is a fraction of a group's units, at most 1, and under"):
        Structured(sparsity=0.9, most=0.5, ranking="global")


def test_a_schedule_that_ends_after_the_run_is_refused(here):
    with pytest.raises(ConfigError) as caught:
        GRADUAL.check(here.facts(GRADUAL, FedAvg(), rounds=4))
    assert str(caught.value) == (
        "pruner.finish is 5; it must be at most rounds (4), or the sparsity of 0.8 is never reached; lower it or raise "
        "rounds"
    )


def test_the_file_of_settings_is_complete_explained_and_accepted():
    check_file("structured")


def test_units_that_the_model_has_not_and_scores_that_say_nothing_are_refused_before_a_late_start(world):
    here = placed(world, residual())
    for policy in (Structured(sparsity=0.5, start=10), Hybrid(sparsity=0.5, start=10)):
        facts = replace(here.facts(policy, FedAvg()), structure=here.ctx(0).structure)
        policy.check(facts)
        with pytest.raises(ConfigError, match=r"^pruner.units is \['head'\]; this model has none of them, it has"):
            replace(policy, units=("head",)).check(facts)
        for field in ("score", "unit_score"):
            if hasattr(policy, field):
                with pytest.raises(ConfigError, match=r"^pruner's score of units is norm_scale; it says nothing about"):
                    replace(policy, **{field: "norm_scale"}).check(facts)
                with pytest.raises(ConfigError, match=r"^pruner's score of units is fpgm; it says nothing about block"):
                    replace(policy, units=("block",), **{field: "fpgm"}).check(facts)
