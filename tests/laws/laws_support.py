"""Tiny federations for the laws: synthetic data, a few clients, runs in this process with everything observed."""

import dataclasses
import itertools
from dataclasses import replace
from functools import lru_cache, partial

from fedray.corrections import FedLC, FedProx, FedSAM, LabelSmoothing, Scaffold
from fedray.keys import Key
from fedray.models import MLP, BatchNormCNN, LeNet, McMahanCNN, Task
from fedray.personal import Ditto, FedBN, FedPer, FedRep, LocalFineTuning
from fedray.pruners import FedDST, Magnitude, NoPruning, Random
from fedray.round import Optim, Policy
from fedray.strategies import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedDyn, FedNova, FedSGD, FedYogi
from fedray.testing.compare import distance, fingerprint
from fedray.testing.federation import Packed, Ran, Watching, run, run_spec, synthetic
from fedray.train import LearningRate
from fedray.wire import Delta, Float16, ScaledSign, TopK, Uniform, Way, Wire

__all__ = ["Packed", "Ran", "Watching", "distance", "fingerprint", "run"]

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
    key = Key.of(7).fold("data", model, sum(sizes))
    return synthetic(shape, sizes=sizes, num_classes=CLASSES, key=key, num_test=num_test)


def task(model="mlp", **changes):
    shape, build = MODELS[model]
    return Task(build=partial(build, shape=shape, num_classes=CLASSES), **changes)


def spec(*policies, model="mlp", lr=0.1, batch_size=4, epochs=1, steps=None, engine="eager", optim=None, **changes):
    """A run of these policies; without any, dense FedAvg."""
    named = tuple((type(policy).__name__.lower(), policy) for policy in policies or (NoPruning(), FedAvg()))
    changes["learning_rate"] = lr if isinstance(lr, LearningRate) else LearningRate(lr=lr)
    changes |= {"batch_size": batch_size, "epochs": epochs, "steps": steps, "engine": engine, "optim": optim or Optim()}
    return run_spec(named, task(model), **changes)


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
