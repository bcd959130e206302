"""Tiny federations for the laws: synthetic data, a few clients, runs in this process with everything observed."""

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import numpy as np
import torch

from fedray.corrections import FedLC, FedProx, FedSAM, LabelSmoothing, Scaffold
from fedray.keys import Key
from fedray.models import MLP, BatchNormCNN, LeNet, McMahanCNN, Task
from fedray.personal import Ditto, FedBN, FedPer, FedRep, LocalFineTuning
from fedray.pruners import FedDST, Magnitude, NoPruning, Random
from fedray.round import Optim, Policy
from fedray.sim.client import Worker
from fedray.sim.driver import Driver
from fedray.sim.population import Population
from fedray.sim.runtime import InlineRuntime
from fedray.sim.spec import EvalSpec, RunSpec, TrainerSpec
from fedray.strategies import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedDyn, FedNova, FedSGD, FedYogi
from fedray.sums import Sums
from fedray.train import LearningRate
from fedray.tree import Mask, Tree
from fedray.wire import Delta, Float16, ScaledSign, TopK, Uniform, Way, Wire

# -- wires -----------------------------------------------------------------------------------------------------------


def way(*stages, **options):
    """One direction: these stages in order, for every part that admits loss."""
    return Way(chain={str(at): stage for at, stage in enumerate(stages)}, **options)


HALF = way(Float16())
WIRES = {
    "float32": Wire(),
    "float16": Wire(down=HALF, up=HALF),
    "int8": Wire(down=way(Uniform(bits=8, level="channel")), up=way(Uniform(bits=8), feedback=True)),
    "int8 with feedback on both sides": Wire(
        down=way(Uniform(bits=8), feedback=True), up=way(Uniform(bits=8, rounding="stochastic"), feedback=True)
    ),
    "stc": Wire(
        down=way(Delta(), TopK(fraction=0.2), ScaledSign(), feedback=True),
        up=way(TopK(fraction=0.2), ScaledSign(), feedback=True),
    ),
}

# -- federations -----------------------------------------------------------------------------------------------------

CLASSES = 3
SIZES = (9, 4, 7, 1, 12, 5)  # one client has one sample, two have less than a batch
MODELS = {
    "mlp": ((6,), partial(MLP, hidden=(8,))),
    "linear": ((6,), partial(MLP, hidden=())),
    "lenet": ((1, 16, 16), LeNet),
    "mcmahan_cnn": ((1, 4, 4), McMahanCNN),
    "batchnorm_cnn": ((2, 4, 4), partial(BatchNormCNN, width=4)),
}


@lru_cache
def population(model="mlp", sizes=SIZES, num_test=20):
    """Clients of these sizes with skewed labels; every class has a direction of its own."""
    shape, _ = MODELS[model]
    random = Key.of(7).fold("data", model, sum(sizes)).numpy()
    total = sum(sizes)
    y = np.concatenate(
        [(random.random(size) * 1.7 + client).astype(np.int64) % CLASSES for client, size in enumerate(sizes)]
    )
    test_y = np.arange(num_test, dtype=np.int64) % CLASSES
    means = random.normal(size=(CLASSES, *shape))
    x = means[y] + random.normal(size=(total, *shape))
    test_x = means[test_y] + random.normal(size=(num_test, *shape))
    starts = np.cumsum([0, *sizes])
    counts = [np.bincount(y[a:b], minlength=CLASSES) for a, b in itertools.pairwise(starts)]
    return Population(
        train_x=x.astype(np.float32),
        train_y=y,
        test_x=test_x.astype(np.float32),
        test_y=test_y,
        rows=np.arange(total),
        starts=starts,
        local_rows=np.concatenate([np.arange(c, c + 4) % num_test for c in range(len(sizes))]),
        local_starts=np.arange(len(sizes) + 1) * 4,
        label_counts=np.array(counts),
        mean=np.array([0.1], np.float32),
        std=np.array([1.5], np.float32),
        scale=1.0,
    )


def task(model="mlp", **changes):
    shape, build = MODELS[model]
    return Task(build=partial(build, shape=shape, num_classes=CLASSES), **changes)


def spec(*policies, model="mlp", lr=0.1, batch_size=4, epochs=1, steps=None, engine="eager", optim=None, **changes):
    """A run of these policies; without any, dense FedAvg."""
    named = tuple((type(policy).__name__.lower(), policy) for policy in policies or (NoPruning(), FedAvg()))
    learning_rate = lr if isinstance(lr, LearningRate) else LearningRate(lr=lr)
    facts = {
        "run_id": "law",
        "name": "law",
        "seed": 0,
        "rounds": 4,
        "num_clients": len(SIZES),
        "cohort": 4,
        "task": task(model),
        "policies": named,
        "wire": Wire(),
        "trainer": TrainerSpec(
            learning_rate=learning_rate,
            batch_size=batch_size,
            epochs=epochs,
            steps=steps,
            optim=optim or Optim(),
            engine=engine,
        ),
        "evaluation": EvalSpec(every=0, clients="cohort", batch_size=16),
    }
    return RunSpec(**facts | changes)


MOMENTUM = Optim(momentum=0.9, weight_decay=0.01)


def optim_for(strategy):
    """Momentum and weight decay where the strategy runs a local optimiser: they leak first where a mask does."""
    return Optim() if isinstance(strategy, FedSGD) else MOMENTUM


# -- policies --------------------------------------------------------------------------------------------------------

GRADUAL = Magnitude(sparsity=0.8, schedule="cubic", start=1, finish=4)
PRUNERS = (
    NoPruning(),
    Random(sparsity=0.8),
    Random(sparsity=0.5, allocation="uniform", rounding="floor"),
    Random(sparsity=0.4, allocation="er", budget="all_parameters"),
    Magnitude(sparsity=0.7),
    Magnitude(sparsity=0.7, start=2, allocation="erk"),
    Magnitude(sparsity=0.7, ranking="global"),
    GRADUAL,
    replace(GRADUAL, schedule="linear", allocation="er", every=2),
    replace(GRADUAL, schedule="iterative", ranking="global", start=0),
    replace(GRADUAL, sticky=False),
    replace(GRADUAL, sticky=False, ranking="global", schedule="iterative"),
    FedDST(sparsity=0.6, every=2, until=9),
    FedDST(sparsity=0.5, every=1, until=3, initial="random", ratio=0.3, regrow_dropped=False, ratio_decay="constant"),
    FedDST(sparsity=0.5, every=1, until=9, allocation="uniform", gradient_batch_size=None, rounding="floor"),
)
STRATEGIES = (
    FedAvg(),
    FedAvg(lr=0.5, weight_by="uniform"),
    FedSGD(),
    FedSGD(lr=0.7, weight_by="uniform", batch_size=3),
)
OPTIMISING = (
    FedAvgM(lr=0.2),
    FedAvgM(lr=0.5, momentum=0.5, nesterov=True, weight_by="uniform"),
    FedAdagrad(lr=0.3, tau=0.1),
    FedAdam(lr=0.1, tau=0.05),
    FedAdam(lr=0.05, tau=0.05, initial="zero", bias_correction=True, weight_by="uniform"),
    FedYogi(lr=0.1, tau=0.05),
    FedNova(),
    FedNova(lr=0.5, weight_by="uniform"),
    FedDyn(alpha=0.3),
)
CORRECTIONS = ((), (FedProx(mu=0.3),))
TOGETHER = (FedProx(mu=0.2), Scaffold(), FedSAM(rho=0.1), FedLC(tau=0.5), LabelSmoothing(smoothing=0.1))
MORE_CORRECTIONS = (*((one,) for one in TOGETHER[1:]), TOGETHER)
PERSONAL = (
    (FedPer(),),
    (FedRep(head_epochs=2),),
    (Ditto(pull=0.3),),
    (LocalFineTuning(),),
    (LocalFineTuning(), Ditto(epochs=2, start="received"), FedPer()),
)
NORMALISED = ((FedBN(),), (FedBN(keep="statistics"), FedPer()))
"""Personal policies for models with batch normalisation."""


def pruner_of(onion):
    """The pruner of an onion: what stands before its strategy."""
    return onion[[isinstance(policy, STRATEGY_KINDS) for policy in onion].index(True) - 1]


def strategy_of(onion):
    return next(policy for policy in onion if isinstance(policy, STRATEGY_KINDS))


STRATEGY_KINDS = (FedAvg, FedSGD, FedAvgM, FedAdagrad, FedAdam, FedYogi, FedNova, FedDyn)


def goes_together(pruner, strategy, corrections=()):
    """FedDST needs deltas, and a pull does nothing to a client that stays where it is."""
    return not (isinstance(strategy, FedSGD) and (isinstance(pruner, FedDST) or corrections))


ONIONS = tuple(
    (pruner, strategy, *corrections)
    for pruner, strategy, corrections in itertools.product(PRUNERS, STRATEGIES, CORRECTIONS)
    if goes_together(pruner, strategy, corrections)
)


SOME_PRUNERS = (PRUNERS[0], PRUNERS[4], PRUNERS[-3], PRUNERS[-5])
"""One of each kind: none, magnitude once, FedDST, and clients that train densely in between."""
MORE_ONIONS = (
    *((pruner, strategy) for pruner in SOME_PRUNERS for strategy in OPTIMISING),
    *((pruner, FedAvg(), *corrections) for pruner in SOME_PRUNERS for corrections in MORE_CORRECTIONS),
    *((SOME_PRUNERS[2], strategy, *TOGETHER) for strategy in OPTIMISING[::2]),
)
PERSONAL_ONIONS = tuple(
    (*personal, pruner, strategy, *corrections)
    for personal in PERSONAL
    for pruner, strategy, corrections in (
        (SOME_PRUNERS[0], FedAvg(), ()),
        (SOME_PRUNERS[2], FedNova(), TOGETHER[:2]),
        (SOME_PRUNERS[3], FedDyn(alpha=0.3), (FedSAM(rho=0.1),)),
    )
)


def label(value):
    """A short test id: what was changed from the default, for policies and tuples of them."""
    if isinstance(value, tuple):
        return "+".join(label(v) for v in value) or "none"
    if isinstance(value, Policy):
        changed = [f"{f.name}={v}" for f in dataclasses.fields(value) if (v := getattr(value, f.name)) != f.default]
        return f"{type(value).__name__}({','.join(changed)})"
    return str(value)


# -- runs ------------------------------------------------------------------------------------------------------------


@dataclass
class Ran:
    """An observed run. servers: the start, then one a round. uploads: per round, (message, mask that was sent)."""

    driver: Driver
    records: list = field(default_factory=list)
    servers: list = field(default_factory=list)
    uploads: list = field(default_factory=list)

    @property
    def rows(self):
        return [record.row for record in self.records]

    @property
    def digests(self):
        return [row["digest"] for row in self.rows]

    @property
    def bytes(self):
        return [(row["wire/up_bytes"], row["wire/down_bytes"]) for row in self.rows]


class Watching(Worker):
    """A worker that notes every upload which the server's side decodes."""

    seen: list

    def receive(self, payload, sent_mask, *more):
        message = super().receive(payload, sent_mask, *more)
        self.seen.append((message, sent_mask))
        return message


def run(spec, population, runtime=None):
    """Drive a run to its end; `runtime` without one is inline with an observed worker."""
    worker = Watching(spec, population)
    worker.seen = []
    ran = Ran(Driver(spec, population, runtime or InlineRuntime(spec, population, worker), worker))
    ran.servers.append(ran.driver.server)
    for record in ran.driver.rounds():
        ran.records.append(record)
        ran.servers.append(ran.driver.server)
        # The next round's clients have been heard already when a round's row is written.
        ran.uploads.append(worker.seen[: spec.cohort])
        del worker.seen[: spec.cohort]
    return ran


class Packed:
    """A runtime that deals the cohort to several workers in chunks, moves homes every round and shuffles answers."""

    def __init__(self, spec, population, *, chunk, workers=1, shuffle=None):
        self.workers = [Worker(spec, population) for _ in range(workers)]
        self.chunk, self.shuffle, self.calls = chunk, shuffle, 0
        self.records = {}

    def wait_ready(self):
        return "eager", "a test"

    def take_losses(self):
        return []

    def put(self, value):
        return value

    def start(self, broadcast, clients, evaluations):
        members = [client for client, _ in clients]
        if self.shuffle is not None:
            members = [members[i] for i in self.shuffle.fold("members", self.calls).permutation(len(members)).tolist()]
        replies = []
        for start in range(0, len(members), self.chunk):
            chunk = members[start : start + self.chunk]
            worker = self.workers[(self.calls + start // self.chunk) % len(self.workers)]
            reply, changed = worker.train(broadcast, chunk, {client: self.records.get(client) for client in chunk})
            self.records.update(changed)
            replies.append(reply)
        replies += [self.workers[-1].evaluate(w.handle, w.start, w.stop, w.batch_size, w.tag) for w in evaluations]
        self.calls += 1
        if self.shuffle is not None:
            replies = [replies[i] for i in self.shuffle.fold("replies", self.calls).permutation(len(replies)).tolist()]
        yield from replies

    def ask(self, question, broadcast, clients, *arguments):
        for at, (client, _) in enumerate(clients):
            worker = self.workers[at % len(self.workers)]
            yield getattr(worker, question)(broadcast, [client], self.records, *arguments)


# -- comparing -------------------------------------------------------------------------------------------------------


def fingerprint(value):
    """Everything that a value of the round holds, as plain bits that can be compared; a probe has none."""
    if isinstance(value, Tree | Mask):
        return type(value).__name__, value.layout, value.flat.numpy().tobytes(), getattr(value, "seed", None)
    if isinstance(value, Sums):
        return {name: fingerprint(vars(total)) for name, total in value._totals.items()}
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, [(f.name, fingerprint(getattr(value, f.name))) for f in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return [(name, fingerprint(item)) for name, item in value.items()]
    if isinstance(value, list | tuple):
        return [fingerprint(item) for item in value]
    if callable(value):
        return "callable"
    return repr(value)


def distance(a, b):
    """|a - b| / |b| over all coordinates, in float64."""
    a, b = (t.flat if isinstance(t, Tree) else t for t in (a, b))
    return float(torch.linalg.vector_norm(a.double() - b.double()) / torch.linalg.vector_norm(b.double()))
