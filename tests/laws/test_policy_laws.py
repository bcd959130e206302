"""What holds of every method as the driver runs it: alone, composed, packed and in any order."""

import dataclasses
import itertools
from dataclasses import replace
from typing import get_type_hints

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from laws_support import (
    HALF,
    MODELS,
    MOMENTUM,
    MORE_ONIONS,
    NORMALISED,
    ONIONS,
    OPTIMISING,
    PERSONAL_ONIONS,
    PRUNERS,
    SIZES,
    STRATEGIES,
    WIRES,
    Packed,
    distance,
    fingerprint,
    label,
    optim_for,
    population,
    pruner_of,
    run,
    spec,
    strategy_of,
)

from fedray import corrections, personal, strategies, wire
from fedray.config import (
    Config,
    ScopeConfig,
    ServerConfig,
    StopConfig,
    TrainerConfig,
    assemble,
    conf_folder,
    register,
)
from fedray.corrections import FedProx, Scaffold
from fedray.data import augment, partition, skew
from fedray.keys import Key
from fedray.pruners import FedDST, Magnitude, NoPruning, Random
from fedray.round import Optim
from fedray.sim import sampling
from fedray.sim.client import Worker
from fedray.sim.spec import EvalSpec
from fedray.strategies import FedAvg, FedSGD
from fedray.testing.wrap import twice, wrap
from fedray.wire import Codec, Way, Wire

EVERYONE = len(SIZES)


# -- reductions to what is known -------------------------------------------------------------------------------------


def descent(spec_, population_, mask=None, rounds=3, lr=0.1):
    """Centralised gradient descent on everybody's data, by plain PyTorch: the weights (n,) after each round."""
    worker = Worker(spec_, population_)
    module, parameters = worker.engine.module, dict(worker.engine.module.named_parameters())
    everything = worker.population.train(0)
    everything = replace(everything, index=torch.arange(sum(SIZES)))
    x, y = everything.take(slice(None), torch.device("cpu"))
    found = []
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.mul_(1.0 if mask is None else mask[name])
    for _ in range(rounds):
        gradients = torch.autograd.grad(F.cross_entropy(module.train()(x), y), list(parameters.values()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                parameter.sub_(lr * gradient * (1.0 if mask is None else mask[name]))
        found.append(torch.cat([p.detach().flatten() for p in parameters.values()]))
    return found


@pytest.mark.parametrize("pruner", [NoPruning(), Random(sparsity=0.6), Magnitude(sparsity=0.6)], ids=label)
@pytest.mark.parametrize("model", ["mlp", "lenet", "mcmahan_cnn"])
def test_one_full_batch_step_of_everyone_is_centralised_gradient_descent(model, pruner):
    for strategy in (FedAvg(), FedSGD()):
        given = spec(pruner, strategy, model=model, rounds=3, cohort=EVERYONE, batch_size=99)
        ran = run(given, population(model))
        for server, expected in zip(
            ran.servers[1:], descent(given, population(model), ran.servers[0].mask), strict=True
        ):
            assert distance(server.params, expected) < 1e-6
        # With smaller batches a round is more than one step.
        other = run(spec(pruner, FedAvg(), model=model, rounds=3, cohort=EVERYONE), population(model))
        assert distance(other.servers[-1].params, ran.servers[-1].params) > 1e-3


IDENTITIES = {
    "FedAvgM without momentum": ((NoPruning(), strategies.FedAvgM(momentum=0.0)), (NoPruning(), FedAvg())),
    "FedAvgM without momentum under a pruner": (
        (FedDST(sparsity=0.6, every=1, until=9), strategies.FedAvgM(momentum=0.0)),
        (FedDST(sparsity=0.6, every=1, until=9), FedAvg()),
    ),
    "FedProx at mu 0": ((NoPruning(), FedAvg(), FedProx(mu=0.0)), (NoPruning(), FedAvg())),
    "Random at sparsity 0": ((Random(sparsity=0.0), FedAvg()), (NoPruning(), FedAvg())),
    # A readjustment starts what it drops and regrows at zero, also where nothing is sparse: not so without one.
    "FedDST at sparsity 0": ((FedDST(sparsity=0.0, until=0), FedAvg()), (NoPruning(), FedAvg())),
    "FedDST at sparsity 0 and ratio 0": (
        (FedDST(sparsity=0.0, every=1, until=9, ratio=0.0), FedAvg()),
        (NoPruning(), FedAvg()),
    ),
    "FedDST at sparsity 0 before it readjusts": (
        (FedDST(sparsity=0.0, every=99, until=999, ratio_decay="constant"), FedAvg()),
        (NoPruning(), FedAvg()),
    ),
    "FedDST that swaps nothing": (
        (FedDST(sparsity=0.6, every=1, until=9, ratio=0.0), FedAvg()),
        (FedDST(sparsity=0.6, until=0), FedAvg()),
    ),
    "FedProx at mu 0 under a pruner": (
        (Magnitude(sparsity=0.6), FedAvg(), FedProx(mu=0.0)),
        (Magnitude(sparsity=0.6), FedAvg()),
    ),
    **{
        f"Magnitude at sparsity 0, {kind}, {ranking}, sticky={sticky}": (
            (Magnitude(sparsity=0.0, schedule=kind, ranking=ranking, sticky=sticky, start=1, finish=4), FedAvg()),
            (NoPruning(), FedAvg()),
        )
        for kind in ("one_shot", "linear", "cubic", "iterative")
        for ranking in ("local", "global")
        for sticky in (True, False)
    },
}


@pytest.mark.parametrize("case", IDENTITIES)
@pytest.mark.parametrize("optim", [Optim(), MOMENTUM], ids=["sgd", "momentum"])
def test_an_identity_setting_is_the_simpler_method_bit_for_bit(case, optim):
    mine, simple = (run(spec(*policies, optim=optim), population()) for policies in IDENTITIES[case])
    for a, b in zip(mine.servers, simple.servers, strict=True):
        assert fingerprint((a.params, a.buffers)) == fingerprint((b.params, b.buffers))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("weight_by", ["examples", "uniform"])
@pytest.mark.parametrize("pruner", [NoPruning(), Random(sparsity=0.6)], ids=label)
def test_fedsgd_is_one_full_batch_step_of_fedavg_at_the_same_rate(pruner, weight_by, model):
    # FedSGD has a batch of its own: all of a client's examples, whatever the trainer's is.
    one = run(spec(pruner, FedSGD(weight_by=weight_by), model=model, rounds=3, batch_size=4), population(model))
    two = run(spec(pruner, FedAvg(weight_by=weight_by), model=model, rounds=3, batch_size=99), population(model))
    for a, b in zip(one.servers, two.servers, strict=True):
        assert distance(a.params, b.params) < 1e-6
        if b.buffers.layout.size:
            assert distance(a.buffers, b.buffers) < 1e-6


@pytest.mark.parametrize("strategy", [FedAvg, FedSGD])
def test_weights_by_examples_and_uniform_differ_exactly_where_sizes_do(strategy):
    unequal = [run(spec(NoPruning(), strategy(weight_by=w)), population()) for w in ("examples", "uniform")]
    assert unequal[0].digests[0] != unequal[1].digests[0]
    alike = population("mlp", (6,) * EVERYONE)
    equal_sizes = [run(spec(NoPruning(), strategy(weight_by=w)), alike) for w in ("examples", "uniform")]
    for a, b in zip(equal_sizes[0].servers, equal_sizes[1].servers, strict=True):
        assert distance(a.params, b.params) < 1e-6


def test_a_server_rate_scales_the_mean_difference():
    whole, half = (run(spec(NoPruning(), FedAvg(lr=rate), rounds=1), population()) for rate in (1.0, 0.5))
    moved = [r.servers[1].params.flat - r.servers[0].params.flat for r in (half, whole)]
    assert distance(moved[0], 0.5 * moved[1]) < 1e-5


# -- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("onion", ONIONS + MORE_ONIONS + PERSONAL_ONIONS, ids=label)
def test_parameters_are_zero_outside_the_mask_after_every_round_and_in_every_upload(onion, monkeypatch):
    encode = Codec.encode

    def checked(self, message, **options):
        # The wire takes values on the support alone; what it takes them from must be zero elsewhere all the same.
        for part in message.parts.values():
            assert part.support is None or not part.value.flat[~part.support.flat].view(torch.int32).any()
        return encode(self, message, **options)

    monkeypatch.setattr(Codec, "encode", checked)
    ran = run(spec(*onion, optim=optim_for(strategy_of(onion)), rounds=5), population())
    for server in ran.servers:
        if server.mask is not None:
            assert not server.params.flat[~server.mask.flat].view(torch.int32).any()
            assert all(bool(server.mask[name].all()) for name in server.mask if name.endswith("bias"))
    uploads = list(itertools.chain(*ran.uploads))
    assert len(uploads) == 5 * 4
    for message, sent in uploads:
        (name,) = set(message.parts) & {"delta", "gradient"}
        part = message.parts[name]
        assert part.support == message.mask
        if message.mask is not None:
            assert not part.value.flat[~message.mask.flat].view(torch.int32).any()
            assert part.value.flat[message.mask.flat].any()
            if not isinstance(pruner_of(onion), FedDST):
                assert message.mask == sent
    pruned = [s for s in ran.servers if s.mask is not None]
    assert bool(pruned) == (not isinstance(pruner_of(onion), NoPruning))
    if pruned:
        assert pruned[-1].mask.sparsity(ran.driver.worker.prunable) > 0.15


RECORDED = [("traced", pruner) for pruner in (PRUNERS[1], PRUNERS[7], PRUNERS[-2])]


@pytest.mark.parametrize(("engine", "pruner"), [*(("eager", p) for p in PRUNERS), *RECORDED], ids=label)
def test_masks_hold_on_every_model_and_engine(engine, pruner):
    for model in ("lenet",) if engine == "traced" else ("lenet", "batchnorm_cnn"):
        # Plain SGD and a pull take different ways through a recorded step.
        for more in ((), (FedProx(mu=0.1),)):
            given = spec(pruner, FedAvg(), *more, model=model, engine=engine, rounds=3)
            ran = run(given, population(model))
            for server in ran.servers:
                if server.mask is not None:
                    assert not server.params.flat[~server.mask.flat].view(torch.int32).any()
            for message, _ in itertools.chain(*ran.uploads):
                if message.mask is not None:
                    assert not message["delta"].flat[~message.mask.flat].view(torch.int32).any()


# -- purity ----------------------------------------------------------------------------------------------------------


ASKED = ("keeps", "parts", "init_server", "init_client", "send", "begin", "end", "settle", "view")


@pytest.mark.parametrize("onion", ONIONS + MORE_ONIONS + PERSONAL_ONIONS, ids=label)
def test_hooks_write_to_no_input_and_answer_the_same_twice(onion):
    calls = []
    evaluation = EvalSpec(every=1, clients="all", batch_size=16)
    given = spec(*onion, optim=optim_for(strategy_of(onion)), rounds=3, evaluation=evaluation)
    plain = run(given, population())
    checked = replace(given, policies=tuple((name, wrap(p, twice(calls), ASKED)) for name, p in given.policies))
    ran = run(checked, population())
    assert set(calls) == set(ASKED)
    assert ran.digests == plain.digests
    assert ran.bytes == plain.bytes


def test_hooks_are_pure_also_with_statistics_that_travel():
    for pruner in PRUNERS:
        calls = []
        given = spec(pruner, FedAvg(), model="batchnorm_cnn", optim=MOMENTUM, rounds=3)
        policies = tuple((name, wrap(p, twice(calls), ASKED)) for name, p in given.policies)
        assert run(replace(given, policies=policies), population("batchnorm_cnn")).rows[-1]["round"] == 3


# -- order and packing -----------------------------------------------------------------------------------------------

PACKINGS = (
    {"chunk": 1},
    {"chunk": 1, "workers": 3, "shuffle": Key.of(1)},
    {"chunk": 2, "workers": 2, "shuffle": Key.of(2)},
    {"chunk": 99, "shuffle": Key.of(3)},
)


def assert_packing_is_invisible(given, population_):
    whole = run(given, population_)
    kept = fingerprint(sorted(whole.driver.runtime.records.items()))
    for packing in PACKINGS:
        packed = run(given, population_, Packed(given, population_, **packing))
        assert packed.digests == whole.digests, packing
        assert packed.bytes == whole.bytes
        # What clients keep, residuals of their uploads included, and what the server keeps for its downloads.
        assert fingerprint(sorted(packed.driver.runtime.records.items())) == kept
        assert fingerprint(packed.driver.downlink) == fingerprint(whole.driver.downlink)
        for a, b in zip(packed.records, whole.records, strict=True):
            timeless = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in (a.row, b.row)]
            assert repr(timeless[0]) == repr(timeless[1])
            assert a.transfers == b.transfers


@pytest.mark.parametrize(
    "onion",
    [o for o in ONIONS if len(o) == 2 or isinstance(o[0], FedDST | Random | NoPruning)]
    + [*MORE_ONIONS, *PERSONAL_ONIONS],
    ids=label,
)
def test_no_order_and_no_packing_changes_a_bit(onion):
    evaluation = EvalSpec(every=2, clients="all", batch_size=16)
    given = spec(*onion, optim=optim_for(strategy_of(onion)), rounds=3, evaluation=evaluation)
    assert_packing_is_invisible(given, population())


@pytest.mark.parametrize("personal_", NORMALISED, ids=label)
@pytest.mark.parametrize("kind", WIRES)
def test_no_order_and_no_packing_changes_a_bit_of_what_clients_keep(kind, personal_):
    evaluation = EvalSpec(every=1, clients="all", batch_size=16)
    onion = (*personal_, PRUNERS[-3], strategies.FedAvgM(), Scaffold())
    given = spec(*onion, model="batchnorm_cnn", rounds=3, evaluation=evaluation, wire=WIRES[kind])
    assert_packing_is_invisible(given, population("batchnorm_cnn"))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", WIRES)
@pytest.mark.parametrize("pruner", [NoPruning(), PRUNERS[-3], PRUNERS[-5]], ids=label)
def test_no_order_and_no_packing_changes_a_bit_on_any_model_and_wire(pruner, kind, model):
    evaluation = EvalSpec(every=2, clients="all", batch_size=6)
    given = spec(pruner, FedAvg(), model=model, rounds=3, evaluation=evaluation, wire=WIRES[kind])
    assert_packing_is_invisible(given, population(model))


def test_a_run_repeats_itself_bit_for_bit():
    for pruner in (NoPruning(), FedDST(sparsity=0.5, every=1, until=9)):
        given = spec(pruner, FedAvg(), optim=MOMENTUM, engine="auto")
        assert run(given, population()).digests == run(given, population()).digests


# -- the ledger ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
@pytest.mark.parametrize("pruner", PRUNERS, ids=label)
def test_bytes_in_the_rows_are_those_of_an_independent_count(pruner, kind, monkeypatch):
    # Counted where they arrive: equal downloads are made once, but each client reads its own.
    crossed = {"down": [], "up": []}
    original = Codec.decode

    def decode(self, payload, *, direction, **known):
        crossed[direction].append(len(payload))
        return original(self, payload, direction=direction, **known)

    monkeypatch.setattr(Codec, "decode", decode)
    ran = run(spec(pruner, FedAvg(), model="batchnorm_cnn", wire=WIRES[kind]), population("batchnorm_cnn"))
    for direction, sizes in crossed.items():
        assert len(sizes) == 4 * 4
        per_round = [sum(sizes[at : at + 4]) for at in range(0, 16, 4)]
        assert [row[f"wire/{direction}_bytes"] for row in ran.rows] == per_round
        assert [row[f"wire/total_{direction}_bytes"] for row in ran.rows] == list(itertools.accumulate(per_round))
        for record, expected in zip(ran.records, per_round, strict=True):
            entries = [t for t in record.transfers if t["direction"] == direction]
            kinds = ("value_bytes", "mask_bytes", "header_bytes")
            assert sum(entry[kind] for entry in entries for kind in kinds) == expected
            assert sum(entry["params"] for entry in entries) == record.row[f"wire/{direction}_params"]
            assert len({entry["client"] for entry in entries}) == 4
    both = [sum(crossed["down"][: 4 * n]) + sum(crossed["up"][: 4 * n]) for n in range(1, 5)]
    assert [row["wire/total_bytes"] for row in ran.rows] == both


@pytest.mark.parametrize("kind", [Random, Magnitude, FedDST])
def test_bytes_fall_with_sparsity_both_ways(kind):
    def total(pruner, direction):
        return run(spec(pruner, FedAvg(), model="lenet", rounds=3), population("lenet")).rows[-1][
            f"wire/total_{direction}_bytes"
        ]

    for direction in ("up", "down"):
        sizes = [
            total(pruner, direction) for pruner in (NoPruning(), *(kind(sparsity=s) for s in (0.3, 0.6, 0.9, 0.97)))
        ]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == 5
        # Nine tenths gone leaves about a tenth of the bytes, and the mask.
        assert sizes[3] < 0.2 * sizes[0]


def test_half_precision_halves_the_values_and_clients_train_on_what_they_decoded():
    rows = [run(spec(), population()).rows[-1], run(spec(wire=WIRES["float16"]), population()).rows[-1]]
    halves = 4 * 2 * rows[0]["wire/up_params"]  # rounds, bytes saved a value, values a round
    assert rows[0]["wire/total_up_bytes"] - rows[1]["wire/total_up_bytes"] == halves
    assert rows[0]["wire/up_params"] == rows[1]["wire/up_params"]
    down = run(spec(wire=Wire(down=HALF), rounds=1), population())
    assert down.digests != run(spec(rounds=1), population()).digests
    up = run(spec(wire=Wire(up=HALF), rounds=1), population())
    for message, _ in up.uploads[0]:
        delta = message["delta"].flat
        assert torch.equal(delta, delta.half().float())


# -- every setting is read -------------------------------------------------------------------------------------------

BASE = [
    "runtime=inline",
    "num_clients=6",
    "cohort=3",
    "rounds=4",
    "model.hidden=[12]",
    "trainer.batch_size=32",
    "partition.alpha=0.5",
    "eval.every=0",
    "trainer.engine=eager",
]
GRADUAL = ["pruner=magnitude", "pruner.schedule=cubic", "pruner.start=1", "pruner.finish=4"]
DYNAMIC = ["pruner=feddst", "pruner.every=2", "pruner.until=5"]
SPARSE = ["pruner=random"]
ADAPTIVE = ("FedAdagrad", "FedAdam", "FedYogi")
SCORED = "eval.every=1"  # where only what clients run changes
TUNED = "personal.local_fine_tuning."
DAILY = ["availability=periodic", "availability.present=1", "availability.period=4"]
STATISTICS_STAY = "personal.fedbn.keep=statistics"
# (group, field): (base settings in which the field matters, its other value)
CHANGES = {
    ("run", "seed"): ([], "seed=1"),
    ("run", "rounds"): ([], "rounds=5"),
    ("run", "num_clients"): ([], "num_clients=7"),
    ("run", "cohort"): ([], "cohort=4"),
    ("trainer", "optimizer"): ([], "trainer.optimizer=adam"),
    ("trainer", "lr"): ([], "trainer.lr=0.2"),
    ("trainer", "lr_schedule"): ([], "trainer.lr_schedule=cosine"),
    ("trainer", "lr_decay"): (["trainer.lr_schedule=step"], "trainer.lr_decay=0.5"),
    ("trainer", "lr_every"): (["trainer.lr_schedule=step", "trainer.lr_decay=0.5"], "trainer.lr_every=2"),
    ("trainer", "lr_warmup"): ([], "trainer.lr_warmup=3"),
    ("server", "lr_schedule"): ([], "server.lr_schedule=cosine"),
    ("server", "lr_decay"): (["server.lr_schedule=step"], "server.lr_decay=0.5"),
    ("server", "lr_every"): (["server.lr_schedule=step", "server.lr_decay=0.5"], "server.lr_every=2"),
    ("server", "lr_warmup"): ([], "server.lr_warmup=3"),
    ("trainer", "batch_size"): ([], "trainer.batch_size=16"),
    ("trainer", "epochs"): ([], "trainer.epochs=2"),
    ("trainer", "steps"): (["trainer.epochs=null", "trainer.steps=3"], "trainer.steps=4"),
    ("trainer", "momentum"): ([], "trainer.momentum=0.5"),
    ("trainer", "nesterov"): (["trainer.momentum=0.5"], "trainer.nesterov=true"),
    ("trainer", "weight_decay"): ([], "trainer.weight_decay=0.01"),
    ("trainer", "betas"): (["trainer=adam"], "trainer.betas=[0.5,0.999]"),
    ("trainer", "eps"): (["trainer=adam"], "trainer.eps=0.01"),
    ("trainer", "clip_norm"): ([], "trainer.clip_norm=0.1"),
    ("scope", "first_layer"): (SPARSE, "scope.first_layer=false"),
    ("scope", "last_layer"): (SPARSE, "scope.last_layer=false"),
    ("scope", "biases"): (SPARSE, "scope.biases=true"),
    ("scope", "norms"): ([*SPARSE, "model=batchnorm_cnn", "~model.hidden"], "scope.norms=true"),
    ("validation", "validation"): ([], "validation=0.3"),
    ("public", "public"): ([], "public=30"),
    ("batch_norm", "batch_norm"): (["model=batchnorm_cnn", "~model.hidden", "rounds=1"], "batch_norm=group"),
    ("stop", "metric"): (["eval.every=1", "stop.patience=1", "rounds=9"], "stop.metric=client/accuracy_p10"),
    ("stop", "targets"): ([SCORED, "stop.targets=[0.05]", "stop.at_targets=true"], "stop.targets=[0.99]"),
    ("stop", "at_targets"): ([SCORED, "stop.targets=[0.05]"], "stop.at_targets=true"),
    ("stop", "patience"): ([SCORED, "trainer.lr=1.0e-9"], "stop.patience=1"),
    ("stop", "min_delta"): ([SCORED, "stop.patience=1"], "stop.min_delta=0.9"),
    ("sampling.Fixed", "clients"): (["sampling=fixed"], "sampling.clients=[0,2,4]"),
    ("availability.Periodic", "period"): (DAILY, "availability.period=3"),
    ("availability.Periodic", "present"): (DAILY, "availability.present=2"),
    ("availability.Periodic", "groups"): (DAILY, "availability.groups=2"),
    ("availability.RandomDropout", "rate"): (["availability=dropout"], "availability.rate=0.7"),
    ("skew.Noise", "std"): (["skew=noise"], "skew.std=0.7"),
    ("skew.Rotation", "degrees"): (["skew=rotation"], "skew.degrees=90"),
    ("skew.Rotation", "groups"): (["skew=rotation"], "skew.groups=2"),
    ("skew.Affine", "shear_degrees"): (["skew=affine"], "skew.shear_degrees=40"),
    ("skew.Affine", "scale"): (["skew=affine"], "skew.scale=0.5"),
    ("skew.Affine", "contrast"): (["skew=affine"], "skew.contrast=0.1"),
    ("skew.Affine", "inversion"): (["skew=affine"], "skew.inversion=1.0"),
    ("augment.Crop", "padding"): (["augment=cifar"], "augment.crop.padding=1"),
    ("augment.Crop", "fill"): (["augment=cifar"], "augment.crop.fill=1.0"),
    ("augment.Crop", "reflect"): (["augment=cifar"], "augment.crop.reflect=true"),
    ("augment.Flip", "probability"): (["augment=cifar"], "augment.flip.probability=0.0"),
    ("augment.Cutout", "size"): (
        ["+augment.cutout._target_=fedray.data.augment.Cutout", "+augment.cutout.size=2"],
        "augment.cutout.size=4",
    ),
    ("partition.DirichletPrior", "alpha"): (["partition=dirichlet_prior"], "partition.alpha=5.0"),
    ("partition.DirichletPrior", "sizes"): (
        ["partition=dirichlet_prior"],
        "partition.sizes={_target_: fedray.data.LogNormal, sigma: 0.3}",
    ),
    ("partition.Quantity", "beta"): (["partition=quantity", "~partition.alpha"], "partition.beta=5.0"),
    ("partition.Quantity", "min_size"): (["partition=quantity", "~partition.alpha"], "partition.min_size=200"),
    ("partition.LogNormal", "sigma"): (["partition=log_normal", "~partition.alpha"], "partition.sigma=0.2"),
    ("partition.LogNormal", "min_size"): (["partition=log_normal", "~partition.alpha"], "partition.min_size=200"),
    ("partition.PowerLaw", "exponent"): (["partition=power_law", "~partition.alpha"], "partition.exponent=0.3"),
    ("partition.PowerLaw", "min_size"): (["partition=power_law", "~partition.alpha"], "partition.min_size=200"),
    ("partition.Mixed", "labels"): (["partition=mixed", "~partition.alpha"], "partition.labels.alpha=5.0"),
    ("partition.Mixed", "sizes"): (["partition=mixed", "~partition.alpha"], "partition.sizes.beta=5.0"),
    ("partition.Mixed", "min_size"): (["partition=mixed", "~partition.alpha"], "partition.min_size=100"),
    ("partition.Classes", "cut"): (["partition=extended_dirichlet", "~partition.alpha"], "partition.cut.beta=9.0"),
    ("partition.Natural", "take"): (
        ["data=synthetic", "partition=natural", "~partition.alpha", "~data.test_fraction"],
        "partition.take=largest",
    ),
    ("partition.Dirichlet", "alpha"): ([], "partition.alpha=5.0"),
    ("partition.Dirichlet", "min_size"): ([], "partition.min_size=180"),
    ("partition.Shards", "per_client"): (["partition=shards", "~partition.alpha"], "partition.per_client=3"),
    ("partition.Classes", "classes"): (["partition=classes", "~partition.alpha"], "partition.classes=5"),
    ("partition.Classes", "samples"): (["partition=classes", "~partition.alpha"], "partition.samples=20"),
    ("data.digits", "test_fraction"): ([], "data.test_fraction=0.3"),
    ("model.MLP", "hidden"): ([], "model.hidden=[13]"),
    ("model.BatchNormCNN", "width"): (["model=batchnorm_cnn", "~model.hidden", "rounds=1"], "model.width=8"),
    ("wire.Wire", "down"): (["wire=int8"], "wire.down.chain.int8.bits=5"),
    ("wire.Wire", "up"): (["wire=int8"], "wire.up.chain.int8.bits=5"),
    ("wire.Wire", "entropy"): (["wire=topk", "model.hidden=[100]"], "wire.entropy=none"),
    ("wire.Way", "chain"): (["wire=topk"], "+wire.up.chain.half._target_=fedray.wire.Float16"),
    ("wire.Way", "parts"): (["wire=topk"], "+wire.up.parts.delta.half._target_=fedray.wire.Float16"),
    ("wire.Way", "feedback"): (["wire=topk"], "wire.up.feedback=false"),
    ("wire.Way", "decay"): (["wire=topk"], "wire.up.decay=0.5"),
    ("wire.TopK", "fraction"): (["wire=topk"], "wire.up.chain.topk.fraction=0.2"),
    ("wire.TopK", "level"): (["wire=topk"], "wire.up.chain.topk.level=global"),
    ("wire.RandomK", "fraction"): (["wire=randomk"], "wire.up.chain.randomk.fraction=0.2"),
    ("wire.RandomK", "unbiased"): (["wire=randomk", "wire.up.feedback=false"], "wire.up.chain.randomk.unbiased=true"),
    ("wire.Threshold", "value"): (["wire=threshold"], "wire.up.chain.threshold.value=0.01"),
    ("wire.PowerSGD", "rank"): (["wire=powersgd"], "wire.up.chain.powersgd.rank=1"),
    ("wire.PowerSGD", "min_ratio"): (["wire=powersgd"], "wire.up.chain.powersgd.min_ratio=9.0"),
    ("wire.Uniform", "bits"): (["wire=int8"], "wire.up.chain.int8.bits=3"),
    ("wire.Uniform", "level"): (["wire=int8"], "wire.up.chain.int8.level=channel"),
    ("wire.Uniform", "rounding"): (["wire=int8"], "wire.up.chain.int8.rounding=stochastic"),
    ("wire.QSGD", "levels"): (["wire=qsgd"], "wire.up.chain.qsgd.levels=7"),
    ("wire.QSGD", "bucket"): (["wire=qsgd"], "wire.up.chain.qsgd.bucket=64"),
    ("wire.QSGD", "norm"): (["wire=qsgd"], "wire.up.chain.qsgd.norm=max"),
    ("wire.Sign", "step"): (["wire=signsgd"], "wire.up.chain.sign.step=0.01"),
    ("wire.ScaledSign", "level"): (["wire=sign"], "wire.up.chain.sign.level=channel"),
    ("wire.Zstd", "level"): (
        ["wire=int8", "+wire.up.chain.zstd._target_=fedray.wire.Zstd"],
        "+wire.up.chain.zstd.level=19",
    ),
    ("strategy.FedAvg", "lr"): ([], "strategy.lr=0.5"),
    ("strategy.FedAvg", "weight_by"): ([], "strategy.weight_by=uniform"),
    ("strategy.FedAvg", "average"): (["pruner=local_magnitude", "pruner.masks=personal"], "strategy.average=all"),
    **{
        (f"strategy.{kind}", name): ([f"strategy={kind.lower()}", *base], f"strategy.{change}")
        for kind, name, base, change in (
            *((kind, "lr", [], "lr=0.3") for kind in (*ADAPTIVE, "FedAvgM", "FedNova", "FedDyn")),
            *((kind, "weight_by", [], "weight_by=uniform") for kind in (*ADAPTIVE, "FedAvgM", "FedNova")),
            *((kind, "beta1", [], "beta1=0.5") for kind in ADAPTIVE),
            *((kind, "tau", [], "tau=0.1") for kind in ADAPTIVE),
            *((kind, "initial", [], "initial=zero") for kind in ADAPTIVE),
            *((kind, "beta2", [], "beta2=0.5") for kind in ADAPTIVE[1:]),
            *((k, "bias_correction", ["strategy.initial=zero"], "bias_correction=true") for k in ADAPTIVE[1:]),
            ("FedAvgM", "momentum", [], "momentum=0.5"),
            ("FedAvgM", "nesterov", [], "nesterov=true"),
            ("FedDyn", "alpha", [], "alpha=0.3"),
        )
    },
    ("correction.FedSAM", "rho"): (["correction=fedsam"], "correction.fedsam.rho=0.5"),
    ("correction.LabelSmoothing", "smoothing"): (
        ["correction=label_smoothing"],
        "correction.label_smoothing.smoothing=0.5",
    ),
    ("correction.FedLC", "tau"): (["correction=fedlc"], "correction.fedlc.tau=0.1"),
    ("personal.FedPer", "layers"): (["personal=fedper", "model.hidden=[12,10]"], "personal.fedper.layers=2"),
    ("personal.FedPer", "names"): (["personal=fedper"], "personal.fedper.names=['*.bias']"),
    ("personal.FedRep", "layers"): (["personal=fedrep", "model.hidden=[12,10]"], "personal.fedrep.layers=2"),
    ("personal.FedRep", "names"): (["personal=fedrep"], "personal.fedrep.names=['*.bias']"),
    ("personal.FedRep", "head_epochs"): (["personal=fedrep"], "personal.fedrep.head_epochs=2"),
    ("personal.FedBN", "keep"): (["personal=fedbn", "model=batchnorm_cnn", "~model.hidden"], STATISTICS_STAY),
    ("personal.Ditto", "pull"): (["personal=ditto", SCORED], "personal.ditto.pull=20.0"),
    ("personal.Ditto", "epochs"): (["personal=ditto", SCORED], "personal.ditto.epochs=5"),
    ("personal.Ditto", "start"): (["personal=ditto", SCORED], "personal.ditto.start=received"),
    ("personal.LocalFineTuning", "epochs"): (["personal=local_fine_tuning", SCORED], TUNED + "epochs=5"),
    ("personal.LocalFineTuning", "lr"): (["personal=local_fine_tuning", SCORED], TUNED + "lr=1.0"),
    ("strategy.FedSGD", "lr"): (["strategy=fedsgd"], "strategy.lr=0.5"),
    ("strategy.FedSGD", "weight_by"): (["strategy=fedsgd"], "strategy.weight_by=uniform"),
    ("strategy.FedSGD", "batch_size"): (["strategy=fedsgd"], "strategy.batch_size=16"),
    ("correction.FedProx", "mu"): (["correction=fedprox"], "correction.fedprox.mu=1.0"),
    ("pruner.Random", "sparsity"): (SPARSE, "pruner.sparsity=0.5"),
    ("pruner.Random", "allocation"): (SPARSE, "pruner.allocation=uniform"),
    ("pruner.Random", "budget"): (SPARSE, "pruner.budget=all_parameters"),
    ("pruner.Random", "rounding"): (SPARSE, "pruner.rounding=floor"),
    ("pruner.Magnitude", "sparsity"): (GRADUAL, "pruner.sparsity=0.5"),
    ("pruner.Magnitude", "ranking"): (GRADUAL, "pruner.ranking=global"),
    ("pruner.Magnitude", "allocation"): (GRADUAL, "pruner.allocation=erk"),
    ("pruner.Magnitude", "schedule"): (GRADUAL, "pruner.schedule=linear"),
    ("pruner.Magnitude", "start"): (GRADUAL, "pruner.start=2"),
    ("pruner.Magnitude", "finish"): (GRADUAL, "pruner.finish=3"),
    ("pruner.Magnitude", "every"): (GRADUAL, "pruner.every=2"),
    ("pruner.Magnitude", "sticky"): (GRADUAL, "pruner.sticky=false"),
    ("pruner.Magnitude", "budget"): (GRADUAL, "pruner.budget=all_parameters"),
    ("pruner.Magnitude", "rounding"): ([*GRADUAL, "pruner.sparsity=0.777"], "pruner.rounding=floor"),
    ("pruner.FedDST", "sparsity"): (DYNAMIC, "pruner.sparsity=0.5"),
    ("pruner.FedDST", "allocation"): (DYNAMIC, "pruner.allocation=uniform"),
    ("pruner.FedDST", "initial"): (DYNAMIC, "pruner.initial=random"),
    ("pruner.FedDST", "every"): (DYNAMIC, "pruner.every=3"),
    ("pruner.FedDST", "until"): (DYNAMIC, "pruner.until=4"),
    ("pruner.FedDST", "ratio"): (DYNAMIC, "pruner.ratio=0.1"),
    ("pruner.FedDST", "ratio_decay"): (DYNAMIC, "pruner.ratio_decay=constant"),
    ("pruner.FedDST", "gradient_batch_size"): (DYNAMIC, "pruner.gradient_batch_size=3"),
    ("pruner.FedDST", "regrow_dropped"): (DYNAMIC, "pruner.regrow_dropped=false"),
    ("pruner.FedDST", "budget"): (DYNAMIC, "pruner.budget=all_parameters"),
    ("pruner.FedDST", "rounding"): ([*DYNAMIC, "pruner.sparsity=0.777"], "pruner.rounding=floor"),
}


def assembled(overrides):
    register()
    groups = [o for o in overrides if "." not in o.split("=")[0] and not o.startswith("~")]
    rest = [o for o in overrides if o not in groups]
    gone = [o[1:] for o in rest if o.startswith("~")]
    # What a group that was replaced does not have is left out of the base.
    kept = [o for o in rest if not o.startswith("~") and o.split("=")[0] not in gone]
    with initialize_config_dir(conf_folder(), version_base="1.3"):
        return assemble(compose("config", overrides=groups + kept))


def results(overrides):
    made = assembled(overrides)
    ran = run(made.spec, made.population)
    return ran.digests, ran.bytes, [record.accuracies for record in ran.records]


@pytest.fixture(scope="module")
def outcome():
    """Results by settings, since many changes share a base."""
    found = {}

    def get(*overrides):
        if overrides not in found:
            found[overrides] = results(list(overrides))
        return found[overrides]

    return get


@pytest.mark.parametrize(("group", "name"), CHANGES)
def test_two_runs_that_differ_in_one_setting_differ_in_result(group, name, outcome):
    base, change = CHANGES[group, name]
    assert outcome(*BASE, *base) != outcome(*BASE, *base, change)


def test_every_setting_that_decides_a_result_is_in_that_table():
    named = {group: {n for g, n in CHANGES if g == group} for group, _ in CHANGES}
    fields = {f.name for f in dataclasses.fields(TrainerConfig)}
    assert named["trainer"] == fields - {"engine"}  # both engines give the same, see test_engine_laws
    assert named["scope"] == {f.name for f in dataclasses.fields(ScopeConfig)}
    for kind in (Random, Magnitude, FedDST):
        assert named[f"pruner.{kind.__name__}"] == {f.name for f in dataclasses.fields(kind)}
    kinds = {
        f"{group}.{name}": getattr(room, name)
        for group, room in (("strategy", strategies), ("correction", corrections), ("personal", personal))
        for name in room.__all__
    }
    rooms = (("partition", partition), ("skew", skew), ("augment", augment))
    rooms += (("sampling", sampling), ("availability", sampling))
    for (group, room), (name, kind) in ((pair, item) for pair in rooms for item in vars(pair[1]).items()):
        decided = dataclasses.is_dataclass(kind) and kind.__module__.startswith(room.__name__) and name != "Augment"
        reaches = group not in ("sampling", "availability") or f"{group}.{name}" in named
        if decided and reaches:
            kinds[f"{group}.{name}"] = kind
    assert named["stop"] == {f.name for f in dataclasses.fields(StopConfig)}
    assert named["server"] == {f.name for f in dataclasses.fields(ServerConfig)}
    for name, kind in kinds.items():
        assert named.get(name, set()) == {f.name for f in dataclasses.fields(kind)}, name
    stages = [getattr(wire, name) for name in wire.__all__ if name not in ("Chain", "Delta")]
    stages = [one for one in stages if isinstance(one, type) and hasattr(one, "changes_only")]
    for kind in (*stages, Way, Wire):
        assert named.get(f"wire.{kind.__name__}", set()) == {f.name for f in dataclasses.fields(kind)}
    groups = {name for name, hint in get_type_hints(Config).items() if hint not in (int, str)}
    # Where a run takes place and what is written of it decides nothing; a new group must be named here or above.
    assert groups - {g.split(".")[0] for g in named} <= {"eval", "runtime", "tracker", "checkpoint", "device", "link"}


def test_the_partition_and_the_data_split_follow_the_seed():
    one, two, again = (assembled([*BASE, f"seed={seed}"]).population for seed in (0, 1, 0))
    assert one.rows.tolist() == again.rows.tolist()
    assert one.rows.tolist() != two.rows.tolist()
    assert one.test_y.tolist() == two.test_y.tolist()


def test_settings_of_evaluation_decide_what_is_evaluated_and_nothing_else(outcome):
    rows = {}
    for setting in ("eval.every=1", "eval.every=2", "eval.clients=all", "eval.clients=2", "eval.batch_size=7"):
        made = assembled([*BASE, "eval.every=1", setting])
        ran = run(made.spec, made.population)
        assert (ran.digests, ran.bytes) == outcome(*BASE)[:2]
        rows[setting] = ran
    every = rows["eval.every=1"].rows
    assert all("test/accuracy" in row for row in every)
    assert ["test/accuracy" in row for row in rows["eval.every=2"].rows] == [False, True, False, True]
    asked = {s: [sum("test/accuracy" in c for c in record.clients) for record in rows[s].records] for s in rows}
    assert asked["eval.every=1"] == [3] * 4
    assert asked["eval.clients=all"] == [6] * 4
    assert asked["eval.clients=2"] == [2] * 4
    small = rows["eval.batch_size=7"].rows
    for a, b in zip(every, small, strict=True):
        assert a["test/accuracy"] == b["test/accuracy"]
        assert a["test/loss"] == pytest.approx(b["test/loss"], rel=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES + OPTIMISING, ids=label)
def test_a_strategy_learns(strategy):
    evaluation = EvalSpec(every=1, clients="cohort", batch_size=20)
    given = spec(NoPruning(), strategy, rounds=25, cohort=EVERYONE, epochs=1, lr=0.3, evaluation=evaluation)
    rows = run(given, population()).rows
    assert rows[-1]["test/loss"] < 0.7 * rows[0]["test/loss"]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
