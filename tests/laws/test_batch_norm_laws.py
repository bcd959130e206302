"""What each batch-norm policy promises, and that statistics never leak between clients of one process."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from laws_support import PRUNERS, SIZES, label, population, run, spec

from fedray.corrections import Scaffold
from fedray.models.normalisation import pooled, statistics
from fedray.personal import FedBN, FedPer, StaticNorm
from fedray.pruners import FedRolex, HeteroFL, LocalMagnitude, Magnitude, NoPruning, SubFedAvg
from fedray.round import View
from fedray.sim.checkpoint import load, save
from fedray.sim.client import Broadcast, Worker
from fedray.sim.driver import Driver
from fedray.sim.runtime import InlineRuntime
from fedray.sim.spec import EvalSpec
from fedray.strategies import FedAvg
from fedray.tree import equal

NORMS = {
    "average": (),
    "affine": (FedBN(keep="statistics"),),
    "local": (FedBN(keep="all"),),
    "static": (StaticNorm(),),
}
STATISTICS = ("running_mean", "running_var")


def given(norm, pruner=None, **changes):
    facts = {"evaluation": EvalSpec(every=1, clients="cohort", batch_size=20), **changes}
    return spec(*NORMS[norm], pruner or NoPruning(), FedAvg(), model="batchnorm_cnn", **facts)


def names_sent(ran):
    return {
        name for message, _ in ran.uploads[0] for part in message.parts.values() for name in part.value.layout.names
    }


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_kept_at_clients_travels_nowhere(norm):
    ran = run(given(norm), population("batchnorm_cnn"))
    kept = {
        "average": [],
        "affine": [f"norm{i}.{s}" for i in (1, 2) for s in STATISTICS],
        "local": [f"norm{i}.{s}" for i in (1, 2) for s in (*STATISTICS, "weight", "bias")],
        "static": [f"norm{i}.{s}" for i in (1, 2) for s in STATISTICS],
    }[norm]
    sent = names_sent(ran)
    assert sent.isdisjoint(kept)
    assert "conv1.weight" in sent
    assert ("norm1.running_mean" in sent) == (norm == "average")
    assert ("test/accuracy" in ran.rows[-1]) == (norm in ("average", "static"))
    assert "client/accuracy_mean" in ran.rows[-1]


@pytest.mark.parametrize("pruner", PRUNERS, ids=label)
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_trains_with_every_pruner_and_the_same_whoever_shares_a_process(norm, pruner):
    one = run(given(norm, pruner, rounds=3), population("batchnorm_cnn"))
    from laws_support import Packed

    packed = Packed(given(norm, pruner, rounds=3), population("batchnorm_cnn"), chunk=1, workers=2)
    two = run(given(norm, pruner, rounds=3), population("batchnorm_cnn"), packed)
    assert one.digests == two.digests
    for row, other in zip(one.rows, two.rows, strict=True):
        assert row["client/accuracy_mean"] == other["client/accuracy_mean"]
    assert one.digests[0] != one.digests[-1]


@pytest.mark.parametrize("norm", ["affine", "local"])
def test_a_client_that_nobody_trained_beside_has_the_statistics_of_its_own_data_alone(norm):
    everyone = run(given(norm, cohort=len(SIZES), rounds=2), population("batchnorm_cnn"))
    kept = everyone.driver.runtime.records
    found = {client: record.memories[0] for client, record in kept.items()}
    assert len(found) == len(SIZES)
    means = [memory[1]["norm1.running_mean"] for memory in found.values()]
    for at, mean in enumerate(means):
        assert all(not torch.equal(mean, other) for other in means[:at])


@pytest.mark.parametrize("pruner", [NoPruning(), Magnitude(sparsity=0.6)], ids=label)
def test_static_statistics_are_those_of_the_cohorts_data_in_the_new_model(pruner):
    ran = run(given("static", pruner, rounds=2), population("batchnorm_cnn"))
    worker = Worker(given("static", pruner), population("batchnorm_cnn"))
    server, driver = ran.servers[-1], ran.driver
    cohort = [row["client"] for row in ran.records[-1].clients if "num_examples" in row]
    parts = []
    for client in cohort:
        samples = worker.population.train(client)
        module = worker.spec.task.module(worker.spec.key.fold("model"))
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(server.params[name])
        found, count = statistics(module, [samples.take(slice(None), torch.device("cpu"))[0]])
        parts.append((found, float(count)))
    wanted = pooled(parts)
    assert torch.allclose(driver.statistics.flat, wanted.flat, rtol=1e-4, atol=1e-5)


def test_asking_for_statistics_is_in_the_ledger_under_its_name():
    static, average = (run(given(norm, rounds=2), population("batchnorm_cnn")) for norm in ("static", "affine"))
    asked = [row for row in static.records[-1].transfers if row.get("exchange") == "statistics"]
    cohort = {row["client"] for row in static.records[-1].transfers}
    assert {(row["client"], row["direction"]) for row in asked} == {(c, d) for c in cohort for d in ("down", "up")}
    assert all(row.get("exchange") is None for row in average.records[-1].transfers)
    extra = sum(row["value_bytes"] + row["mask_bytes"] + row["header_bytes"] for row in asked)
    for way in ("up", "down"):
        assert static.rows[-1][f"wire/{way}_bytes"] > average.rows[-1][f"wire/{way}_bytes"]
    total = [sum(ran.rows[-1][f"wire/{way}_bytes"] for way in ("up", "down")) for ran in (static, average)]
    assert total[0] - total[1] == extra


def test_only_evaluated_rounds_are_asked_and_training_does_not_depend_on_it():
    every, never = (
        run(
            replace(given("static"), evaluation=replace(given("static").evaluation, every=n)),
            population("batchnorm_cnn"),
        )
        for n in (1, 0)
    )
    assert every.digests == never.digests
    assert not any(row.get("exchange") for record in never.records for row in record.transfers)
    assert equal(every.servers[-1].params, never.servers[-1].params)


EACH = EvalSpec(every=1, clients="cohort", batch_size=20)


def resumed(given_, cut, tmp_path):
    """The rows of a run that is cut off after some rounds and goes on from its checkpoint."""
    first = run(replace(given_, rounds=cut, checkpoint_every=1), population("batchnorm_cnn"))
    state = load(save(tmp_path, first.records[-1].state()))
    worker = Worker(given_, population("batchnorm_cnn"))
    runtime = InlineRuntime(given_, population("batchnorm_cnn"))
    rest = Driver(given_, population("batchnorm_cnn"), runtime, worker, state)
    return first.rows + [record.row for record in rest.rounds()]


class Seldom:
    """Nobody can be reached in some rounds."""

    def __init__(self, empty):
        self.empty = empty

    def __call__(self, *, round, num_clients, key):
        return np.full(num_clients, round not in self.empty)


def test_statistics_survive_a_resume_also_where_the_next_cohort_is_empty(tmp_path):
    one = given("static", rounds=4, availability=Seldom((3,)))
    straight = run(one, population("batchnorm_cnn")).rows
    for a, b in zip(straight, resumed(one, 2, tmp_path), strict=True):
        assert (a["digest"], a["test/accuracy"], a["test/loss"]) == (b["digest"], b["test/accuracy"], b["test/loss"])


def test_a_model_about_which_nobody_could_be_asked_is_not_evaluated():
    every_other = replace(EACH, every=2)
    one = given("static", rounds=4, availability=Seldom((2,)), evaluation=every_other)
    rows = run(one, population("batchnorm_cnn")).rows
    assert "test/accuracy" not in rows[1]  # round 1 was not evaluated, and in round 2 nobody was there
    assert "test/accuracy" in rows[3]


def test_a_head_at_the_clients_leaves_no_global_model_whatever_becomes_of_statistics():
    policies = (FedPer(), StaticNorm(), NoPruning(), FedAvg())
    row = run(spec(*policies, model="batchnorm_cnn", rounds=2, evaluation=EACH), population("batchnorm_cnn")).rows[-1]
    assert "test/accuracy" not in row
    assert "client/global_accuracy_mean" not in row
    assert "client/accuracy_mean" in row


def test_only_the_model_is_sent_when_statistics_are_asked_for():
    asked = []
    for corrections in ((), (Scaffold(),)):
        policies = (StaticNorm(), NoPruning(), FedAvg(), *corrections)
        ran = run(spec(*policies, model="batchnorm_cnn", rounds=2, evaluation=EACH), population("batchnorm_cnn"))
        rows = [row for row in ran.records[-1].transfers if row.get("exchange")]
        asked.append([(row["client"], row["direction"], row["part"], row["value_bytes"]) for row in rows])
    assert asked[0] == asked[1]
    assert asked[0]


def test_static_statistics_are_those_of_the_whole_model_where_clients_are_sent_a_share_of_it():
    shares = HeteroFL(rates=(0.5,), shares=(1.0,), masked_loss=False, own_labels=False)
    driver = run(given("static", shares, rounds=1), population("batchnorm_cnn")).driver
    assert driver.server.mask is None
    # Channels that no client trains have data going through them all the same.
    variances = [driver.statistics[name] for name in driver.statistics if name.endswith("running_var")]
    assert (torch.cat(variances) > 0).all()


OTHERS = {
    "a width": HeteroFL(rates=(1.0, 0.5), shares=(1.0, 1.0), masked_loss=False, own_labels=False),
    "a window": FedRolex(rates=(1.0, 0.5), shares=(1.0, 1.0)),
    "a mask": LocalMagnitude(sparsity=0.6, masks="personal"),
}


@pytest.mark.parametrize("pruner", OTHERS.values(), ids=OTHERS)
def test_a_client_with_a_model_of_its_own_is_evaluated_with_statistics_of_its_data_in_that_one(pruner):
    evaluated = EvalSpec(every=1, clients="all", batch_size=20)
    one, hosts = given("static", pruner, rounds=2, evaluation=evaluated), population("batchnorm_cnn")
    ran = run(one, hosts)
    worker, driver = Worker(one, hosts), ran.driver
    server, records, everyone = driver.server, driver.runtime.records, range(len(SIZES))
    records = {client: records.get(client) for client in everyone}
    last = Broadcast(round=2, server=server, memories=(), cohort=(), statistics=driver.statistics)
    found = worker.evaluate_clients(last, everyone, records, 20).scores
    assert [found[client]["own"]["accuracy"] for client in everyone] == ran.records[-1].accuracies
    at = [policy for _, policy in one.policies].index(pruner)
    own = 0
    for client, record in records.items():
        samples = worker.population.train(client)
        ctx = worker._context(last, client, record, samples)
        plain = View(params=server.params, buffers=server.buffers, mask=server.mask)
        view = pruner.view(plain, None if record is None else record.memories[at], ctx)
        module = one.task.module(one.key.fold("model"))
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(view.params[name])
        wanted = driver.statistics
        if view is not plain:
            own += 1
            wanted, _ = statistics(module, [samples.take(slice(None), torch.device("cpu"))[0]])
        for name, buffer in module.named_buffers():
            if name in wanted.layout.spans:
                buffer.copy_(wanted[name])
        x, y = hosts.local_samples(client).take(slice(None), torch.device("cpu"))
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(module.eval()(x), y)
        assert found[client]["own"]["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert 0 < own
    assert (own < len(SIZES)) == (pruner is not OTHERS["a mask"])


def test_what_clients_are_evaluated_with_changes_nothing_of_the_run_and_costs_no_bytes():
    pruner = OTHERS["a width"]
    asked, unasked = (
        run(given("static", pruner, evaluation=replace(EACH, every=n, clients="all")), population("batchnorm_cnn"))
        for n in (1, 0)
    )
    assert asked.digests == unasked.digests
    for record in asked.records:
        # Those outside of the cohort are evaluated too, and nothing crosses for it.
        trained = {row["client"] for row in record.clients if "num_steps" in row}
        assert {row["client"] for row in record.transfers} == trained != {row["client"] for row in record.clients}


def test_a_gate_judges_with_the_statistics_that_a_client_keeps(monkeypatch):
    seen = {}
    means = Worker._means

    def noting(self, samples, view):
        seen.setdefault(len(seen), view)
        return means(self, samples, view)

    monkeypatch.setattr(Worker, "_means", noting)
    sizes = tuple(max(size, 2) for size in SIZES)
    held = population("batchnorm_cnn", sizes)
    rows = np.concatenate([held.rows[start : start + 1] for start in held.starts[:-1]])
    hosts = replace(held, held_rows=rows, held_starts=np.arange(len(sizes) + 1))
    pruner = SubFedAvg(sparsity=0.5, rate=0.5, distance=0.0, accuracy=0.0)
    one = given("affine", pruner, rounds=1, epochs=2, cohort=1, validation=0.2)
    ran = run(one, hosts)
    (record,) = ran.driver.runtime.records.values()
    (view,) = seen.values()
    kept = record.memories[0][1]
    assert equal(view.local_buffers, kept)
    assert not equal(view.local_buffers, Worker(one, hosts).local_buffers)
