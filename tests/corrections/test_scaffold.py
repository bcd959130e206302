"""SCAFFOLD: its invariant in real runs, its first round, and two rounds by hand."""

from dataclasses import replace

import pytest
import torch
from laws_support import MOMENTUM, WIRES, Watching, population, run, spec
from quadratics import Federation, draw, facts, some

from fedray.corrections import FedProx, Scaffold
from fedray.errors import ConfigError
from fedray.pruners import FedDST, Magnitude, NoPruning, Random
from fedray.round import Optim, Server
from fedray.sim.driver import Driver
from fedray.sim.runtime import InlineRuntime
from fedray.strategies import FedAvg, FedSGD

SAMPLED = ((0, 1), (1, 2), (2, 0), (1,))


def controls(driver, at=-1):
    """The server's control, and the mean of all clients' under the server's mask; of the policy at this place."""
    server = driver.memories[at].flat
    found = [record.memories[at] for record in driver.runtime.records.values()]
    total = sum((c.flat.double() for c in found if c is not None), torch.zeros(server.numel(), dtype=torch.float64))
    return server, total / driver.spec.num_clients


def assert_invariant(driver):
    server, mean = controls(driver)
    assert float(server.abs().max()) > 1e-3
    assert torch.allclose(server.double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", WIRES)
@pytest.mark.parametrize("pruner", [NoPruning(), Random(sparsity=0.5), Magnitude(sparsity=0.5)], ids=repr)
def test_the_servers_control_is_the_mean_of_all_clients_after_every_round(pruner, kind):
    given = spec(pruner, FedAvg(), Scaffold(), rounds=6, cohort=2, wire=WIRES[kind])
    worker = Watching(given, population())
    worker.seen = []
    driver = Driver(given, population(), InlineRuntime(given, population(), worker), worker)
    for _ in driver.rounds():
        assert_invariant(driver)


def test_the_invariant_and_every_bit_survive_a_resume():
    given = spec(NoPruning(), FedAvg(), Scaffold(), rounds=5, cohort=2, checkpoint_every=2)
    whole = run(given, population())
    state = whole.records[1].state()
    worker = Watching(given, population())
    worker.seen = []
    again = Driver(given, population(), InlineRuntime(given, population(), worker), worker, state)
    assert [record.row["digest"] for record in again.rounds()] == whole.digests[2:]
    assert_invariant(again)


def test_the_first_round_is_the_strategys_own_bit_for_bit_and_later_ones_are_not():
    for optim in (Optim(), MOMENTUM):
        mine, plain = (
            run(spec(NoPruning(), FedAvg(), *more, optim=optim, engine="auto"), population())
            for more in ((Scaffold(),), ())
        )
        assert mine.digests[0] == plain.digests[0]
        assert all(a != b for a, b in zip(mine.digests[1:], plain.digests[1:], strict=True))


def test_rounds_under_partial_participation_by_hand():
    bends, steps, lr = (0.5, 1.0, 4.0), (2, 5, 3), 0.1
    here = Federation((FedAvg(weight_by="uniform"), Scaffold()), steps=steps, bends=bends, lr=lr)
    x, c = draw("origin").flat.double(), torch.zeros(draw("origin").flat.numel(), dtype=torch.float64)
    own = [torch.zeros_like(c) for _ in range(3)]
    for number in range(1, 7):
        cohort = SAMPLED[number % 4]
        here.round(number, cohort)
        ends, changes = [], []
        for i in cohort:
            y = x.clone()
            for _ in range(steps[i]):
                y = y - lr * (bends[i] * (y - here.target(i).flat.double()) - own[i] + c)
            new = own[i] - c + (x - y) / (steps[i] * lr)
            changes.append(new - own[i])
            own[i] = new
            ends.append(y)
        x = x + sum(y - x for y in ends) / len(cohort)
        c = c + len(cohort) / 3 * sum(changes) / len(cohort)
        assert torch.allclose(here.server.params.flat.double(), x, atol=1e-5)
        assert torch.allclose(here.memories[1].flat.double(), c, atol=1e-4)


def test_with_controls_different_clients_agree_on_the_optimum():
    options = {"steps": (10, 10, 10), "bends": (0.5, 1.0, 4.0), "lr": 0.05}
    mine = Federation((FedAvg(weight_by="uniform"), Scaffold()), **options)
    plain = Federation((FedAvg(weight_by="uniform"),), **options)
    optimum = mine.optimum()
    error = [float((f.run(150).double() - optimum).norm()) for f in (mine, plain)]
    assert error[0] < 1e-3 < 0.1 < error[1]


def test_controls_stay_on_the_mask_and_what_grows_starts_at_zero():
    here = Federation((FedAvg(), Scaffold()))
    here.round(1)
    narrow, wide = some(4), some(5)
    start = here.server
    here.server = Server(params=start.params, buffers=start.buffers).cut(narrow)
    here.round(2)
    for control in (here.memories[1], *(here.kept[c][1] for c in range(3))):
        assert not control.flat[~narrow.flat].any()
        assert control.flat[narrow.flat].any()
    here.server = Server(params=here.server.params, buffers=start.buffers, mask=wide)
    here.client(3, 0)
    received = here.fits[0].received
    grown = wide.flat & ~narrow.flat
    assert not received["control"].flat[grown].any()
    # Its own control there is the mean of its gradients alone: nothing was known of them.
    mean = (received["params"].flat - here.fits[0].params.flat) / (3 * here.lr)
    assert torch.allclose(here.kept[0][1].flat[grown], mean[grown])


def test_readjustments_leave_no_control_outside_the_mask_or_on_weights_that_were_cut():
    given = spec(FedDST(sparsity=0.5, every=1, until=9), FedAvg(), Scaffold(), rounds=5, cohort=3)
    ran = run(given, population())
    server, _ = controls(ran.driver)
    assert torch.isfinite(server).all()
    for record in ran.driver.runtime.records.values():
        assert float(record.memories[-1].flat.abs().max()) < 10
    # A weight that was cut and grew back within a round starts at zero, and so does its control.
    here = Federation((FedAvg(), Scaffold()))
    here.server = here.server.cut(some(3))
    here.client(1, 0)
    fit, cut = here.fits[0], some(3).flat.nonzero()[:4, 0]
    params = fit.params.flat.clone()
    params[cut] = 0.0
    fit = type(fit)(**{**vars(fit), "params": type(fit.params)(fit.params.layout, params)})
    _, message, control = Scaffold().end(fit, here.uploads[0], None, here.ctx(1, 0))
    assert not control.flat[cut].any()
    assert not message["control_change"].flat[cut].any()


def test_a_client_without_a_step_keeps_its_control_and_sends_none():
    here = Federation((FedAvg(), Scaffold()), steps=(3, 0, 2))
    here.round(1)
    assert here.kept[1] == [None, None]
    assert "control_change" not in here.uploads[1]
    mean = (here.kept[0][1].flat + here.kept[2][1].flat) / 3
    assert torch.allclose(here.memories[1].flat, mean, atol=1e-6)


def test_controls_travel_without_loss_and_make_a_round_twice_as_dear():
    specs = Scaffold().parts(draw("x").layout, draw("x").layout)
    assert [s.lossy for s in specs.values()] == [False, False]
    rows = [run(spec(NoPruning(), FedAvg(), *more), population()).rows[-1] for more in ((), (Scaffold(),))]
    for way in ("up", "down"):
        assert rows[1][f"wire/{way}_params"] == 2 * rows[0][f"wire/{way}_params"]


def test_controls_add_to_the_drift_that_is_there():
    here = Federation((FedAvg(), Scaffold()))
    here.round(1)
    message = Scaffold().send(here.server, here.uploads[0], here.memories[1], here.ctx(2, 0))
    job = here.job(0)
    job = replace(job, drift=draw("there"))
    changed = Scaffold().begin(message, job, here.kept[0][1], here.ctx(2, 0))[1]
    expected = draw("there").flat + here.memories[1].flat - here.kept[0][1].flat
    assert torch.allclose(changed.drift.flat, expected, atol=1e-6)


def test_scaffold_warns_where_it_is_not_the_papers_algorithm_and_refuses_where_no_step_is_local():
    good = (FedAvg(), Scaffold(), FedProx(mu=0.1))
    assert Scaffold().warns(facts(*good)) == ()
    for optim, named in (
        ({"momentum": 0.9}, "trainer.momentum=0.9"),
        ({"name": "adam"}, "trainer.optimizer=adam"),
        ({"clip_norm": 1.0}, "trainer.clip_norm=1.0"),
    ):
        (sentence,) = Scaffold().warns(facts(*good, **optim))
        assert sentence.startswith(f"with {named} this is not the paper's algorithm")
        Scaffold().check(facts(*good, **optim))
    with pytest.raises(ConfigError, match="correction is scaffold; it needs clients that take local steps"):
        Scaffold().check(facts(FedSGD(), Scaffold()))


@pytest.mark.parametrize("optim", [Optim(), Optim(momentum=0.9), Optim(momentum=0.9, nesterov=True)], ids=str)
def test_a_control_is_the_mean_gradient_also_with_momentum(optim):
    """On a line the gradient is the same everywhere, so it is what every control must be after a round."""
    here = Federation(policies=(NoPruning(), FedAvg(), Scaffold()), steps=(2, 5, 9), optim=optim)
    slope = {client: draw("slope", client).flat for client in range(here.count)}
    here.gradient = lambda client, _: slope[client]
    for number in (1, 2, 3):
        here.round(number)
        for client in range(here.count):
            assert torch.allclose(here.kept[client][-1].flat, slope[client], atol=1e-4)
