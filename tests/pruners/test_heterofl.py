"""Nested widths by capacity, by hand on a chain of linear layers and a normalised convolution."""

import pickle
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from unit_worlds import chain, normed, placed, residual
from yaml_checks import check_file

from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.personal import StaticNorm
from fedray.prune.widths import window
from fedray.pruners import FedRolex, FjORD, HeteroFL
from fedray.round import FieldError, Loss, Message, View
from fedray.strategies import FedAvg, FedSGD
from fedray.sums import Sums
from fedray.tree import Mask, equal, restrict

PLAIN = {"scaler": False, "masked_loss": False, "own_labels": False}
HALVES = HeteroFL(rates=(1.0, 0.5), shares=(1, 2), **PLAIN)
LABELS = ((5, 5), (30, 0), (0, 5))


@pytest.fixture
def here(world):
    return placed(world, chain())


def rates(here, policy, number=1):
    return [policy.rate(here.ctx(number, client)) for client in range(len(here.sizes))]


def test_a_client_is_sent_trains_and_sends_the_first_units_of_every_group_by_hand(here):
    policies = [HALVES, FedAvg()]
    server = here.start(*policies)
    assert server.mask is None
    narrow = rates(here, HALVES).index(0.5)
    job, fit, upload = here.answer(policies, server, 1, narrow)
    # 2 of 4 and 3 of 5 units, all inputs and outputs: 2 * 3, 2, 3 * 2, 3, 2 * 3 and 2 numbers.
    assert list(job.mask.counts().values()) == [6, 2, 6, 3, 6, 2]
    assert job.mask["a.bias"].tolist() == [True, True, False, False]
    assert job.mask["b.bias"].tolist() == [True, True, True, False, False]
    assert job.mask == fit.mask == upload.mask == upload.parts["delta"].support
    assert equal(fit.received["params"], restrict(server.params, job.mask))
    assert fit.received.mask == job.mask
    assert job.shrink
    wide = here.answer(policies, server, 1, rates(here, HALVES).index(1.0))
    assert wide[0].mask is wide[2].mask is None
    assert not wide[0].shrink


def test_the_server_averages_each_coordinate_over_its_holders_and_keeps_what_nobody_holds(here):
    held = rates(here, HALVES)
    assert sorted(held) == [0.5, 0.5, 1.0]
    policies = [HALVES, FedAvg(weight_by="uniform")]
    server = here.start(*policies)
    after, uploads = here.round(policies, server, 1)
    small = here.ctx(0).structure.mask(window(here.ctx(0).structure, 0.5)).flat
    ends = [server.params.flat + upload["delta"].flat for upload in uploads]
    wide = held.index(1.0)
    assert torch.allclose(after.params.flat[small], torch.stack(ends).mean(0)[small], atol=1e-6)
    assert torch.allclose(after.params.flat[~small], ends[wide][~small], atol=1e-6)
    narrow = [client for client in range(3) if client != wide]
    alone, _ = here.round(policies, server, 1, clients=narrow)
    assert torch.equal(alone.params.flat[~small], server.params.flat[~small])
    assert not torch.equal(alone.params.flat[small], server.params.flat[small])


@pytest.mark.parametrize("assignment", ["fixed", "dynamic"])
def test_at_rate_one_for_everyone_it_is_fedavg_bit_for_bit_and_sends_the_same(world, assignment):
    for model in (chain(), normed(), residual()):
        here = placed(world, model)
        policy = HeteroFL(rates=(1.0,), shares=(1.0,), assignment=assignment, **PLAIN)
        for one, two in zip(here.run([policy, FedAvg()], 4), here.run([FedAvg()], 4), strict=True):
            assert equal(one.params, two.params)
            assert equal(one.buffers, two.buffers)
        sent = [here.answer([*p, FedAvg()], here.server, 1, 1)[2] for p in ((policy,), ())]
        assert sent[0].mask is sent[1].mask is None


def test_a_fixed_deal_lasts_and_a_dynamic_one_changes_with_the_round(world):
    here = placed(world, chain(), sizes=(1,) * 20)
    fixed = HeteroFL(**PLAIN)
    dynamic = replace(fixed, assignment="dynamic")
    assert rates(here, fixed, 1) == rates(here, fixed, 9)
    assert rates(here, dynamic, 1) != rates(here, dynamic, 2)
    for policy in (fixed, dynamic):
        counts = [rates(here, policy, 3).count(rate) for rate in policy.rates]
        assert counts == [4] * 5
        assert rates(here, policy, 3) == rates(here, policy, 3)
    assert [fixed.changes_masks(number) for number in range(3)] == [False] * 3
    assert [dynamic.changes_masks(number) for number in range(3)] == [False, True, True]


def test_outputs_are_sent_only_of_classes_that_a_client_has(world):
    here = placed(world, chain(), labels=LABELS)
    policy = replace(HALVES, rates=(1.0,), shares=(1,), own_labels=True)
    policies = [policy, FedAvg()]
    server = here.start(*policies)
    rows = []
    for client in range(3):
        job, _, upload = here.answer(policies, server, 1, client)
        assert job.mask is None
        rows.append(None if upload.mask is None else upload.mask["c.bias"].tolist())
        if upload.mask is not None:
            assert upload.mask["c.weight"].all(1).tolist() == rows[-1]
            assert bool(upload.mask["a.weight"].all())
            assert not upload["delta"].flat[~upload.mask.flat].any()
    assert rows == [None, [True, False], [False, True]]
    after, _ = here.round(policies, server, 1, clients=[1])
    assert torch.equal(after.params["c.weight"][1], server.params["c.weight"][1])
    assert not torch.equal(after.params["c.weight"][0], server.params["c.weight"][0])


def test_the_scaler_is_the_rate_and_absent_classes_are_zeroed_in_training(world):
    here = placed(world, chain(), labels=LABELS)
    plain, full = HALVES, replace(HALVES, scaler=True, masked_loss=True)
    for client, zeroed in enumerate([(), (1,), (0,)]):
        for policy in (plain, full):
            job = here.answer([policy, FedAvg()], here.server, 1, client)[0]
            assert job.scaler == (policy.rate(here.ctx(1, client)) if policy is full else 1.0)
            assert job.loss == (Loss(zeroed=zeroed) if policy is full else Loss())
    smooth = replace(here.job(), loss=Loss(smoothing=0.1))
    assert full.begin(Message(), smooth, None, here.ctx(1, 1))[1].loss == Loss(smoothing=0.1, zeroed=(1,))


def test_statistics_of_channels_that_a_client_does_not_hold_are_the_servers(world):
    here = placed(world, normed())
    policies = [HALVES, FedAvg()]
    for client, rate in enumerate(rates(here, HALVES)):
        fit = here.answer(policies, here.server, 1, client)[1]
        moved = (fit.buffers["norm.running_mean"] - here.server.buffers["norm.running_mean"]).tolist()
        assert moved == pytest.approx([client] * 4 if rate == 1.0 else [client, client, 0, 0])


def test_a_client_is_evaluated_at_its_own_width(here):
    server = here.server
    for client, rate in enumerate(rates(here, HALVES)):
        given = View(params=server.params, buffers=server.buffers, mask=None)
        seen = HALVES.view(given, None, here.ctx(1, client))
        if rate == 1.0:
            assert seen is given
            continue
        assert list(seen.mask.counts().values()) == [6, 2, 6, 3, 6, 2]
        assert equal(seen.params, restrict(server.params, seen.mask))


def test_hooks_write_to_no_input_answer_the_same_twice_and_the_policy_is_a_value(world):
    here = placed(world, normed(), labels=((1, 0, 2), (3, 3, 3), (0, 0, 5)))
    policy = HeteroFL(assignment="dynamic")
    policies = [policy, FedAvg()]
    for client in range(3):
        ctx = here.ctx(2, client)
        _, fit, upload = here.answer(policies, here.server, 2, client)
        inputs = (here.server, fit, upload)
        before = pickle.dumps(inputs)
        view = View(params=here.server.params, buffers=here.server.buffers, mask=None)

        def hooks(fit=fit, upload=upload, view=view, ctx=ctx):
            sent = policy.send(here.server, Message(), None, ctx)
            return pickle.dumps(
                (
                    sent,
                    policy.begin(fit.received, here.job(), None, ctx),
                    policy.end(fit, upload, None, ctx),
                    policy.view(view, None, ctx),
                    policy.settle(here.server, Sums().add(upload), None, here.ctx(2))[0],
                )
            )

        assert hooks() == hooks()
        assert pickle.dumps(inputs) == before
    assert pickle.loads(pickle.dumps(policy)) == policy


@pytest.mark.parametrize(
    "change",
    [{"rates": (1.0, 0.25)}, {"shares": (2, 1)}, {"assignment": "dynamic"}, {"own_labels": True}],
    ids=repr,
)
def test_every_hyper_parameter_of_the_course_is_read(world, change):
    here = placed(world, chain(), labels=LABELS)
    one, two = ([s.params.flat for s in here.run([p, FedAvg()], 4)] for p in (HALVES, replace(HALVES, **change)))
    assert not torch.equal(torch.stack(one), torch.stack(two))


def test_shrinking_is_read(here):
    narrow = rates(here, HALVES).index(0.5)
    assert not here.answer([replace(HALVES, shrink=False), FedAvg()], here.server, 1, narrow)[0].shrink


RATES = "they fall from at most 1 to above 0, such as [1.0, 0.5, 0.25]"
SHARES = "it has one number for each of the 5 rates, none below 0 and not all 0"
BAD = [
    *[("rates", value, RATES) for value in ((), (0.5, 1.0), (1.0, 1.0), (1.0, 0.0), (2.0, 1.0), (float("nan"),))],
    *[("shares", value, SHARES) for value in ((1.0,), (0,) * 5, (1, 1, 1, 1, -1), (float("nan"),) * 5)],
    ("assignment", "random", "choose fixed or dynamic"),
]


@pytest.mark.parametrize(("field", "value", "rule"), BAD)
def test_a_bad_hyper_parameter_is_refused_in_one_sentence(field, value, rule):
    with pytest.raises(FieldError) as caught:
        HeteroFL(**{field: value})
    assert str(caught.value) == f"{field} is {value!r}; {rule}"


def test_bad_company_is_refused(here):
    policy = HeteroFL()
    policy.check(here.facts(policy, FedAvg()))
    with pytest.raises(ConfigError, match="pruner is heterofl; it needs a strategy that sends part 'delta'"):
        policy.check(here.facts(policy, FedSGD()))
    tokens = replace(here.facts(policy, FedAvg()), objective="next_token")
    replace(policy, masked_loss=False, own_labels=False).check(tokens)
    with pytest.raises(ConfigError) as caught:
        policy.check(tokens)
    assert str(caught.value) == (
        "pruner is heterofl and the data's objective is next_token; pruner.masked_loss and pruner.own_labels go by the "
        "classes of examples: set both to false"
    )


def test_the_scaler_wants_a_model_that_normalises_and_statistics_made_without_it(here):
    with_norm = {"kinds": {"conv.weight": "weight", "norm.weight": "norm"}, "has_statistics": True}
    averaged = replace(here.facts(HALVES, FedAvg()), **with_norm)
    static = replace(averaged, policies=(("static", StaticNorm()), *averaged.policies))
    bare = replace(averaged, kinds={"fc.weight": "weight"}, has_statistics=False)
    scaled = replace(HALVES, scaler=True)
    HALVES.check(averaged)
    scaled.check(static)
    scaled.check(bare)
    with pytest.raises(ConfigError) as caught:
        scaled.check(averaged)
    assert str(caught.value) == (
        "pruner.scaler is True; running statistics of batch normalisation would be those of outputs 1 / rate times as "
        "large as in evaluation: set batch_norm=static, or pruner.scaler=false"
    )
    assert scaled.warns(static) == HALVES.warns(bare) == ()
    assert scaled.warns(bare)[0].startswith("pruner.scaler is True and this model normalises nothing: each hidden")


def test_masks_of_different_widths_are_nested(here):
    structure = here.ctx(0).structure
    masks = [structure.mask(window(structure, rate)) for rate in HeteroFL().rates]
    assert masks[0] == Mask.full(here.layout)
    for wide, narrow in pairwise(masks):
        assert wide & narrow == narrow


def test_the_file_of_settings_is_complete_explained_and_accepted():
    check_file("heterofl")


def test_a_start_that_is_pruned_stays_so_at_every_width(world):
    here = placed(world, chain())
    for policy in (
        HALVES,
        FedRolex(rates=(1.0, 0.5), shares=(1, 2)),
        FjORD(rates=(1.0, 0.5, 0.25), shares=(1, 1, 1), distils=False),
    ):
        policies = [policy, FedAvg()]
        held = Mask(here.layout, torch.rand(here.layout.size, generator=Key.of(3).torch()) < 0.5)
        server = here.server.cut(held)
        for number in range(1, 4):
            for client, rate in enumerate(rates(here, policy)):
                ctx = here.ctx(number, client)
                job, _, upload = here.answer(policies, server, number, client)
                units = None if rate == 1.0 else ctx.structure.mask(policy.held(ctx.structure, rate, ctx))
                assert job.mask == upload.mask == (held if units is None else held & units)
                assert all(not (part.flat & ~job.mask.flat).any() for part in job.submodels)
                given = View(params=server.params, buffers=server.buffers, mask=held)
                seen = policy.view(given, None, ctx)
                assert seen.mask == job.mask
                assert equal(seen.params, restrict(server.params, job.mask))
            server, _ = here.round(policies, server, number)
            assert server.mask == held
            assert not server.params.flat[~held.flat].any()


def test_it_warns_where_nobody_holds_the_whole_model(here):
    facts = here.facts(HALVES, FedAvg())
    narrow = {"rates": (0.5, 0.25), "shares": (1, 1)}
    for policy in (HALVES, FjORD(rates=(1.0, 0.5), shares=(1, 1)), FedRolex(rates=(1.0, 0.5), shares=(1, 1))):
        assert policy.warns(facts) == ()
        found = replace(policy, **narrow).warns(facts)
        wanted = [] if isinstance(policy, FedRolex) else ["of 3 clients none has rate 1:"]
        assert [text[:29] for text in found] == wanted
    assert len(FedRolex(**narrow, shift=0).warns(facts)) == 1
    # Five rates among three clients: 0.6 each, so the two last get nobody.
    assert [text[:32] for text in HeteroFL().warns(facts)] == ["3 clients are too few for these "]
