"""FedPer, FedRep and FedBN: what stays at clients, that it lasts, and what each phase moves."""

from dataclasses import dataclass, replace

import pytest
import torch
from laws_support import MOMENTUM, SIZES, WIRES, Packed, population, run, spec
from quadratics import facts

from fedray.corrections import FedProx, Scaffold
from fedray.errors import ConfigError
from fedray.models.task import kinds, layouts
from fedray.personal import Ditto, FedBN, FedPer, FedRep, LocalFineTuning
from fedray.pruners import FedDST, Magnitude, NoPruning, Random
from fedray.round import FieldError, Optim, Policy, View
from fedray.sim.client import Worker
from fedray.sim.spec import EvalSpec
from fedray.strategies import FedAvg, FedNova, FedSGD
from fedray.tree import Layout, equal
from fedray.wire import Codec

EVERYONE = len(SIZES)
KEEPERS = {
    "FedPer": ("batchnorm_cnn", FedPer(), {"fc.weight", "fc.bias"}),
    "FedPer of a pattern": (
        "batchnorm_cnn",
        FedPer(names=("norm2.*", "fc.bias")),
        {"norm2.weight", "norm2.bias", "norm2.running_mean", "norm2.running_var", "fc.bias"},
    ),
    "FedRep": ("mlp", FedRep(head_epochs=2), None),
    "FedBN": (
        "batchnorm_cnn",
        FedBN(),
        {f"norm{i}.{what}" for i in (1, 2) for what in ("weight", "bias", "running_mean", "running_var")},
    ),
    "FedBN of statistics": (
        "batchnorm_cnn",
        FedBN(keep="statistics"),
        {f"norm{i}.{what}" for i in (1, 2) for what in ("running_mean", "running_var")},
    ),
}


def kept_by(model, policy):
    worker = Worker(spec(NoPruning(), FedAvg(), model=model), population(model))
    return policy.keeps(kinds(worker.engine.module), layouts(worker.engine.module)[1])


def seen_messages(given, population_, monkeypatch):
    """Names of every tensor that crosses, either way."""
    crossed, encode = {"up": set(), "down": set()}, Codec.encode

    def watched(self, message, *, direction, **options):
        for part in message.parts.values():
            crossed[direction] |= set(part.value.layout.names)
        return encode(self, message, direction=direction, **options)

    monkeypatch.setattr(Codec, "encode", watched)
    return run(given, population_), crossed


@pytest.mark.parametrize("strategy", [FedAvg(), FedNova()], ids=repr)
@pytest.mark.parametrize("case", KEEPERS)
def test_what_clients_keep_is_in_no_message(case, strategy, monkeypatch):
    model, policy, expected = KEEPERS[case]
    kept = kept_by(model, policy)
    assert expected is None or kept == expected
    given = spec(policy, NoPruning(), strategy, Scaffold(), model=model)
    ran, crossed = seen_messages(given, population(model), monkeypatch)
    everything = set(ran.driver.worker.engine.params_layout.names) | set(ran.driver.worker.engine.buffers_layout.names)
    assert kept
    assert kept < everything
    for names in crossed.values():
        assert names.isdisjoint(kept)
        assert names - {"effective_steps"} == everything - kept
    assert set(ran.servers[-1].params.layout.names).isdisjoint(kept)


@pytest.mark.parametrize("case", KEEPERS)
def test_what_clients_keep_lasts_and_differs_between_clients(case):
    model, policy, _ = KEEPERS[case]
    given = spec(policy, NoPruning(), FedAvg(), model=model, cohort=2, rounds=4, lr=0.3)
    ran = run(given, population(model))
    memories = {c: record.memories[0] for c, record in ran.driver.runtime.records.items()}
    assert 1 < len(memories)
    flats = [torch.cat([tree.flat for tree in memory]) for memory in memories.values()]
    start = torch.cat([ran.driver.worker.local.flat, ran.driver.worker.local_buffers.flat])
    assert all(not torch.equal(flat, start[: flat.numel()]) for flat in flats)
    assert len({flat.numpy().tobytes() for flat in flats}) == len(flats)
    # Clients that were away keep what they had: one more round changes the cohort's alone.
    longer = run(replace(given, rounds=5), population(model))
    cohort = {entry["client"] for entry in longer.records[-1].clients}
    for client, memory in memories.items():
        later = longer.driver.runtime.records[client].memories[0]
        assert all(equal(a, b) for a, b in zip(memory, later, strict=True)) == (client not in cohort)


@dataclass(frozen=True, kw_only=True)
class Spy(Policy[None, None]):
    """Notes each job as the trainer gets it, and each fit."""

    seen: list

    def begin(self, message, job, memory, ctx):
        self.seen.append((ctx.client.id, job))
        return message, job, memory

    def end(self, fit, message, memory, ctx):
        self.seen.append((ctx.client.id, fit))
        return fit, message, memory


@pytest.mark.parametrize("case", KEEPERS)
def test_a_client_starts_from_what_it_kept(case):
    model, policy, _ = KEEPERS[case]
    spy = Spy(seen=[])
    run(spec(spy, policy, NoPruning(), FedAvg(), model=model, cohort=EVERYONE, rounds=3), population(model))
    by_client = {c: [what for client, what in spy.seen if client == c] for c in range(EVERYONE)}
    for job1, fit1, job2, *_ in by_client.values():
        if not isinstance(policy, FedRep):  # whose first phase moves the head before
            assert equal(job2.local, fit1.local)
            assert equal(job2.local_buffers, fit1.local_buffers)
        assert not equal(fit1.params, job1.params)


def test_fedrep_moves_the_head_alone_in_its_first_phase_and_the_body_alone_in_its_second():
    spy, jobs = Spy(seen=[]), []
    given = spec(spy, FedRep(head_epochs=3), NoPruning(), FedAvg(), FedProx(mu=0.2), cohort=EVERYONE, rounds=2)
    fit = Worker._train_more

    def watched(self, samples, key, turn, job, name):
        done = fit(self, samples, key, turn, job, name)
        jobs.append((name, job, done, len(samples)))
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "_train_more", watched)
        run(given, population())
    assert len(jobs) == 2 * EVERYONE
    for name, job, done, size in jobs:
        assert name == "head"
        assert job.num_steps == 3 * -(-size // job.batch_size)
        assert (job.prox, job.drift) == (0.0, None)
        assert equal(done.params, job.params)
        assert not equal(done.local, job.local)
    seconds = [what for _, what in spy.seen]
    for (_, _, first, _), job, after in zip(jobs, seconds[::2], seconds[1::2], strict=True):
        assert equal(job.local, first.local)
        assert equal(after.local, job.local)
        assert not equal(after.params, job.params)
        assert job.prox == 0.2


def test_one_epoch_on_head_and_body_at_once_is_another_method():
    digests = {run(spec(p, NoPruning(), FedAvg()), population()).digests[-1] for p in (FedPer(), FedRep(head_epochs=1))}
    assert len(digests) == 2


@pytest.mark.parametrize(
    "order", [(FedBN(), FedPer()), (FedPer(), FedBN()), (FedRep(head_epochs=1), FedBN())], ids=repr
)
def test_keepers_beside_each_other_keep_the_union_in_one_copy(order):
    model = "batchnorm_cnn"
    spy = Spy(seen=[])
    given = spec(spy, *order, NoPruning(), FedAvg(), model=model, cohort=EVERYONE, rounds=3)
    ran = run(given, population(model))
    assert ran.driver.worker.engine.kept == frozenset().union(*(kept_by(model, policy) for policy in order))
    for client in range(EVERYONE):
        job1, fit1, job2, *_ = [what for one, what in spy.seen if one == client]
        assert equal(job2.local_buffers, fit1.local_buffers)
        assert isinstance(order[0], FedRep) or equal(job2.local, fit1.local)
        assert not equal(job2.local, job1.local)
    for record in ran.driver.runtime.records.values():
        one, two = (memory for memory in record.memories if memory is not None)
        assert one[0] is two[0]  # one copy of the parameters, whoever keeps them


@pytest.mark.parametrize("kind", ["float16", "stc"])
@pytest.mark.parametrize(
    "pruner", [Random(sparsity=0.5), Magnitude(sparsity=0.6), FedDST(sparsity=0.5, every=1)], ids=repr
)
@pytest.mark.parametrize("case", ["FedPer", "FedRep", "FedBN"])
def test_keepers_go_with_pruners_and_wires_and_nothing_is_cut_from_what_is_kept(case, pruner, kind):
    model, policy, _ = KEEPERS[case]
    pruned = pruner if not isinstance(pruner, FedDST) else replace(pruner, until=9)
    optim = MOMENTUM if kind == "float16" else Optim()
    given = spec(policy, pruned, FedAvg(), model=model, wire=WIRES[kind], rounds=3, optim=optim)
    ran = run(given, population(model))
    server = ran.servers[-1]
    assert not server.params.flat[~server.mask.flat].any()
    assert kept_by(model, policy).isdisjoint(server.mask.layout.names)
    for record in ran.driver.runtime.records.values():
        assert bool((record.memories[0][0].flat != 0).all())


@pytest.mark.parametrize("case", KEEPERS)
def test_packing_is_invisible_to_what_is_kept_and_to_its_scores(case):
    model, policy, _ = KEEPERS[case]
    evaluation = EvalSpec(every=1, clients="all", batch_size=8)
    given = spec(policy, Random(sparsity=0.5), FedAvg(), model=model, rounds=3, evaluation=evaluation)
    whole = run(given, population(model))
    packed = run(given, population(model), Packed(given, population(model), chunk=2, workers=2))
    assert packed.digests == whole.digests
    for a, b in zip(packed.records, whole.records, strict=True):
        assert a.accuracies == b.accuracies
        assert len(a.accuracies) == EVERYONE
    assert "test/accuracy" not in whole.rows[-1]


def test_what_a_client_runs_is_the_servers_part_and_its_own():
    given = spec(FedPer(), NoPruning(), FedAvg(), cohort=EVERYONE)
    ran = run(given, population())
    worker, server = ran.driver.worker, ran.driver.server
    view = View(
        params=server.params,
        buffers=server.buffers,
        mask=None,
        local=worker.local,
        local_buffers=worker.local_buffers,
    )
    for record in ran.driver.runtime.records.values():
        mine = FedPer().view(view, record.memories[0], None)
        assert mine.params is server.params
        assert equal(mine.local, record.memories[0][0])
    assert FedPer().view(view, None, None) is view


# -- refusals --------------------------------------------------------------------------------------------------------

MLP = {"layers.0.weight": "weight", "layers.0.bias": "bias", "layers.1.weight": "weight", "layers.1.bias": "bias"}


def test_the_head_begins_with_the_layer_that_is_counted_from_the_last():
    names = {**MLP, "norm.weight": "norm", "fc.weight": "weight", "fc.bias": "bias", "end.scale": "other"}
    buffers = Layout(("norm.running_mean", "layers.1.seen"), ((2,), (2,)))
    assert FedPer(layers=1).keeps(names, buffers) == {"fc.weight", "fc.bias", "end.scale"}
    two = {"layers.1.weight", "layers.1.bias", "layers.1.seen", "norm.weight", "norm.running_mean"}
    assert FedPer(layers=2).keeps(names, buffers) == two | FedPer(layers=1).keeps(names, buffers)
    assert FedRep(names=("*.bias",)).keeps(names, buffers) == {
        "layers.0.bias",
        "layers.1.bias",
        "layers.1.seen",
        "fc.bias",
    }


@pytest.mark.parametrize("kind", [FedPer, FedRep])
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"layers": 2}, "layers is 2; that is every parameter of this model, and a head is some of them"),
        ({"layers": 3}, "layers is 3; that is no parameter of this model, and a head is some of them"),
        ({"names": ("head.*",)}, "names is ['head.*']; that is no parameter of this model"),
        ({"names": ("*",)}, "names is ['*']; that is every parameter of this model"),
    ],
)
def test_a_head_that_is_nothing_or_everything_is_refused_once_the_model_is_known(kind, settings, sentence):
    policy = kind(**settings)
    policy.check(facts(policy, FedAvg()))
    kind().check(facts(kind(), FedAvg(), kinds=MLP))
    with pytest.raises(FieldError) as caught:
        policy.check(facts(policy, FedAvg(), kinds=MLP))
    assert str(caught.value).startswith(sentence)
    assert "layers.1.bias" in str(caught.value)


def test_fedbn_is_refused_where_nothing_is_normalised_over_batches():
    with pytest.raises(ConfigError, match="personal is fedbn and this model has no batch normalisation"):
        FedBN().check(facts(FedBN(), FedAvg(), kinds=MLP))
    with pytest.raises(ConfigError, match="personal is fedbn and this model has no batch normalisation"):
        FedBN().keeps({**MLP, "norm.weight": "norm"}, Layout((), ()))


@pytest.mark.parametrize("policy", [FedPer(), FedRep(), FedBN()], ids=repr)
def test_keepers_are_refused_where_no_step_is_local(policy):
    with pytest.raises(ConfigError, match="keeps tensors at clients; it needs a strategy whose clients take local"):
        policy.check(facts(policy, FedSGD()))


@pytest.mark.parametrize("policy", [Ditto(), LocalFineTuning()], ids=repr)
def test_a_policy_further_in_must_not_take_the_place_of_a_clients_own_model(policy):
    for fine in ((policy, FedPer()), (LocalFineTuning(), policy), (LocalFineTuning(), policy, FedBN())):
        policy.check(facts(*fine, FedAvg()))
    with pytest.raises(ConfigError, match=r"fedper stands before .* name them the other way round"):
        policy.check(facts(FedPer(), policy, FedAvg()))


@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        (FedPer, {"layers": 0}, "layers is 0; it is a number of layers"),
        (FedPer, {"names": ()}, "names is (); it is a list of patterns"),
        (FedRep, {"head_epochs": 0}, "head_epochs is 0; it is a number of epochs"),
        (FedBN, {"keep": "none"}, "keep is 'none'; choose all or statistics"),
        (Ditto, {"pull": -1.0}, "pull is -1.0; it must be 0 or more"),
        (Ditto, {"epochs": 0}, "epochs is 0; it is a number of epochs"),
        (Ditto, {"start": "zero"}, "start is 'zero'; choose initial or received"),
        (LocalFineTuning, {"epochs": 0}, "epochs is 0; it is a number of epochs"),
        (LocalFineTuning, {"lr": 0.0}, "lr is 0.0; it must be above 0"),
    ],
)
def test_a_personal_policy_refuses_values_that_make_no_sense(kind, settings, sentence):
    with pytest.raises(FieldError) as caught:
        kind(**settings)
    assert str(caught.value).startswith(sentence)
