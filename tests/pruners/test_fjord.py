"""Ordered dropout: which widths a step draws from, and the mean by nested bands."""

import pickle
from dataclasses import replace

import pytest
import torch
from unit_worlds import chain, normed, placed
from yaml_checks import check_file

from fedray.corrections import FedSAM
from fedray.errors import ConfigError
from fedray.prune.widths import window
from fedray.pruners import FjORD
from fedray.round import FieldError, Message, View
from fedray.strategies import FedAvg, FedSGD
from fedray.tree import equal, restrict


def policy_of(*rates, **changes):
    return FjORD(rates=rates, shares=(1,) * len(rates), **changes)


@pytest.fixture
def here(world):
    return placed(world, chain())


def masks(here, rates):
    structure = here.ctx(0).structure
    return [structure.mask(window(structure, rate)) for rate in rates]


def largest(here, policy):
    return [policy.rate(here.ctx(1, client)) for client in range(len(here.sizes))]


THIRDS = policy_of(1.0, 0.6, 0.2)


def test_a_step_draws_from_all_widths_up_to_the_clients_own_the_own_one_last(here):
    widths = dict(zip((1.0, 0.6, 0.2), masks(here, (1.0, 0.6, 0.2)), strict=True))
    seen = set()
    for client, own in enumerate(largest(here, THIRDS)):
        job = here.answer([THIRDS, FedAvg()], here.server, 1, client)[0]
        seen.add(own)
        # Of 4 and 5 units: 1 and 1, 3 and 3, 4 and 5.
        if own == 0.2:
            assert job.submodels == ()
            assert not job.distils
            assert list(job.mask.counts().values()) == [3, 1, 1, 1, 2, 2]
        elif own == 0.6:
            assert job.submodels == (widths[0.2], widths[0.6])
            assert job.mask == widths[0.6]
            assert list(job.mask.counts().values()) == [9, 3, 9, 3, 6, 2]
        else:
            assert job.submodels == (widths[0.2], widths[0.6], widths[1.0])
            assert job.mask is None
        assert job.shrink
        assert job.distils is (own > 0.2)
    assert seen == {0.2, 0.6, 1.0}


def test_distillation_and_shrinking_are_choices(here):
    for policy in (replace(THIRDS, distils=False), replace(THIRDS, shrink=False)):
        for client in range(3):
            job = here.answer([policy, FedAvg()], here.server, 1, client)[0]
            assert job.shrink is policy.shrink
            assert not job.distils or policy.distils


def test_the_mean_is_that_of_nested_bands_by_examples(here):
    server = here.server
    after, uploads = here.round([THIRDS, FedAvg()], server, 1)
    own = largest(here, THIRDS)
    wanted, inner = server.params.flat.clone(), None
    for rate, mask in zip((0.2, 0.6, 1.0), masks(here, (0.2, 0.6, 1.0)), strict=True):
        band = mask.flat if inner is None else mask.flat & ~inner
        holders = [client for client in range(3) if own[client] >= rate]
        total = sum(here.sizes[client] for client in holders)
        ends = [server.params.flat + uploads[client]["delta"].flat for client in holders]
        mean = sum(here.sizes[c] / total * end for c, end in zip(holders, ends, strict=True))
        wanted[band] = mean[band]
        inner = mask.flat
    assert torch.allclose(after.params.flat, wanted, atol=1e-6)


def test_clients_of_the_whole_width_alone_are_fedavg_bit_for_bit(here):
    for one, two in zip(here.run([policy_of(1.0), FedAvg()], 4), here.run([FedAvg()], 4), strict=True):
        assert equal(one.params, two.params)
    # Also where there are narrower widths that nobody has: which of them steps draw is the trainer's affair.
    wide = FjORD(rates=(1.0, 0.5), shares=(1, 0))
    for one, two in zip(here.run([wide, FedAvg()], 4), here.run([FedAvg()], 4), strict=True):
        assert equal(one.params, two.params)


def test_a_prefix_of_the_model_does_not_depend_on_what_clients_made_of_wider_bands(here):
    server = here.server
    after, uploads = here.round([THIRDS, FedAvg()], server, 1)
    inner = masks(here, (0.2,))[0].flat
    narrow, total = server.params.flat.clone(), sum(here.sizes)
    for client, upload in enumerate(uploads):
        assert upload.parts["delta"].support is None or bool(upload.parts["delta"].support.flat[inner].all())
        narrow += here.sizes[client] / total * torch.where(inner, upload["delta"].flat, 0.0)
    assert torch.allclose(after.params.flat[inner], narrow[inner], atol=1e-6)
    moved = here.round([THIRDS, FedAvg()], replace(server, params=Outside.of(server, inner)), 1)[0]
    assert torch.equal(moved.params.flat[inner], after.params.flat[inner])


class Outside:
    """A server's parameters with other values outside of a band."""

    @staticmethod
    def of(server, inner):
        return type(server.params)(server.params.layout, torch.where(inner, server.params.flat, server.params.flat + 7))


def test_a_client_is_evaluated_at_its_largest_width(here):
    for client, own in enumerate(largest(here, THIRDS)):
        given = View(params=here.server.params, buffers=here.server.buffers, mask=None)
        seen = THIRDS.view(given, None, here.ctx(1, client))
        if own == 1.0:
            assert seen is given
        else:
            assert seen.mask == masks(here, (own,))[0]
            assert equal(seen.params, restrict(here.server.params, seen.mask))


def test_masks_rest_unless_clients_are_dealt_anew(here):
    assert [THIRDS.changes_masks(number) for number in range(3)] == [False] * 3
    assert replace(THIRDS, assignment="dynamic").changes_masks(1)
    sent = [[here.answer([THIRDS, FedAvg()], here.server, n, c)[2].mask for c in range(3)] for n in (1, 5)]
    assert sent[0] == sent[1]


def test_hooks_write_to_no_input_answer_the_same_twice_and_the_policy_is_a_value(world):
    here = placed(world, normed())
    for client in range(3):
        ctx = here.ctx(2, client)
        _, fit, upload = here.answer([THIRDS, FedAvg()], here.server, 2, client)
        before = pickle.dumps((here.server, fit, upload))
        first, second = (
            pickle.dumps(
                (
                    THIRDS.send(here.server, Message(), None, ctx),
                    THIRDS.begin(fit.received, here.job(), None, ctx),
                    THIRDS.end(fit, upload, None, ctx),
                )
            )
            for _ in range(2)
        )
        assert first == second
        assert pickle.dumps((here.server, fit, upload)) == before
    assert pickle.loads(pickle.dumps(THIRDS)) == THIRDS


@pytest.mark.parametrize(
    "change", [{"rates": (1.0, 0.6, 0.4)}, {"shares": (1, 2, 0)}, {"assignment": "dynamic"}], ids=repr
)
def test_every_hyper_parameter_of_the_course_is_read(here, change):
    one, two = ([s.params.flat for s in here.run([p, FedAvg()], 4)] for p in (THIRDS, replace(THIRDS, **change)))
    assert not torch.equal(torch.stack(one), torch.stack(two))


def test_bad_values_and_bad_company_are_refused(here):
    with pytest.raises(FieldError, match=r"rates is \(0\.2, 1\.0\); they fall from at most 1 to above 0"):
        policy_of(0.2, 1.0)
    with pytest.raises(FieldError, match=r"shares is \(1, 1\); it has one number for each of the 5 rates"):
        FjORD(shares=(1, 1))
    with pytest.raises(ConfigError, match="pruner is fjord; it needs a strategy that sends part 'delta'"):
        THIRDS.check(here.facts(THIRDS, FedSGD()))


def test_the_file_of_settings_is_complete_explained_and_accepted():
    check_file("fjord")


def test_what_steps_on_parts_cannot_do_is_refused_before_the_start(here):
    facts = here.facts(THIRDS, FedAvg(), FedSAM(rho=0.1))
    with pytest.raises(ConfigError, match=r"^fedsam takes gradients beside the weights, and each step of pruner fjord"):
        THIRDS.check(facts)
    THIRDS.check(here.facts(THIRDS, FedAvg(), FedSAM(rho=0.0)))
    numbers = replace(here.facts(THIRDS, FedAvg()), objective="regression")
    with pytest.raises(ConfigError, match=r"^pruner.distils is True and the data's objective is regression; .*false"):
        THIRDS.check(numbers)
    replace(THIRDS, distils=False).check(numbers)
    # Where each client has a single rate, no step draws one.
    for single in (policy_of(1.0), replace(THIRDS, shares=(0, 0, 1))):
        single.check(replace(facts, objective="regression"))
