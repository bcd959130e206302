from dataclasses import replace

import pytest
import torch

from fedray.corrections import FedProx
from fedray.errors import ConfigError
from fedray.pruners import Magnitude
from fedray.strategies import FedAvg, FedSGD
from fedray.sums import Sums
from fedray.tree import Layout, Tree, equal, restrict


def weighted_target(world):
    shares = torch.tensor(world.sizes, dtype=torch.float64) / sum(world.sizes)
    return sum(share * world.target(client).flat.double() for client, share in enumerate(shares))


def descend(world, lr, rounds=3):
    """Gradient descent on the union of all examples, in float64."""
    params = world.server.params.flat.double()
    for _ in range(rounds):
        params = params - lr * (params - weighted_target(world))
    return params


def test_fedavg_with_one_full_step_and_everyone_is_gradient_descent(world):
    world = replace(world, num_steps=1)
    params = world.run([FedAvg()], 3)[-1].params.flat.double()
    assert torch.allclose(params, descend(world, world.lr), atol=1e-6)


def test_fedsgd_with_everyone_is_gradient_descent_and_the_same_step_as_fedavg(world):
    world = replace(world, num_steps=1)
    params = world.run([FedSGD()], 3)[-1].params.flat.double()
    assert torch.allclose(params, descend(world, world.lr), atol=1e-6)
    assert torch.allclose(params, world.run([FedAvg()], 3)[-1].params.flat.double(), atol=1e-6)
    twice = world.run([FedSGD(lr=2.0)], 3)[-1].params.flat.double()
    assert torch.allclose(twice, descend(world, 2 * world.lr), atol=1e-6)


def test_fedavg_at_rate_one_is_the_weighted_mean_of_the_weights(world):
    server = world.server
    after, _ = world.round([FedAvg()], server, 1)
    fits = [world.answer([FedAvg()], server, 1, client)[1].params.flat.double() for client in range(3)]
    mean = sum(size * fit for size, fit in zip(world.sizes, fits, strict=True)) / sum(world.sizes)
    assert torch.allclose(after.params.flat.double(), mean, atol=1e-6)
    plain, _ = world.round([FedAvg(weight_by="uniform")], server, 1)
    assert torch.allclose(plain.params.flat.double(), sum(fits) / 3, atol=1e-6)
    half, _ = world.round([FedAvg(lr=0.5)], server, 1)
    assert torch.allclose(half.params.flat.double(), (mean + server.params.flat) / 2, atol=1e-6)


@pytest.mark.parametrize("strategy", [FedAvg(), FedSGD()], ids=repr)
def test_where_nobody_vouches_the_servers_value_stays(world, strategy):
    server, narrow = world.server, world.mask(3)
    _, fit, _ = world.answer([strategy], server, 1, 0)
    _, message, _ = strategy.end(fit.cut(narrow), world.answer([strategy], server, 1, 0)[2], None, world.ctx(1, 0))
    after, _, _ = strategy.settle(server, Sums().add(message), None, world.ctx(1))
    assert torch.equal(after.params.flat[~narrow.flat], server.params.flat[~narrow.flat])
    assert not torch.equal(after.params.flat[narrow.flat], server.params.flat[narrow.flat])


@pytest.mark.parametrize("strategy", [FedAvg(), FedSGD()], ids=repr)
def test_different_masks_are_averaged_per_coordinate_over_those_who_vouch(world, strategy):
    server, masks, sums = world.server, [world.mask(1), world.mask(2)], Sums()
    name, fits = ("delta" if isinstance(strategy, FedAvg) else "gradient"), []
    for client, mask in enumerate(masks):
        _, fit, answer = world.answer([strategy], server, 1, client)
        message = strategy.end(fit.cut(mask), answer, None, world.ctx(1, client))[1]
        assert not message[name].flat[~mask.flat].any()
        fits.append((world.sizes[client] * mask.flat, answer[name].flat))
        sums.add(message)
    after, _, _ = strategy.settle(server, sums, None, world.ctx(1))
    votes = sum(weight for weight, _ in fits)
    mean = sum(weight * value for weight, value in fits) / votes.clamp(min=1)
    step = 1.0 if name == "delta" else -world.lr
    assert torch.allclose(after.params.flat, server.params.flat + step * mean, atol=1e-6)


@pytest.mark.parametrize("strategy", [FedAvg(), FedSGD()], ids=repr)
def test_a_round_that_nobody_answered_changes_nothing(world, strategy):
    server = world.server
    assert strategy.settle(server, Sums(), None, world.ctx(1))[0] is server


@pytest.mark.parametrize("strategy", [FedAvg(), FedSGD()], ids=repr)
def test_buffers_are_averaged_as_values_and_never_masked(world, strategy):
    policies = [Magnitude(sparsity=0.5), strategy]
    server = world.start(*policies)
    after, uploads = world.round(policies, server, 1)
    assert all(upload.parts["buffers"].support is None for upload in uploads)
    shift = sum(size * client for client, size in enumerate(world.sizes)) / sum(world.sizes)
    assert torch.allclose(after.buffers.flat, server.buffers.flat + shift, atol=1e-6)


@pytest.mark.parametrize("strategy", [FedAvg(), FedSGD()], ids=repr)
def test_a_model_without_buffers_sends_none(world, strategy):
    world = replace(world, stats=Layout((), ()))
    _, _, upload = world.answer([strategy], world.server, 1, 0)
    assert "buffers" not in upload
    assert "buffers" not in strategy.parts(world.layout, world.stats)


@pytest.mark.parametrize("strategy", [FedAvg(), FedSGD()], ids=repr)
def test_a_client_starts_from_what_it_decoded_under_the_mask_that_came_with_it(world, strategy):
    policies = [Magnitude(sparsity=0.5), strategy]
    server = world.start(*policies)
    job, fit, upload = world.answer(policies, server, 1, 2)
    assert equal(job.params, server.params)
    assert equal(job.buffers, server.buffers)
    assert job.mask == fit.received.mask == fit.received.parts["params"].support == upload.mask == server.mask


def test_a_client_of_fedavg_that_took_no_step_sends_a_difference_of_zero(world):
    _, _, upload = world.answer([FedAvg()], world.server, 1, 0)
    idle = replace(world, num_steps=0)
    _, _, nothing = idle.answer([FedAvg()], world.server, 1, 0)
    assert upload["delta"].flat.any()
    assert not nothing["delta"].flat.any()
    assert nothing.parts["delta"].weight == 10.0


def test_fedavg_takes_the_difference_to_what_was_received_not_to_what_was_sent(world):
    _, fit, _ = world.answer([FedAvg()], world.server, 1, 0)
    lossy = Tree(world.layout, fit.received["params"].flat + 0.25)
    received = fit.received.put("params", replace(fit.received.parts["params"], value=lossy))
    _, message, _ = FedAvg().end(replace(fit, received=received), fit.received, None, world.ctx(1, 0))
    assert torch.equal(message["delta"].flat, fit.params.flat - lossy.flat)


@pytest.mark.parametrize(("wanted", "used"), [(None, (10, 30, 5)), (8, (8, 8, 5))])
def test_fedsgd_takes_one_step_of_rate_zero_on_a_batch_of_its_own_size(world, wanted, used):
    for client in range(3):
        job, fit, upload = world.answer([FedSGD(batch_size=wanted)], world.server, 1, client)
        assert (job.num_steps, job.lr, job.batch_size) == (1, 0.0, used[client])
        assert job.wants == {"grad_sum"}
        assert equal(fit.params, world.server.params)
        assert equal(upload["gradient"], fit.evidence["grad_sum"])


def test_fedsgd_sends_the_mean_gradient_under_the_mask_and_nothing_without_a_step(world):
    policies = [Magnitude(sparsity=0.5), FedSGD()]
    server = world.start(*policies)
    _, fit, upload = world.answer(policies, server, 1, 0)
    assert equal(upload["gradient"], restrict(fit.evidence["grad_sum"], server.mask))
    twice = FedSGD().end(replace(fit, num_steps=2), upload, None, world.ctx(1, 0))[1]
    assert torch.equal(twice["gradient"].flat * 2, upload["gradient"].flat)
    idle = FedSGD().end(replace(fit, num_steps=0), replace(upload, parts={}), None, world.ctx(1, 0))[1]
    assert not idle.parts


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"momentum": 0.9}, "trainer.momentum is 0.9; strategy fedsgd runs no local optimiser, so it must be 0.0"),
        (
            {"weight_decay": 0.1},
            "trainer.weight_decay is 0.1; strategy fedsgd runs no local optimiser, so it must be 0",
        ),
        ({"clip_norm": 1.0}, "trainer.clip_norm is 1.0; strategy fedsgd runs no local optimiser, so it must be None"),
        ({"name": "adam"}, "trainer.optimizer is 'adam'; strategy fedsgd runs no local optimiser, so it must be 'sgd'"),
        (
            {"epochs": 2.0},
            "trainer.epochs is 2.0 and trainer.steps is None; strategy fedsgd takes one gradient a round",
        ),
        ({"epochs": None, "steps": 1}, "trainer.epochs is None and trainer.steps is 1; strategy fedsgd takes one"),
    ],
)
def test_fedsgd_refuses_settings_that_it_would_not_read(world, facts, sentence):
    FedSGD().check(world.facts(FedSGD()))
    with pytest.raises(ConfigError) as caught:
        FedSGD().check(world.facts(FedSGD(), **facts))
    assert str(caught.value).startswith(sentence)
    assert str(caught.value).endswith("or take strategy=fedavg")


def test_fedprox_adds_its_pull_to_what_is_there_and_at_zero_is_fedavg_bit_for_bit(world):
    job = replace(world.job(), prox=0.5)
    assert FedProx(mu=0.25).begin(None, job, None, world.ctx(1, 0))[1] == replace(job, prox=0.75)
    plain, still = world.run([FedAvg()], 3), world.run([FedAvg(), FedProx(mu=0.0)], 3)
    assert all(equal(a.params, b.params) for a, b in zip(plain, still, strict=True))


def test_fedprox_keeps_clients_closer_to_what_they_received(world):
    lengths = []
    for mu in (0.0, 0.5, 2.0):
        policies = [FedAvg(), FedProx(mu=mu)]
        upload = world.answer(policies, world.server, 1, 0)[2]
        lengths.append(float(upload["delta"].flat.norm()))
    assert lengths[0] > lengths[1] > lengths[2] > 0
