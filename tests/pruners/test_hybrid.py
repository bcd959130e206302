"""Units first, then weights, under one budget: by hand on a chain of linear layers."""

import itertools
import pickle
from dataclasses import replace

import pytest
import torch
from unit_worlds import chain, normed, placed, residual
from yaml_checks import check_file

from fedray.pruners import Hybrid, Magnitude
from fedray.round import FieldError, Server
from fedray.strategies import FedAvg
from fedray.sums import Sums
from fedray.tree import Tree, equal

GRADUAL = Hybrid(sparsity=0.8, schedule="linear", start=1, finish=5, every=2, ranking="global")


@pytest.fixture
def here(world):
    return placed(world, chain())


def test_both_stages_by_hand(here):
    # Prunable are 12 + 20 + 10 = 42 weights, of which 0.5 * 42 = 21 go, at most 0.6 * 21 = 12.6 of them with units.
    flat = torch.ones(here.layout.size) * 5
    params = Tree(here.layout, flat)
    params["a.weight"].copy_(torch.tensor([[9.0, 9.0, 9.0], [1.0, 1.0, 1.0], [8.0, 2.0, 8.0], [7.0, 7.0, 3.0]]))
    params["b.weight"].copy_(torch.tensor([[6.0], [6.0], [1.0], [6.0], [6.0]]).expand(5, 4))
    params["c.weight"][:, 0] = torch.tensor([0.5, 0.25])
    server = Server(params=params, buffers=Tree.zeros(here.stats))
    mask = Hybrid(sparsity=0.5, by_structure=0.6, ranking="global").init_server(server, here.ctx(0))[0].mask
    # Without unit 1 of a and unit 2 of b stay 9 + 12 + 8 = 29 weights, so 13 go: too many by a little. Without the
    # unit of b alone (a sparsity of 0.2 of the units) stay 12 + 16 + 8 = 36, so 6 go. 15 single weights follow: of c
    # 0.25 and 0.5, of a 1, 1, 1, 2 and 3, then of the eight 5 of c the 6 that are left, of b two 6, earliest first.
    assert mask["b.bias"].tolist() == [True, True, False, True, True]
    assert mask["a.bias"].all()
    assert not mask["b.weight"][2].any()
    assert not mask["c.weight"][:, 2].any()
    assert sum(mask.counts(here.prunable).values()) == 21
    assert mask["a.weight"].tolist() == [[True] * 3, [False] * 3, [True, False, True], [True, True, False]]
    # The 7 that are left of a, and 14 of the 16 sixes: ties stay at the lower index.
    assert mask.counts(here.prunable) == {"a.weight": 7, "b.weight": 14, "c.weight": 0}
    assert mask["b.weight"][4].tolist() == [True, True, False, False]


def test_the_budget_is_met_to_the_weight_on_every_event_and_units_have_their_share(world):
    for model in (chain(), normed(), residual()):
        here = placed(world, model)
        everything = here.all_prunable()
        for policy in (GRADUAL, replace(GRADUAL, ranking="local", allocation="erk", by_structure=1.0)):
            for number, server in enumerate(here.run([policy, FedAvg()], 7)):
                promised = policy.sparsity_after(number)
                if server.mask is None:
                    assert promised == 0.0
                    continue
                assert here.kept(server) == round((1.0 - promised) * everything)
                left = here.ctx(0).structure.mask(here.ctx(0).structure.kept(server.mask))
                by_units = everything - sum(left.counts(here.prunable).values())
                assert by_units <= policy.by_structure * (everything - here.kept(server)) + 1e-6 or number > 1


def test_the_mask_moves_on_pruning_rounds_and_rests_between(here):
    servers = here.run([GRADUAL, FedAvg()], 7)
    moved = [before.mask != after.mask for before, after in itertools.pairwise(servers)]
    assert moved == [True, False, True, False, True, False, False]
    # 42 weights: sparsity 0, 0.4 and 0.8 keep 42, 25 and 8.
    assert [here.kept(server) for server in servers[1:]] == [42, 42, 25, 25, 8, 8, 8]
    assert [GRADUAL.changes_masks(number) for number in range(1, 8)] == moved
    for before, after in itertools.pairwise(servers[1:]):
        assert not (after.mask.flat & ~before.mask.flat).any()
    assert not any(server.params.flat[~server.mask.flat].any() for server in servers[1:])


def test_without_a_share_for_units_it_is_magnitude_pruning_bit_for_bit(here):
    for how in ({"ranking": "global"}, {"ranking": "local", "allocation": "erk"}):
        times = {"schedule": "cubic", "start": 1, "finish": 5, "every": 2}
        hybrid = here.run([Hybrid(sparsity=0.8, by_structure=0.0, **how, **times), FedAvg()], 6)
        weights = here.run([Magnitude(sparsity=0.8, **how, **times), FedAvg()], 6)
        for one, two in zip(hybrid[1:], weights[1:], strict=True):
            assert equal(one.params, two.params)
            assert one.mask == two.mask


def test_the_larger_the_share_of_structure_the_more_units_go(world):
    here = placed(world, residual())
    gone = []
    for share in (0.0, 0.3, 0.6, 1.0):
        mask = here.start(Hybrid(sparsity=0.7, by_structure=share)).mask
        kept = here.ctx(0).structure.slices(mask)
        gone.append(0 if kept is None else here.layout.size - kept.layout(here.layout).size)
    assert gone == sorted(gone)
    assert gone[0] < gone[1] < gone[2]


def test_sparsity_zero_is_the_dense_run_bit_for_bit(here):
    dense, run = here.run([FedAvg()], 3), here.run([Hybrid(sparsity=0.0), FedAvg()], 3)
    assert all(equal(a.params, b.params) for a, b in zip(dense, run, strict=True))


def test_clients_train_the_smaller_model_under_a_mask_of_its_weights(here):
    policies = [Hybrid(sparsity=0.5), FedAvg()]
    server = here.start(*policies)
    job, _, upload = here.answer(policies, server, 1, 0)
    assert job.shrink
    assert job.mask == upload.mask == server.mask
    assert not here.answer([Hybrid(sparsity=0.5, shrink=False), FedAvg()], server, 1, 0)[0].shrink


CHANGES = [
    {"sparsity": 0.4},
    {"by_structure": 0.2},
    {"units": ("block",)},
    {"unit_score": "fpgm"},
    {"ranking": "local"},
    {"ranking": "local", "allocation": "erk"},
    {"schedule": "cubic"},
    {"start": 2},
    {"finish": 4},
    {"every": 1},
]


def test_every_hyper_parameter_is_read(world):
    here = placed(world, residual())
    base = replace(GRADUAL, by_structure=0.9)
    runs = [base, *(replace(base, **change) for change in CHANGES)]
    flats = [torch.stack([s.params.flat for s in here.run([policy, FedAvg()], 6)]) for policy in runs]
    for (at, one), (to, two) in itertools.combinations(enumerate(flats), 2):
        assert not torch.equal(one, two), ([{}, *CHANGES][at], CHANGES[to - 1])


def test_hooks_write_to_no_input_answer_the_same_twice_and_the_policy_is_a_value(here):
    policy = replace(GRADUAL, start=0)
    policies = [policy, FedAvg()]
    server = here.round(policies, here.start(*policies), 1)[0]
    sums = Sums().add(here.answer(policies, server, 2, 1)[2])
    before = pickle.dumps(server)
    first, second = (policy.settle(server, sums, None, here.ctx(2))[0] for _ in range(2))
    assert pickle.dumps(server) == before
    assert first.mask == second.mask != server.mask
    assert equal(first.params, second.params)
    assert pickle.loads(pickle.dumps(policy)) == policy


BAD = [
    ("sparsity", -0.1, "it is 0 to below 1; 0.9 keeps 1 in 10"),
    ("by_structure", 1.1, "it is a share of what is removed, 0 to 1"),
    ("units", ["layer"], "list some of filter, neuron, head, block"),
    ("unit_score", "taylor", "choose l1, l2, group, norm_scale, fpgm"),
    ("ranking", "layer", "choose local or global"),
    ("allocation", "even", "choose uniform, er, erk"),
]


@pytest.mark.parametrize(("field", "value", "rule"), BAD)
def test_a_bad_hyper_parameter_is_refused_in_one_sentence(field, value, rule):
    with pytest.raises(FieldError) as caught:
        Hybrid(**{"sparsity": 0.5, field: value})
    assert str(caught.value) == f"{field} is {value!r}; {rule}"


def test_the_file_of_settings_is_complete_explained_and_accepted():
    check_file("hybrid")
