"""FedSGD sends the gradient of one batch and steps at both rates; differences stay on what a client vouches for."""

from dataclasses import replace

import pytest
import torch
from quadratics import LAYOUT, NOTHING, context, draw, job, some

from fedray.round import Fit, Message, Part, Server
from fedray.strategies import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedDyn, FedNova, FedSGD, FedYogi
from fedray.sums import Sums
from fedray.tree import Tree, restrict

DIFFERENCES = [FedAvg(), FedAvgM(), FedAdagrad(), FedAdam(), FedYogi(), FedNova(), FedDyn()]


def fit_of(before, after, *, received, mask, **changes):
    """A client that was sent `before` under the mask `received` and answers with `after` under `mask`."""
    given = {"num_examples": 10, "num_steps": 3, "lr": 0.1, "loss": 0.0, **changes}
    message = Message(parts={"params": Part(value=restrict(before, received), support=received)}, mask=received)
    return Fit(received=message, params=restrict(after, mask), buffers=Tree.zeros(NOTHING), mask=mask, **given)


@pytest.mark.parametrize(
    ("rates", "factor"), [((0.1, 1.0, 1.0), 0.1), ((0.1, 0.5, 1.0), 0.05), ((0.1, 1.0, 0.3), 0.03), ((0.2, 3, 4), 2.4)]
)
def test_the_step_is_the_mean_gradient_times_the_rates_of_clients_strategy_and_round(rates, factor):
    lr, own, round_rate = rates
    policy, ctx, sums = FedSGD(lr=own), context(lr=lr, server_lr=round_rate), Sums()
    for name, weight in (("one", 1.0), ("two", 3.0)):
        sums.add(Message(parts={"gradient": Part(value=draw(name), weight=weight)}))
    server = policy.settle(Server(params=draw("origin"), buffers=Tree.zeros(NOTHING)), sums, None, ctx)[0]
    mean = (draw("one").flat.double() + 3 * draw("two").flat.double()) / 4
    assert torch.allclose(server.params.flat.double(), draw("origin").flat.double() - factor * mean, atol=1e-5)


@pytest.mark.parametrize(("batch_size", "size"), [(None, 10), (1, 1), (3, 3), (10, 10), (64, 10)])
def test_a_client_takes_one_gradient_of_as_many_examples_as_it_is_told(batch_size, size):
    message = Message(parts={"params": Part(value=draw("origin"))})
    given = FedSGD(batch_size=batch_size).begin(message, job(), None, context(client=0))[1]
    assert (given.num_steps, given.batch_size, given.lr) == (1, size, 0.0)
    assert "grad_sum" in given.wants


def test_a_gradient_is_sent_only_where_the_client_vouches():
    mask = some(3)
    fit = fit_of(draw("origin"), draw("origin"), received=None, mask=mask, num_steps=1)
    fit = replace(fit, evidence={"grad_sum": draw("gradient")})
    part = FedSGD().end(fit, Message(), None, context(client=0))[1].parts["gradient"]
    assert torch.equal(part.value.flat, torch.where(mask.flat, draw("gradient").flat, 0.0))
    assert torch.equal(part.support.flat, mask.flat)


@pytest.mark.parametrize("strategy", DIFFERENCES, ids=lambda strategy: type(strategy).__name__)
@pytest.mark.parametrize("received", [None, some(5, 0.8)], ids=["dense", "masked"])
def test_a_weight_that_a_client_dropped_is_in_no_difference(strategy, received):
    mask = some(6, 0.4)
    fit = fit_of(draw("origin"), draw("after"), received=received, mask=mask)
    ctx = context(client=0)
    memory = strategy.begin(fit.received, job(), strategy.init_client(ctx), ctx)[2]
    part = strategy.end(fit, Message(), memory, ctx)[1].parts["delta"]
    assert not part.value.flat[~mask.flat].any()
    moved = draw("after").flat - restrict(draw("origin"), received).flat
    kept = part.value.flat[mask.flat] / moved[mask.flat]  # FedNova sends multiples
    assert torch.allclose(kept, kept[0].expand_as(kept), rtol=1e-4)
    assert abs(float(kept[0])) > 0.05


def test_what_feddyn_remembers_starts_at_zero_on_a_weight_that_grows():
    was, now = some(7), some(8, 0.7)
    grown, stayed = now.flat & ~was.flat, now.flat & was.flat
    assert grown.any()
    # A grown weight begins at zero; what is remembered there is from before it was cut, some rounds ago.
    after = Tree(LAYOUT, torch.where(was.flat, draw("after").flat, 0.0))
    fit = fit_of(draw("origin"), after, received=was, mask=now)
    memory = FedDyn(alpha=0.5).end(fit, Message(), draw("gradient"), context(client=0))[2].flat
    assert not memory[grown].any()
    assert not memory[~now.flat].any()
    expected = draw("gradient").flat - 0.5 * (draw("after").flat - draw("origin").flat)
    assert torch.allclose(memory[stayed], expected[stayed], atol=1e-5)


def test_feddyn_begins_without_what_it_remembers_of_weights_that_are_cut():
    mask = some(9)
    message = Message(parts={"params": Part(value=restrict(draw("origin"), mask), support=mask)}, mask=mask)
    given = FedDyn().begin(message, job(), draw("gradient"), context(client=0))[1]
    assert torch.equal(given.drift.flat, torch.where(mask.flat, -draw("gradient").flat, 0.0))
