"""A window of units that rolls from round to round, by hand on a chain of linear layers."""

import pickle
from dataclasses import replace

import pytest
import torch
from unit_worlds import chain, normed, placed, residual
from yaml_checks import check_file

from fedray.errors import ConfigError
from fedray.pruners import FedRolex, HeteroFL
from fedray.round import FieldError, Message, View
from fedray.strategies import FedAvg, FedSGD
from fedray.tree import equal

HALF = FedRolex(rates=(0.5,), shares=(1,))


@pytest.fixture
def here(world):
    return placed(world, chain())


def held(here, policy, number, names=("a.bias", "b.bias"), client=0):
    mask = here.answer([policy, FedAvg()], here.server, number, client)[0].mask
    return ["".join("x" if kept else "." for kept in mask[name]) for name in names]


def test_the_window_moves_by_a_unit_each_round_and_comes_round_by_hand(here):
    # 2 of 4 and 3 of 5 units.
    assert [held(here, HALF, number) for number in range(1, 7)] == [
        ["xx..", "xxx.."],
        [".xx.", ".xxx."],
        ["..xx", "..xxx"],
        ["x..x", "x..xx"],
        ["xx..", "xx..x"],
        [".xx.", "xxx.."],
    ]
    assert [held(here, replace(HALF, shift=2), number) for number in (1, 2, 3)] == [
        ["xx..", "xxx.."],
        ["..xx", "..xxx"],
        ["xx..", "xx..x"],
    ]


def test_after_as_many_rounds_as_units_each_unit_was_held_equally_often(world):
    for model, (name, size) in ((chain(), ("b.bias", 5)), (normed(), ("norm.weight", 4))):
        here = placed(world, model)
        for rate in (0.5, 0.25):
            policy = replace(HALF, rates=(rate,))
            for client in range(3):
                counts = torch.zeros(size, dtype=torch.int64)
                for number in range(7, 7 + size):
                    counts += here.answer([policy, FedAvg()], here.server, number, client)[0].mask[name]
                assert len(set(counts.tolist())) == 1


def test_every_coordinate_is_trained_though_no_client_holds_the_whole(here):
    servers = here.run([HALF, FedAvg()], 20)
    assert bool((servers[-1].params.flat != servers[0].params.flat).all())
    prefix = here.run([replace(HALF, shift=0), FedAvg()], 20)
    untouched = prefix[-1].params.flat == prefix[0].params.flat
    assert int(untouched.sum()) == here.layout.size - (6 + 2 + 6 + 3 + 6 + 2)


def test_all_outputs_and_inputs_stay_and_what_reads_a_unit_rolls_with_it(here):
    mask = here.answer([HALF, FedAvg()], here.server, 2, 0)[0].mask
    assert bool(mask["c.bias"].all())
    assert mask["c.weight"].any(0).tolist() == mask["b.bias"].tolist()
    assert torch.equal(mask["b.weight"], mask["b.bias"][:, None] & mask["a.bias"][None])
    assert torch.equal(mask["a.weight"], mask["a.bias"][:, None].expand(4, 3))


def test_channels_of_residual_connections_have_one_window(world):
    here = placed(world, residual())
    for number in range(1, 6):
        mask = here.answer([HALF, FedAvg()], here.server, number, 0)[0].mask
        stream = mask["stem.weight"].flatten(1).all(1)
        assert int(stream.sum()) == 2
        for name in ("one.out.weight", "two.out.weight"):
            assert torch.equal(mask[name].flatten(1).any(1), stream)
        for name in ("one.in.weight", "two.in.weight", "fc.weight"):
            assert torch.equal(mask[name].movedim(1, 0).flatten(1).any(1), stream)


def test_the_first_round_is_that_of_nested_prefixes(here):
    rates = {"rates": (1.0, 0.5), "shares": (1, 2)}
    plain = HeteroFL(scaler=False, masked_loss=False, own_labels=False, **rates)
    rolling = FedRolex(**rates)
    one, two = here.run([plain, FedAvg()], 2), here.run([rolling, FedAvg()], 2)
    assert equal(one[1].params, two[1].params)
    assert not equal(one[2].params, two[2].params)


def test_at_rate_one_for_everyone_it_is_fedavg_bit_for_bit(world):
    for model in (chain(), normed()):
        here = placed(world, model)
        whole = FedRolex(rates=(1.0,), shares=(1,))
        for one, two in zip(here.run([whole, FedAvg()], 4), here.run([FedAvg()], 4), strict=True):
            assert equal(one.params, two.params)
            assert equal(one.buffers, two.buffers)


def test_masks_move_in_every_round_but_the_first_unless_nothing_rolls(here):
    assert [HALF.changes_masks(number) for number in range(4)] == [False, False, True, True]
    for still in (replace(HALF, shift=0), FedRolex(rates=(1.0,), shares=(1,)), FedRolex(shares=(1, 0, 0, 0, 0))):
        assert not any(still.changes_masks(number) for number in range(4))
    assert [replace(FedRolex(), assignment="dynamic").changes_masks(n) for n in range(3)] == [False, True, True]


def test_a_client_is_evaluated_on_the_window_of_the_round(here):
    given = View(params=here.server.params, buffers=here.server.buffers, mask=None)
    for number in (1, 2):
        seen = HALF.view(given, None, here.ctx(number, 0))
        assert seen.mask == here.answer([HALF, FedAvg()], here.server, number, 0)[0].mask
        assert not seen.params.flat[~seen.mask.flat].any()


def test_hooks_write_to_no_input_answer_the_same_twice_and_the_policy_is_a_value(world):
    here = placed(world, normed())
    policy = replace(FedRolex(), assignment="dynamic")
    for client in range(3):
        ctx = here.ctx(2, client)
        _, fit, upload = here.answer([policy, FedAvg()], here.server, 2, client)
        before = pickle.dumps((here.server, fit, upload))
        first, second = (
            pickle.dumps(
                (
                    policy.send(here.server, Message(), None, ctx),
                    policy.begin(fit.received, here.job(), None, ctx),
                    policy.end(fit, upload, None, ctx),
                )
            )
            for _ in range(2)
        )
        assert first == second
        assert pickle.dumps((here.server, fit, upload)) == before
    assert pickle.loads(pickle.dumps(policy)) == policy


@pytest.mark.parametrize(
    "change", [{"rates": (1.0, 0.25)}, {"shares": (2, 1)}, {"assignment": "dynamic"}, {"shift": 2}], ids=repr
)
def test_every_hyper_parameter_of_the_course_is_read(here, change):
    base = FedRolex(rates=(1.0, 0.5), shares=(1, 2))
    one, two = ([s.params.flat for s in here.run([p, FedAvg()], 4)] for p in (base, replace(base, **change)))
    assert not torch.equal(torch.stack(one), torch.stack(two))
    assert not here.answer([replace(HALF, shrink=False), FedAvg()], here.server, 1, 0)[0].shrink


def test_bad_values_and_bad_company_are_refused(here):
    with pytest.raises(FieldError, match="shift is -1; it is a number of units, at least 0"):
        FedRolex(shift=-1)
    with pytest.raises(FieldError, match=r"rates is \(0\.5, 0\.5\); they fall from at most 1 to above 0"):
        FedRolex(rates=(0.5, 0.5), shares=(1, 1))
    with pytest.raises(ConfigError, match="pruner is fedrolex; it needs a strategy that sends part 'delta'"):
        HALF.check(here.facts(HALF, FedSGD()))


def test_the_file_of_settings_is_complete_explained_and_accepted():
    check_file("fedrolex")
