"""FedNova: effective steps against PyTorch's own optimiser, the normalised mean against a computation by hand."""

import pytest
import torch
from quadratics import Federation, draw, facts

from fedray.corrections import FedProx
from fedray.errors import ConfigError
from fedray.round import Optim
from fedray.strategies import FedAvg, FedNova
from fedray.tree import equal

OPTIMS = (Optim(), Optim(momentum=0.9), Optim(momentum=0.5), Optim(momentum=0.8, nesterov=True))


@pytest.mark.parametrize("optim", OPTIMS, ids=repr)
@pytest.mark.parametrize("prox", [0.0, 0.7])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_effective_steps_are_how_far_pytorchs_sgd_goes_on_a_gradient_of_one(optim, prox, steps):
    weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    sgd = torch.optim.SGD([weight], lr=0.2, momentum=optim.momentum, nesterov=optim.nesterov)
    for _ in range(steps):
        weight.grad = 1.0 + prox * weight.detach()
        sgd.step()
    found = optim.effective_steps(steps, lr=0.2, prox=prox)
    assert found == pytest.approx(-weight.item() / 0.2, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_effective_steps_have_the_papers_closed_forms(steps):
    assert Optim().effective_steps(steps, lr=0.1) == steps
    r = 0.9
    closed = (steps - r * (1 - r**steps) / (1 - r)) / (1 - r)
    assert Optim(momentum=r).effective_steps(steps, lr=0.1) == pytest.approx(closed)
    closed = (1 - (1 - 0.1 * 2.0) ** steps) / (0.1 * 2.0)
    assert Optim().effective_steps(steps, lr=0.1, prox=2.0) == pytest.approx(closed)


@pytest.mark.parametrize("optim", OPTIMS, ids=repr)
@pytest.mark.parametrize("corrections", [(), (FedProx(mu=0.7),)], ids=["plain", "prox"])
def test_fednova_is_fedavg_where_all_take_equal_steps(optim, corrections):
    mine, theirs = (Federation((s, *corrections), optim=optim).run(3) for s in (FedNova(lr=0.5), FedAvg(lr=0.5)))
    assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight_by", ["examples", "uniform"])
@pytest.mark.parametrize("optim", OPTIMS, ids=repr)
def test_unequal_steps_are_averaged_as_by_hand(optim, weight_by):
    steps = (1, 4, 9)
    federation = Federation((FedNova(weight_by=weight_by),), steps=steps, optim=optim)
    before = federation.server.params.flat.double()
    after = federation.round(1).params.flat.double()
    shares = torch.tensor(federation.sizes if weight_by == "examples" else (1, 1, 1), dtype=torch.float64)
    shares = shares / shares.sum()
    moved = [federation.fits[c].params.flat.double() - before for c in range(3)]
    if optim.momentum == 0.9:
        a = [(t - 0.9 * (1 - 0.9**t) / 0.1) / 0.1 for t in steps]
    else:
        a = [optim.effective_steps(t, lr=0.1) for t in steps]
    direction = sum(p * d / n for p, d, n in zip(shares, moved, a, strict=True))
    expected = before + sum(p * n for p, n in zip(shares, a, strict=True)) * direction
    assert torch.allclose(after, expected, rtol=1e-5, atol=1e-6)
    plain = Federation((FedAvg(weight_by=weight_by),), steps=steps, optim=optim).round(1).params.flat.double()
    assert not torch.allclose(plain, expected, rtol=1e-2, atol=1e-2)


def test_clients_that_take_more_steps_do_not_pull_the_model_their_way():
    steps, sizes = (1, 4, 20), (1, 1, 1)
    nova, avg = (Federation((s,), steps=steps, sizes=sizes, lr=0.005) for s in (FedNova(), FedAvg()))
    error = [float((f.run(600).double() - f.optimum()).norm()) for f in (nova, avg)]
    assert error[0] < 0.15 * error[1]


def test_the_steps_travel_in_a_part_of_their_own_without_loss_and_leave_no_memory():
    federation = Federation((FedNova(),), steps=(2, 5, 0))
    federation.round(1)
    specs = FedNova().parts(federation.server.params.layout, federation.server.buffers.layout)
    assert not specs["effective_steps"].lossy
    assert specs["effective_steps"].layout.size == 1
    assert [float(federation.uploads[c]["effective_steps"].flat) for c in (0, 1)] == [2.0, 5.0]
    assert all(memories == [None] for memories in federation.kept.values())


def test_a_client_without_a_step_sends_nothing_and_changes_nothing():
    two, three = (Federation((FedNova(),), steps=(2, 5, 0)) for _ in range(2))
    assert equal(two.round(1, (0, 1)).params, three.round(1).params)
    assert not three.uploads[2].parts
    nobody = Federation((FedNova(),), steps=(0, 0, 0))
    assert nobody.round(1) is nobody.server
    assert equal(nobody.server.params, draw("origin"))


def test_fednova_refuses_optimisers_and_pulls_of_which_it_knows_no_effective_steps():
    FedNova().check(facts(FedNova(), momentum=0.9))
    with pytest.raises(ConfigError, match=r"trainer.optimizer is 'adam'; strategy fednova knows the effective steps"):
        FedNova().check(facts(FedNova(), name="adam"))
    wild = Federation((FedNova(), FedProx(mu=25.0)), steps=(2, 2, 2))
    with pytest.raises(ConfigError, match=r"the pull of 25 at a rate of 0.1 overshoots"):
        wild.round(1)
