"""The engine trains as torch.optim does on the same batches, recorded or not; masks, statistics, clients stay apart."""

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from laws_support import CLASSES, MODELS, distance, label, population, run, spec, task
from torch import nn

from fedray.keys import Key
from fedray.models import Task
from fedray.pruners import NoPruning
from fedray.round import Job, Message, Optim, View
from fedray.sim.client import Worker
from fedray.sim.spec import TrainerSpec
from fedray.strategies import FedAvg, FedSGD
from fedray.train import Engine, LearningRate, Samples
from fedray.train import engine as engine_module
from fedray.tree import Mask, Tree, equal, restrict

KEY = Key.of(0).fold("client", 3)
OPTIMS = {
    "sgd": Optim(),
    "momentum": Optim(momentum=0.9),
    "nesterov": Optim(momentum=0.8, nesterov=True),
    "weight decay": Optim(weight_decay=0.05),
    "clip": Optim(clip_norm=0.5),
    "everything": Optim(momentum=0.9, nesterov=True, weight_decay=0.01, clip_norm=1.0),
    "adam": Optim(name="adam"),
    "adam with decay": Optim(name="adam", betas=(0.8, 0.95), eps=1e-6, weight_decay=0.05),
    "adamw": Optim(name="adamw", weight_decay=0.1, clip_norm=1.0),
}
RATES = {"adam": 0.01, "adamw": 0.01, "sgd": 0.1}


def engine(model="mlp", kind="eager", made=None):
    shape = MODELS[model][0] if made is None else made[1]
    return Engine(task(model) if made is None else made[0], key=Key.of(0), sample_shape=shape, device="cpu", kind=kind)


def samples(model="mlp", count=11, offset=0, shape=None):
    shape = shape or MODELS[model][0]
    random = Key.of(1).fold(model).numpy()
    x = torch.from_numpy(random.normal(size=(40, *shape)).astype(np.float32))
    y = torch.from_numpy(random.integers(0, CLASSES, 40))
    return Samples(x, y, torch.arange(offset, offset + count), torch.tensor([0.2]), torch.tensor([1.3]), 1.0)


def job(engine, *, mask=None, num_steps=10, batch_size=4, optim=None, lr=None, **changes):
    optim = optim or Optim()
    params, buffers = engine.origin()[:2]
    lr = RATES[optim.name] if lr is None else lr
    return Job(
        params=params,
        buffers=buffers,
        mask=mask,
        num_steps=num_steps,
        batch_size=batch_size,
        lr=lr,
        optim=optim,
        **changes,
    )


def view(params, buffers, mask=None):
    return View(params=params, buffers=buffers, mask=mask)


def fit(engine, given, data, key=KEY):
    return engine.fit(given, Message(), data, key)


def batches(data, num_steps, batch_size, key=KEY):
    """The batches of a job: epochs over a keyed permutation each, the last batch of an epoch smaller."""
    found, epoch = [], 0
    while len(found) < num_steps:
        order = key.fold("batches", epoch).permutation(len(data))
        found += [data.take(chunk, torch.device("cpu")) for chunk in order.split(batch_size)]
        epoch += 1
    return found[:num_steps]


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def by_torch(engine, given, data, key=KEY):
    """The same job by a plain PyTorch loop: weights (n,) after it, and the dense gradient of each step."""
    module = copy.deepcopy(engine.module).to(memory_format=torch.contiguous_format)
    parameters = list(module.parameters())
    layout = given.params.layout
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.data = given.params[name].clone()
            if given.mask is not None:
                parameter.data.mul_(given.mask[name])
            parameter.grad = None
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(given.buffers[name])
    start = [p.detach().clone() for p in parameters]
    o = given.optim
    if o.name == "sgd":
        options = {"momentum": o.momentum, "nesterov": o.nesterov, "weight_decay": o.weight_decay}
        optimizer = torch.optim.SGD(parameters, lr=given.lr, **options)
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[o.name]
        optimizer = kind(parameters, lr=given.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
    module.train()
    gradients = []
    for x, y in batches(data, given.num_steps, given.batch_size, key):
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        gradients.append(flat(p.grad for p in parameters))
        for name, parameter, first in zip(layout.names, parameters, start, strict=True):
            if given.prox:
                parameter.grad += given.prox * (parameter.detach() - first)
            if given.drift is not None:
                parameter.grad += given.drift[name]
            if given.mask is not None:
                parameter.grad *= given.mask[name]
        if o.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, o.clip_norm)
        optimizer.step()
    return flat(parameters), gradients, {n: b.clone() for n, b in module.named_buffers()}


def half(layout, share=0.4):
    """A mask that cuts weights of every layer and leaves biases."""
    flat = torch.rand(layout.size, generator=Key.of(8).torch()) < share
    for name in layout.names:
        if name.endswith("bias"):
            flat[layout.spans[name]] = True
    return Mask(layout, flat)


def drift_of(layout):
    return Tree(layout, 0.05 * torch.randn(layout.size, generator=Key.of(9).torch()))


@pytest.fixture(scope="module")
def engines():
    """One engine a model and kind: recording a step takes a while."""
    made = {}

    def get(model, kind):
        if (model, kind) not in made:
            made[model, kind] = engine(model, kind)
            made[model, kind].start = made[model, kind].origin()[:2]
            made[model, kind].origin = lambda: made[model, kind].start
        return made[model, kind]

    return get


# -- equal to torch.optim --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("optim", OPTIMS)
def test_training_is_torch_optim_on_the_same_batches(optim, masked, engines):
    eager = engines("mlp", "eager")
    mask = half(eager.params_layout) if masked else None
    given = job(eager, mask=mask, optim=OPTIMS[optim])
    ours, (theirs, _, _) = fit(eager, given, samples()).params, by_torch(eager, given, samples())
    assert distance(ours, theirs) < 1e-6
    assert distance(ours, given.params) > 1e-3
    if optim != "sgd":
        plain = fit(eager, replace(given, optim=Optim()), samples()).params
        assert distance(ours, plain) > 1e-4  # every setting does something


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("optim", ["momentum", "clip", "adam with decay"])
@pytest.mark.parametrize("model", ["lenet", "mcmahan_cnn", "batchnorm_cnn"])
def test_convolutions_too_are_trained_as_by_torch(model, optim, masked, engines):
    eager = engines(model, "eager")
    given = job(eager, mask=half(eager.params_layout) if masked else None, num_steps=5, optim=OPTIMS[optim])
    theirs = by_torch(eager, given, samples(model))[0]
    assert distance(fit(eager, given, samples(model)).params, theirs) < 1e-5


@pytest.mark.parametrize("batch_size", [1, 2, 3, 11, 40])
@pytest.mark.parametrize("num_steps", [0, 1, 7])
def test_batches_go_through_fresh_permutations_with_a_smaller_last_one(batch_size, num_steps, engines):
    eager = engines("mlp", "eager")
    given = job(eager, num_steps=num_steps, batch_size=batch_size)
    done = fit(eager, given, samples())
    assert distance(done.params, by_torch(eager, given, samples())[0]) < 1e-6
    assert (done.num_steps, done.num_examples) == (num_steps, 11)
    assert equal(done.params, given.params) == (num_steps == 0)
    assert math.isnan(done.loss) == (num_steps == 0)


@pytest.mark.parametrize("kind", ["eager", "traced"])
def test_the_loss_of_a_fit_is_the_mean_over_the_examples_it_saw(kind, engines):
    mine = engines("mlp", kind)
    given = job(mine, num_steps=3, batch_size=4, lr=0.0)  # 4 + 4 + 3 examples: one epoch at the start
    x, y = samples().take(slice(None), torch.device("cpu"))
    with torch.no_grad():
        mine._load(given.params, given.buffers, None)
        expected = float(F.cross_entropy(mine.module(x), y))
    assert fit(mine, given, samples()).loss == pytest.approx(expected, rel=1e-5)


# -- recorded steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mlp", "lenet", "mcmahan_cnn"])
def test_a_recorded_step_is_the_eager_one_for_every_optimiser_mask_and_batch_size(model, engines):
    eager, traced = engines(model, "eager"), engines(model, "traced")
    assert (eager.kind, traced.kind) == ("eager", "traced")
    mask, drift = half(eager.params_layout), drift_of(eager.params_layout)
    cases = [
        *({"optim": o, "mask": m} for o in OPTIMS.values() for m in (None, mask)),
        *({"optim": o, "batch_size": b} for o in (OPTIMS["sgd"], OPTIMS["momentum"]) for b in (1, 2, 3, 10, 40)),
        {"optim": OPTIMS["sgd"], "prox": 0.5, "mask": mask},
        {"optim": OPTIMS["adam"], "drift": drift, "mask": mask},
        {"optim": OPTIMS["sgd"], "wants": frozenset({"grad_sum"})},
    ]
    for case in cases:
        given = job(eager, num_steps=4, **case)
        one, two = (fit(e, given, samples(model)) for e in (eager, traced))
        assert distance(two.params, one.params) < 1e-5, case
        assert two.loss == pytest.approx(one.loss, rel=1e-5)
        for name, value in one.evidence.items():
            assert distance(two.evidence[name], value) < 1e-5
        if given.mask is not None:
            assert not two.params.flat[~mask.flat].view(torch.int32).any()


def test_a_recorded_engine_repeats_itself_bit_for_bit(engines):
    traced = engines("mlp", "traced")
    for optim in OPTIMS.values():
        given = job(traced, optim=optim, mask=half(traced.params_layout))
        assert equal(fit(traced, given, samples()).params, fit(traced, given, samples()).params)


class Branching(nn.Module):
    """Decides in Python by looking at data: no recording can be faithful."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.fc(x) if float(x.sum()) > 0 else 2 * self.fc(x)


class Frozen(nn.Module):
    """Decides by the size of the batch."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.fc(x) * (3.0 if len(x) == 1 else 1.0)


def test_auto_records_where_it_can_and_says_why_not_where_it_cannot():
    from fedray.errors import ConfigError

    assert engine("mlp", "auto").kind == "traced"
    batchnorm = engine("batchnorm_cnn", "auto")
    assert (batchnorm.kind, batchnorm.reason) == ("eager", "the model has buffers")
    for build in (Branching, Frozen):
        made = (Task(build=build), (6,))
        assert engine(kind="auto", made=made).kind == "eager"
        with pytest.raises(ConfigError, match=r"trainer\.engine"):
            engine(kind="traced", made=made)


# -- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("kind", ["eager", "traced"])
def test_weights_outside_the_mask_are_zero_at_every_step_and_so_are_the_moments(kind, optim, engines, monkeypatch):
    mine = engines("mlp", kind)
    mask = half(mine.params_layout)
    outside, seen = ~mask.flat, []
    original = engine_module._Update.step

    def step(self, x, y):
        loss = original(self, x, y)
        state = [mine.weights, *(m for m in (self.first, self.second) if m is not None)]
        seen.append([int(t[outside].count_nonzero()) for t in state])
        return loss

    monkeypatch.setattr(engine_module._Update, "step", step)
    given = job(mine, mask=mask, num_steps=8, optim=OPTIMS[optim], prox=0.1, drift=drift_of(mine.params_layout))
    dirty = replace(given, params=Tree(given.params.layout, given.params.flat + 1.0))
    for one in (given, replace(dirty, prox=0.0, drift=None)):
        done = fit(mine, one, samples())
        assert not done.params.flat[outside].view(torch.int32).any()
        assert int(done.params.flat[mask.flat].count_nonzero()) > 0
    assert len(seen) == 16
    assert not any(itertools.chain(*seen))


# -- what a job adds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["sgd", "everything", "adamw"])
@pytest.mark.parametrize("added", ["prox", "drift", "both"])
def test_prox_and_drift_are_added_to_every_gradient(added, optim, engines):
    eager = engines("mlp", "eager")
    layout = eager.params_layout
    extra = {}
    if added != "drift":
        extra["prox"] = 0.7
    if added != "prox":
        extra["drift"] = drift_of(layout)
    for mask in (None, half(layout)):
        given = job(eager, mask=mask, optim=OPTIMS[optim], **extra)
        ours = fit(eager, given, samples()).params
        assert distance(ours, by_torch(eager, given, samples())[0]) < 1e-6
        assert distance(ours, fit(eager, job(eager, mask=mask, optim=OPTIMS[optim]), samples()).params) > 1e-4


def test_the_formula_of_one_step_by_hand(engines):
    eager = engines("mlp", "eager")
    drift = drift_of(eager.params_layout)
    data = samples(count=5)
    one = job(eager, num_steps=1, batch_size=5, lr=0.1, drift=drift, prox=0.5)
    gradient = by_torch(eager, one, data)[1][0]
    after = one.params.flat - 0.1 * (gradient + drift.flat)  # the pull is zero where it starts
    assert distance(fit(eager, one, data).params, after) < 1e-6
    two = replace(one, num_steps=2)
    second = by_torch(eager, two, data)[1][1]
    then = after - 0.1 * (second + drift.flat + 0.5 * (after - one.params.flat))
    assert distance(fit(eager, two, data).params, then) < 1e-6


@pytest.mark.parametrize("kind", ["eager", "traced"])
@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_grad_sum_is_the_sum_of_the_dense_batch_gradients(lr, kind, engines):
    mine = engines("mlp", kind)
    mask = half(mine.params_layout)
    optim = Optim(weight_decay=0.1, clip_norm=0.1, momentum=0.5)
    given = job(mine, mask=mask, optim=optim, lr=lr, prox=0.3, wants=frozenset({"grad_sum"}))
    done = fit(mine, given, samples())
    expected = torch.stack(by_torch(mine, given, samples())[1]).sum(0)
    assert distance(done.evidence["grad_sum"], expected) < 1e-5
    assert done.evidence["grad_sum"].flat[~mask.flat].count_nonzero() > 0
    assert not fit(mine, replace(given, wants=frozenset()), samples()).evidence
    if lr == 0:
        assert equal(done.params, restrict(given.params, mask))


# -- probes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["eager", "traced"])
@pytest.mark.parametrize("model", ["mlp", "lenet", "batchnorm_cnn"])
@pytest.mark.parametrize("batch_size", [None, 4, 100])
def test_a_probe_gives_the_dense_gradient_at_the_pruned_point(batch_size, model, kind, engines):
    if (model, kind) == ("batchnorm_cnn", "traced"):
        return  # statistics cannot be recorded
    mine, data = engines(model, kind), samples(model)
    mask = half(mine.params_layout)
    params, buffers = mine.origin()[:2]
    seen, evidence = mine.probe(
        view(params, buffers, mask), data, KEY, wants=frozenset({"grad"}), batch_size=batch_size
    )
    order = KEY.fold("probe").permutation(11)[:batch_size]
    module = copy.deepcopy(mine.module)
    for name, parameter in module.named_parameters():
        parameter.data = (params[name] * mask[name]).clone()
        parameter.grad = None
    for name, buffer in buffers.items():
        dict(module.named_buffers())[name].copy_(buffer)
    x, y = data.take(order, torch.device("cpu"))
    loss = F.cross_entropy(module.train()(x), y)
    loss.backward()
    assert seen["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert distance(evidence["grad"], flat(p.grad for p in module.parameters())) < 1e-5
    assert evidence["grad"].flat[~mask.flat].count_nonzero() > 0
    without = mine.probe(view(params, buffers, mask), data, KEY, wants=frozenset(), batch_size=batch_size)
    assert without == (seen, {})


def test_a_probe_in_chunks_is_a_probe_at_once(engines, monkeypatch):
    mine, (params, buffers) = engines("mlp", "eager"), engines("mlp", "eager").origin()[:2]
    options = {"wants": frozenset({"grad"}), "batch_size": None}
    whole = mine.probe(view(params, buffers, None), samples(), KEY, **options)
    monkeypatch.setattr(engine_module, "PROBE_CHUNK", 4)
    chunked = mine.probe(view(params, buffers, None), samples(), KEY, **options)
    assert distance(chunked[1]["grad"], whole[1]["grad"]) < 1e-6
    assert chunked[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-6)


def test_jobs_and_probes_leave_their_inputs_alone_and_nothing_behind(engines):
    mine = engines("mlp", "eager")
    given = job(mine, mask=half(mine.params_layout), optim=OPTIMS["momentum"], drift=drift_of(mine.params_layout))
    before = given.params.flat.clone(), given.drift.flat.clone()
    first = fit(mine, given, samples())
    kept = first.params.flat.clone()
    fit(mine, job(mine, optim=OPTIMS["adam"]), samples(offset=15))
    mine.probe(view(first.params, first.buffers, None), samples(), KEY, wants=frozenset({"grad"}), batch_size=None)
    assert torch.equal(first.params.flat, kept)
    assert torch.equal(given.params.flat, before[0])
    assert torch.equal(given.drift.flat, before[1])
    assert equal(fit(mine, given, samples()).params, first.params)


# -- statistics of batch normalisation -------------------------------------------------------------------------------


def test_running_statistics_move_in_training_as_in_torch_and_rest_in_evaluation(engines):
    mine, data = engines("batchnorm_cnn", "eager"), samples("batchnorm_cnn")
    given = job(mine)
    done = fit(mine, given, data)
    theirs = by_torch(mine, given, data)[2]
    assert distance(done.buffers, given.buffers) > 0.01
    for name, value in done.buffers.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6)
    mine.evaluate(view(done.params, done.buffers), data)
    assert equal(mine._read_buffers(), done.buffers)
    other = mine.evaluate(view(done.params, given.buffers), data)
    assert not torch.equal(other["loss"], mine.evaluate(view(done.params, done.buffers), data)["loss"])


class Cumulative(nn.Module):
    """Statistics as a cumulative mean: they depend on a counter that is an integer buffer."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(6, momentum=None), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.fc(self.norm(x))


@pytest.mark.parametrize("model", ["batchnorm_cnn", "cumulative"])
def test_statistics_do_not_leak_between_clients_of_one_process(model):
    made = (Task(build=Cumulative), (6,)) if model == "cumulative" else None
    shape = (6,) if made else MODELS[model][0]
    shared, alone = (engine(model, made=made) for _ in range(2))
    given = job(shared)
    neighbour, mine = (samples(offset=offset, shape=shape) for offset in (0, 20))
    fit(shared, given, neighbour)
    shared.probe(view(given.params, given.buffers, None), neighbour, KEY, wants=frozenset({"grad"}), batch_size=None)
    one, two = fit(shared, given, mine), fit(alone, given, mine)
    assert equal(one.params, two.params)
    assert equal(one.buffers, two.buffers)


@pytest.mark.parametrize("strategy", [FedAvg(), FedAvg(weight_by="uniform"), FedSGD()], ids=label)
def test_statistics_are_averaged_by_the_server_with_the_clients_weights(strategy):
    ran = run(spec(NoPruning(), strategy, model="batchnorm_cnn", rounds=2), population("batchnorm_cnn"))
    for (before, after), uploads, record in zip(itertools.pairwise(ran.servers), ran.uploads, ran.records, strict=True):
        sizes = [client["num_examples"] for client in record.clients]
        weights = torch.tensor([1.0] * 4 if "uniform" in label(strategy) else sizes, dtype=torch.float64)
        values = torch.stack([message["buffers"].flat.double() for message, _ in uploads])
        expected = (weights[:, None] * values).sum(0) / weights.sum()
        torch.testing.assert_close(after.buffers.flat, expected.float(), rtol=1e-6, atol=1e-7)
        assert distance(after.buffers, before.buffers) > 0.01


# -- clients of any size, and their data -----------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_clients_smaller_than_a_batch_train(count, model, engines):
    eager = engines(model, "eager")
    done = fit(eager, job(eager, num_steps=3, batch_size=20), samples(model, count))
    assert torch.isfinite(done.params.flat).all()
    assert done.num_examples == count
    assert not equal(done.params, job(eager).params)


def test_samples_are_normalised_by_channel_when_they_are_read():
    raw = torch.randint(0, 256, (9, 3, 4, 5), dtype=torch.uint8, generator=Key.of(0).torch())
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1.0, 2.0])
    y = torch.arange(9)
    data = Samples(raw, y, torch.tensor([7, 2, 5]), mean, std, 1 / 255)
    assert len(data) == 3
    before = raw.clone()
    x, targets = data.take(torch.tensor([2, 0]), torch.device("cpu"))
    expected = (raw[[5, 7]].double() / 255 - mean.double().view(1, 3, 1, 1)) / std.double().view(1, 3, 1, 1)
    torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-6)
    assert x.dtype == torch.float32
    assert targets.tolist() == [5, 7]
    assert torch.equal(raw, before)
    floats = Samples(raw.float(), y, torch.arange(9), torch.tensor([1.0]), torch.tensor([2.0]), 0.5)
    torch.testing.assert_close(floats.take(slice(None), torch.device("cpu"))[0], (raw.float() * 0.5 - 1.0) / 2.0)
    assert torch.equal(floats.x, before.float())


def test_a_client_reads_its_own_rows():
    pop = population()
    for client, (start, stop) in enumerate(itertools.pairwise(pop.starts.tolist())):
        x, y = pop.train(client).take(slice(None), torch.device("cpu"))
        assert y.tolist() == pop.train_y[start:stop].tolist()
        np.testing.assert_allclose(x.numpy(), (pop.train_x[start:stop] - pop.mean) / pop.std, rtol=1e-6, atol=1e-6)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.drop = nn.Linear(6, 32), nn.Linear(32, CLASSES), nn.Dropout(0.5)

    def forward(self, x):
        return self.two(self.drop(F.relu(self.one(x))))


@pytest.mark.parametrize("kind", ["eager", "traced"])
def test_dropout_is_a_function_of_the_key(kind):
    mine = engine(kind=kind, made=(Task(build=Dropping), (6,)))
    given = job(mine)
    first = fit(mine, given, samples())
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = fit(mine, given, samples())
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(first.params, again.params)
    # One batch of everything, so that another key changes only what is dropped, and the order.
    one = job(mine, num_steps=1, batch_size=11)
    assert distance(fit(mine, one, samples()).params, fit(mine, one, samples(), Key.of(5)).params) > 1e-4
    params, buffers = given.params, given.buffers
    scores = [mine.evaluate(view(params, buffers), samples())["loss"] for _ in range(2)]
    assert torch.equal(*scores)  # nothing is dropped in evaluation


def test_a_probe_is_a_function_of_the_key_also_with_dropout():
    mine = engine(made=(Task(build=Dropping), (6,)))
    params, buffers = mine.origin()[:2]
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(
            mine.probe(view(params, buffers, None), samples(), KEY, wants=frozenset({"grad"}), batch_size=None)
        )
        assert torch.equal(torch.get_rng_state(), state)
    assert equal(found[0][1]["grad"], found[1][1]["grad"])


# -- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_scores_do_not_depend_on_the_batch_size_nor_on_how_rows_are_dealt_to_calls(model):
    from fedray.round import Server

    worker = Worker(spec(model=model), population(model))
    server = Server(params=worker.origin, buffers=worker.origin_buffers)
    whole = worker.evaluate(server, 0, 20, 20, "t").scores
    dealt = [worker.evaluate(server, start, stop, 5, "t").scores for start, stop in ((0, 10), (10, 20))]
    at_once = worker.evaluate(server, 0, 20, 5, "t").scores
    for name in ("accuracy", "loss"):
        pieces = np.concatenate([d[name] for d in dealt])
        assert np.array_equal(pieces, at_once[name])
        np.testing.assert_allclose(pieces, whole[name], rtol=1e-4, atol=1e-5)
        for size in (1, 7):
            np.testing.assert_allclose(
                worker.evaluate(server, 0, 20, size, "t").scores[name], whole[name], rtol=1e-4, atol=1e-5
            )
    with torch.no_grad():
        worker.engine._load(server.params, server.buffers, None)
        x, y = population(model).test(0, 20).take(slice(None), torch.device("cpu"))
        outputs = worker.engine.module.eval()(x)
    np.testing.assert_allclose(whole["loss"], F.cross_entropy(outputs, y, reduction="none").numpy(), rtol=1e-5)
    assert whole["accuracy"].tolist() == (outputs.argmax(1) == y).float().tolist()


# -- learning rates --------------------------------------------------------------------------------------------------


def test_learning_rates_follow_their_schedules():
    constant = LearningRate(lr=0.2)
    assert [constant.at(r, 10) for r in (1, 5, 10)] == [0.2] * 3
    step = LearningRate(lr=0.8, kind="step", decay=0.5, every=3)
    assert [step.at(r, 10) for r in range(1, 8)] == pytest.approx([0.8, 0.8, 0.8, 0.4, 0.4, 0.4, 0.2])
    cosine = LearningRate(lr=0.4, kind="cosine")
    assert cosine.at(1, 10) == pytest.approx(0.4)
    assert cosine.at(6, 10) == pytest.approx(0.2)
    assert cosine.at(10, 10) == pytest.approx(0.4 * 0.5 * (1 + math.cos(math.pi * 0.9)))
    assert cosine.at(11, 10) == pytest.approx(0.0, abs=1e-12)
    linear = LearningRate(lr=0.4, kind="linear")
    assert [linear.at(r, 4) for r in range(1, 6)] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])
    root = LearningRate(lr=0.4, kind="inverse_sqrt")
    assert [root.at(r, 9) for r in (1, 4, 9)] == pytest.approx([0.4, 0.2, 0.4 / 3])
    warm = LearningRate(lr=0.4, warmup=4)
    assert [warm.at(r, 9) for r in range(1, 7)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    both = LearningRate(lr=0.4, kind="linear", warmup=2)
    assert [both.at(r, 4) for r in range(1, 4)] == pytest.approx([0.2, 0.3, 0.2])
    assert [LearningRate(lr=1.0, kind=k).depends_on_rounds for k in ("constant", "step", "cosine", "linear")] == [
        False, False, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize("strategy", [FedAvg(), FedSGD()], ids=["fedavg", "fedsgd"])
def test_a_round_trains_at_the_rate_of_its_schedule(strategy):
    constant = run(spec(strategy, rounds=3, lr=0.2), population())
    stepped = run(spec(strategy, rounds=3, lr=LearningRate(lr=0.2, kind="step", decay=0.5, every=2)), population())
    assert stepped.digests[:2] == constant.digests[:2]
    assert stepped.digests[2] != constant.digests[2]
    # One step of plain gradient descent a round: half the rate is half the way.
    one, two = (run(spec(strategy, rounds=1, batch_size=99, lr=rate), population()) for rate in (0.2, 0.1))
    moved = [r.servers[1].params.flat - r.servers[0].params.flat for r in (one, two)]
    assert distance(moved[0], 2 * moved[1]) < 1e-5


def test_epochs_and_steps_say_how_long_a_client_trains():
    facts = {"learning_rate": LearningRate(lr=0.1), "batch_size": 4, "optim": Optim(), "engine": "eager"}
    epochs = TrainerSpec(epochs=2, steps=None, **facts)
    assert [epochs.num_steps(n) for n in (1, 4, 5, 8, 9)] == [2, 2, 4, 4, 6]
    steps = TrainerSpec(epochs=None, steps=7, **facts)
    assert [steps.num_steps(n) for n in (1, 100)] == [7, 7]
