"""FedDyn: its fixed point is the optimum of the mean loss, and what clients remember are their gradients."""

from dataclasses import replace

import pytest
import torch
from quadratics import LAYOUT, NOTHING, Federation, context, draw, facts, some, sums_of

from fedray.errors import ConfigError
from fedray.round import Fit, Message, Part, Server
from fedray.strategies import FedAvg, FedDyn
from fedray.tree import Mask, Tree, equal

BENDS, STEPS = (0.5, 1.0, 4.0), (150, 150, 150)
SAMPLED = ((0, 1), (1, 2), (2, 0), (1,))


def federation(strategy, **changes):
    return Federation((strategy,), **{"steps": STEPS, "bends": BENDS, "lr": 0.2} | changes)


@pytest.mark.parametrize("cohorts", [None, SAMPLED], ids=["everyone", "sampled"])
def test_feddyn_reaches_the_optimum_of_the_mean_loss_and_fedavg_does_not(cohorts):
    mine, theirs = (federation(s) for s in (FedDyn(alpha=0.8), FedAvg(weight_by="uniform")))
    optimum = mine.optimum()
    error = [float((f.run(150, cohorts).double() - optimum).norm() / optimum.norm()) for f in (mine, theirs)]
    assert error[0] < 1e-3
    assert error[1] > 0.1


def test_at_the_fixed_point_each_client_remembers_its_gradient_there():
    here = federation(FedDyn(alpha=0.8))
    optimum = here.run(150)
    for client in range(3):
        gradient = here.gradient(client, optimum)
        assert torch.allclose(here.kept[client][0].flat, gradient, atol=2e-3)
        assert float(gradient.abs().max()) > 0.5


def test_a_converged_client_remembers_the_gradient_where_it_ended():
    # Equation: 0 = gradient(w_k) - g_k + alpha (w_k - w), so the new g_k is the gradient at w_k.
    here = federation(FedDyn(alpha=0.8))
    for number in range(1, 4):
        here.round(number)
        for client in range(3):
            gradient = here.gradient(client, here.fits[client].params.flat)
            assert torch.allclose(here.kept[client][0].flat, gradient, atol=1e-4)


@pytest.mark.parametrize("steps", [(3, 3, 3), (1, 0, 5)], ids=["equal steps", "unequal steps"])
def test_h_is_the_mean_of_what_all_clients_remember_after_every_round(steps):
    here = federation(FedDyn(alpha=0.3), steps=steps)
    for number in range(1, 9):
        here.round(number, SAMPLED[number % 4])
        remembered = [(here.kept.get(c) or [None])[0] for c in range(3)]
        mean = sum(torch.zeros(here.server.params.layout.size) if g is None else g.flat for g in remembered) / 3
        assert torch.allclose(here.memories[0].flat, mean, atol=1e-6)


def test_two_rounds_by_hand():
    alpha, here = 0.5, federation(FedDyn(alpha=0.5), steps=(1, 1, 1), lr=0.1)
    w, g, h = draw("origin").flat.double(), {c: 0.0 for c in range(3)}, 0.0
    for number, cohort in ((1, (0, 2)), (2, (0, 1, 2))):
        here.round(number, cohort)
        ends = {c: w - 0.1 * (BENDS[c] * (w - here.target(c).flat.double()) - g[c]) for c in cohort}
        for c in cohort:
            g[c] = g[c] - alpha * (ends[c] - w)
        h = h - alpha / 3 * sum(ends[c] - w for c in cohort)
        w = sum(ends.values()) / len(cohort) - h / alpha
        assert torch.allclose(here.server.params.flat.double(), w, atol=1e-5)


def test_the_first_round_trains_as_fedprox_does_and_adds_to_what_is_there():
    strategy, here = FedDyn(alpha=0.3), federation(FedDyn(alpha=0.3))
    job_of = {}
    for memory in (None, draw("g")):
        message = strategy.send(here.server, Message(), None, here.ctx(1, 0))
        job = replace(here.job(0), prox=0.5, drift=draw("there"))
        job_of[memory is None] = strategy.begin(message, job, memory, here.ctx(1, 0))[1]
    assert job_of[True].prox == job_of[False].prox == 0.8
    assert equal(job_of[True].drift, draw("there"))
    assert torch.equal(job_of[False].drift.flat, draw("there").flat - draw("g").flat)


def test_what_clients_remember_lives_on_the_mask():
    here = federation(FedDyn(alpha=0.3), steps=(2, 2, 2))
    here.round(1)
    narrow = some(4)
    here.server = Server(params=here.server.params, buffers=here.server.buffers).cut(narrow)
    here.round(2)
    for tree in (here.memories[0], *(here.kept[c][0] for c in range(3))):
        assert not tree.flat[~narrow.flat].any()
        assert bool((tree.flat[narrow.flat] != 0).all())


def test_feddyn_refuses_an_adaptive_optimiser():
    FedDyn().check(facts(FedDyn(), momentum=0.9))
    with pytest.raises(ConfigError, match=r"trainer.optimizer is 'adamw'; strategy feddyn adds a constant"):
        FedDyn().check(facts(FedDyn(), name="adamw"))


def test_h_counts_for_each_coordinate_the_clients_that_vouch_for_it():
    """Algorithm 1 sums what was sent: a coordinate that one of four sends moves h by a quarter of its difference."""
    policy, ctx = FedDyn(alpha=0.1), context(num_clients=4)
    server, memory = policy.init_server(Server(params=draw("origin"), buffers=Tree.zeros(NOTHING)), ctx)
    one = Tree(LAYOUT, torch.ones(LAYOUT.size))
    first = Mask(LAYOUT, torch.arange(LAYOUT.size) < 5)
    sums = sums_of(one, one, one, one, supports=[None, first, first, first])
    _, _, h = policy.settle(server, sums, memory, ctx)
    assert torch.allclose(h.flat, torch.where(first.flat, -0.1, -0.025))


def test_a_weight_that_was_cut_and_grew_back_in_one_round_starts_at_zero():
    policy, ctx, start = FedDyn(alpha=0.5), context(client=0), draw("origin")
    mask = Mask.full(LAYOUT)
    after = Tree(LAYOUT, torch.where(torch.arange(LAYOUT.size) < 4, 0.0, start.flat + 1.0))
    received = Message(parts={"params": Part(value=start)}, mask=mask)
    fit = Fit(
        received=received,
        params=after,
        buffers=Tree.zeros(NOTHING),
        mask=mask,
        num_examples=9,
        num_steps=3,
        lr=0.1,
        loss=0.0,
    )
    memory = policy.end(fit, Message(), None, ctx)[2]
    assert memory.flat[:4].tolist() == [0.0] * 4
    assert torch.allclose(memory.flat[4:], torch.full((LAYOUT.size - 4,), -0.5), atol=1e-5)
