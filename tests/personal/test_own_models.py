"""Ditto and local fine-tuning: the global model is untouched, and each client's own is as by hand."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from laws_support import MOMENTUM, SIZES, WIRES, distance, population, run, spec

from fedray.corrections import FedProx, Scaffold
from fedray.errors import ConfigError
from fedray.personal import Ditto, FedPer, LocalFineTuning
from fedray.pruners import FedDST, FedRolex, FjORD, HeteroFL, LocalMagnitude, LotteryFL, Magnitude, NoPruning
from fedray.sim.client import Worker
from fedray.sim.spec import EvalSpec
from fedray.strategies import FedAvg, FedSGD
from fedray.tree import equal

EVERYONE = len(SIZES)
ALL = EvalSpec(every=1, clients="all", batch_size=8)


@pytest.mark.parametrize("personal", [Ditto(pull=0.5), LocalFineTuning(epochs=2)], ids=repr)
@pytest.mark.parametrize("kind", ["float32", "stc"])
@pytest.mark.parametrize(
    "onion",
    [
        (NoPruning(), FedAvg()),
        (NoPruning(), FedSGD()),
        (FedDST(sparsity=0.5, every=1, until=9), FedAvg(), FedProx(mu=0.2)),
        (Magnitude(sparsity=0.5, schedule="cubic", start=1, finish=3), FedAvg(), Scaffold()),
    ],
    ids=repr,
)
def test_the_global_model_and_its_bytes_are_those_without(personal, kind, onion):
    optim = None if isinstance(onion[1], FedSGD) else MOMENTUM
    rounds = [
        run(spec(*more, *onion, optim=optim, wire=WIRES[kind], evaluation=ALL, lr=0.4), population())
        for more in ((), (personal,))
    ]
    assert rounds[0].digests == rounds[1].digests
    assert rounds[0].bytes == rounds[1].bytes
    assert [r["test/accuracy"] for r in rounds[0].rows] == [r["test/accuracy"] for r in rounds[1].rows]
    # And clients are scored by what they run.
    assert [r.accuracies for r in rounds[0].records] != [r.accuracies for r in rounds[1].records]


def pulled(worker, client, start, anchor, pull, steps, lr):
    """Full-batch steps on the client's loss and the pull, in plain PyTorch: the weights (n,) at the end."""
    module = worker.engine.module.train()
    parameters = list(module.parameters())
    x, y = worker.population.train(client).take(slice(None), torch.device("cpu"))
    with torch.no_grad():
        for parameter, value in zip(parameters, [t for _, t in start.items()], strict=True):
            parameter.copy_(value)
    for _ in range(steps):
        gradients = torch.autograd.grad(F.cross_entropy(module(x), y), parameters)
        with torch.no_grad():
            for parameter, g, w in zip(parameters, gradients, [t for _, t in anchor.items()], strict=True):
                parameter.sub_(lr * (g + pull * (parameter - w)))
    return torch.cat([p.detach().flatten() for p in parameters])


@pytest.mark.parametrize("start", ["initial", "received"])
@pytest.mark.parametrize("epochs", [None, 3])
def test_a_client_of_ditto_trains_its_own_model_towards_the_one_it_received(start, epochs):
    policy = Ditto(pull=0.7, epochs=epochs, start=start)
    given = spec(policy, NoPruning(), FedAvg(), batch_size=99, epochs=2, cohort=2, rounds=4, lr=0.2)
    ran = run(given, population())
    own, worker = {}, Worker(given, population())
    for number, record in enumerate(ran.records):
        received = ran.servers[number].params
        for entry in record.clients:
            client = entry["client"]
            first = ran.servers[0].params if start == "initial" else received
            flat = pulled(worker, client, own.get(client, first), received, 0.7, epochs or 2, 0.2)
            own[client] = type(received)(received.layout, flat)
    assert len(own) > 2
    for client, tree in own.items():
        kept = ran.driver.runtime.records[client].memories[0]
        assert distance(kept["params"], tree) < 1e-5


def test_without_a_pull_ditto_is_local_training_and_a_strong_one_ties_it_to_the_global_model():
    def gaps(pull):
        given = spec(Ditto(pull=pull), NoPruning(), FedAvg(), cohort=EVERYONE, rounds=6, lr=0.05, epochs=5)
        ran = run(given, population())
        return [distance(r.memories[0]["params"], ran.servers[-2].params) for r in ran.driver.runtime.records.values()]

    for loose, tied in zip(gaps(0.0), gaps(10.0), strict=True):
        assert tied < loose


def test_own_models_have_statistics_and_kept_tensors_of_their_own():
    model = "batchnorm_cnn"
    given = spec(Ditto(pull=0.1), FedPer(), NoPruning(), FedAvg(), model=model, cohort=EVERYONE, rounds=3)
    ran = run(given, population(model))
    for record in ran.driver.runtime.records.values():
        ditto, fedper = record.memories[0], record.memories[1]
        assert not equal(ditto["local"], fedper[0])
        assert not equal(ditto["buffers"], ran.servers[-1].buffers)


def test_own_models_stay_under_the_servers_mask():
    given = spec(Ditto(), FedDST(sparsity=0.5, every=1, until=9), FedAvg(), optim=MOMENTUM, cohort=EVERYONE, rounds=4)
    ran = run(given, population())
    mask = ran.servers[-2].mask  # of the round in which they were trained
    for record in ran.driver.runtime.records.values():
        assert not record.memories[0]["params"].flat[~mask.flat].any()


def test_corrections_of_the_global_job_are_none_of_dittos():
    def own(*corrections):
        ran = run(spec(Ditto(), NoPruning(), FedAvg(), *corrections, rounds=1), population())
        return [record.memories[0]["params"] for _, record in sorted(ran.driver.runtime.records.items())]

    assert all(equal(a, b) for a, b in zip(own(), own(FedProx(mu=5.0)), strict=True))


def test_fine_tuning_scores_the_model_after_its_steps_and_keeps_nothing():
    tuned = LocalFineTuning(epochs=4, lr=0.3)
    given = spec(tuned, NoPruning(), FedAvg(), batch_size=99, rounds=2, evaluation=ALL)
    ran = run(given, population())
    assert not ran.driver.runtime.records
    worker, server = Worker(given, population()), ran.servers[-1].params
    for client in range(EVERYONE):
        flat = pulled(worker, client, server, server, 0.0, 4, 0.3)
        samples = worker.population.local_samples(client)
        x, y = samples.take(slice(None), torch.device("cpu"))
        with torch.no_grad():
            at = 0
            for parameter in worker.engine.module.parameters():
                parameter.copy_(flat[at : at + parameter.numel()].view(parameter.shape))
                at += parameter.numel()
            expected = float((worker.engine.module.eval()(x).argmax(1) == y).float().mean())
        assert ran.records[-1].accuracies[client] == pytest.approx(expected)
    again = run(replace(given, policies=((given.policies[0][0], LocalFineTuning()), *given.policies[1:])), population())
    assert again.digests == ran.digests


def test_a_head_that_stayed_is_fine_tuned_too():
    given = spec(LocalFineTuning(epochs=30, lr=0.5), FedPer(), NoPruning(), FedAvg(), cohort=EVERYONE, rounds=1)
    tuned, plain = (
        run(replace(given, policies=policies, evaluation=ALL), population())
        for policies in (given.policies, given.policies[1:])
    )
    assert tuned.digests == plain.digests
    assert tuned.records[-1].accuracies != plain.records[-1].accuracies


def test_a_part_of_the_model_that_moves_from_round_to_round_goes_with_no_model_of_its_own():
    narrow = {"rates": (1.0, 0.5), "shares": (1, 1)}
    moving = (HeteroFL(assignment="dynamic", **narrow), FjORD(assignment="dynamic", **narrow), FedRolex(**narrow))
    for pruner in (*moving, *(replace(one, assignment="fixed") for one in moving[:2]), FedRolex(**narrow, shift=0)):
        policy = Ditto()
        facts = spec(policy, pruner, FedAvg()).facts()
        if any(pruner is one for one in moving):
            with pytest.raises(ConfigError, match=r"gives clients other parts of the model from round to round, and"):
                policy.check(facts)
            tuned = LocalFineTuning()
            tuned.check(spec(tuned, pruner, FedAvg()).facts())
        else:
            policy.check(facts)
    for pruner in (LotteryFL(), LocalMagnitude(sparsity=0.5, masks="personal"), FedDST(sparsity=0.5, every=1, until=9)):
        policy.check(spec(policy, pruner, FedAvg()).facts())


def test_with_a_fixed_width_an_own_model_lies_in_it_and_is_what_a_client_runs():
    widths = HeteroFL(rates=(1.0, 0.5), shares=(1, 1), masked_loss=False, own_labels=False)
    given = spec(Ditto(), widths, FedAvg(), optim=MOMENTUM, cohort=EVERYONE, rounds=3, evaluation=ALL)
    ran = run(given, population())
    sent = {upload.client: upload.sent for upload in ran.heard if upload.round == 3}
    assert sorted(mask is None for mask in sent.values()) == [False] * 3 + [True] * 3
    for client, mask in sent.items():
        own = ran.driver.runtime.records[client].memories[0]["params"]
        assert mask is None or not own.flat[~mask.flat].any()
        assert mask is None or own.flat[mask.flat].all()
