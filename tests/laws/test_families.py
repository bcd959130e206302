"""Every family of models trains with every pruner and wire: a sample of pairs always, all of them in the full tier."""

import math
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from laws_support import run

from fedray.config import assemble, conf_folder, register
from fedray.errors import ConfigError

SMALL = ["data._target_=family_data.images"]
IMAGES = [*SMALL, "data.size=16"]
TOKENS = ["data._target_=family_data.tokens"]
NEXT, TEXTS = [*TOKENS, "+data.classes=false"], [*TOKENS, "+data.classes=true"]
NUMBERS = ["data._target_=family_data.numbers"]
RESNET = [*IMAGES, "model=resnet8", "model.widths=[4,8,8]", "model.groups=2"]
FAMILIES = {
    "mlp": [*IMAGES, "model=mlp", "model.hidden=[9]"],
    "linear": [*IMAGES, "model=linear"],
    "linear regression": [*NUMBERS, "model=linear"],
    "mlp regression": [*NUMBERS, "model=mlp", "model.hidden=[9]"],
    "small_cnn": [*IMAGES, "model=small_cnn"],
    "lenet": [*IMAGES, "model=lenet"],
    "batchnorm_cnn": [*IMAGES, "model=batchnorm_cnn", "model.width=4"],
    "batchnorm_cnn, static": [*IMAGES, "model=batchnorm_cnn", "model.width=4", "batch_norm=static"],
    "batchnorm_cnn, local": [*IMAGES, "model=batchnorm_cnn", "model.width=4", "batch_norm=local"],
    "batchnorm_cnn, affine": [*IMAGES, "model=batchnorm_cnn", "model.width=4", "batch_norm=affine"],
    "batchnorm_cnn, group": [*IMAGES, "model=batchnorm_cnn", "model.width=4", "batch_norm=group"],
    "resnet, group": RESNET,
    "resnet, batch": [*RESNET, "model.norm=batch"],
    "char_lstm": [*NEXT, "model=char_lstm", "model.hidden=6", "model.embedding=4"],
    "gpt": [*NEXT, "model=gpt", "model.width=8", "model.heads=2", "model.layers=1"],
    "lstm_classifier": [*TEXTS, "model=lstm_classifier", "model.hidden=6", "model.embedding=4"],
    "transformer_classifier": [*TEXTS, "model=transformer_classifier", "model.width=8", "model.heads=2"],
}
LARGE = {
    "vgg11": [*SMALL, "data.size=32", "model=vgg11"],
    "resnet18": [*SMALL, "data.size=32", "model=resnet18"],
    "resnet20": [*SMALL, "data.size=32", "model=resnet20"],
    "mcmahan_cnn": [*IMAGES, "model=mcmahan_cnn"],
}
PRUNERS = {
    "none": ["pruner=none"],
    "random": ["pruner=random", "pruner.sparsity=0.6"],
    "magnitude": ["pruner=magnitude", "pruner.sparsity=0.6", "pruner.start=1", "pruner.finish=1"],
    "feddst": ["pruner=feddst", "pruner.sparsity=0.6", "pruner.every=1", "pruner.until=2"],
}
WIRES = (
    "float32", "float16", "bfloat16", "int8", "int4", "qsgd", "sign", "signsgd", "topk", "topk1", "randomk",
    "threshold", "stc", "powersgd", "topk_int8",
)  # fmt: skip
COMMON = ["partition=iid", "num_clients=4", "cohort=3", "rounds=2", "trainer.batch_size=8", "trainer.lr=0.01"]


def two_rounds(family, pruner, wire, engine):
    register()
    wanted = [*{**FAMILIES, **LARGE}[family], *PRUNERS[pruner], f"wire={wire}", *COMMON, f"trainer.engine={engine}"]
    groups = [o for o in wanted if o.count(".") == 0 and "=" in o and not o.startswith(("~", "+"))]
    with initialize_config_dir(conf_folder(), version_base="1.3"):
        made = assemble(compose("config", overrides=[*groups, *(o for o in wanted if o not in groups)]))
    return made, run(made.spec, made.population)


def refused(family, pruner, wire):
    """The rule that forbids them to go together; None where they do."""
    if wire == "powersgd" and pruner != "none":
        return "it needs whole matrices"
    if "static" in family and wire in ("int4", "stc", "topk_int8"):
        return "wire.down follows"
    return None


def check(family, pruner, wire, engine="eager"):
    rule = refused(family, pruner, wire)
    if rule is not None:
        with pytest.raises(ConfigError, match=rule):
            two_rounds(family, pruner, wire, engine)
        return
    made, ran = two_rounds(family, pruner, wire, engine)
    rows, server = ran.rows, ran.servers[-1]
    assert len(rows) == 2
    assert math.isfinite(rows[-1]["train/loss"])
    assert server.params.flat.isfinite().all()
    main = made.spec.task.metrics[0]
    assert math.isfinite(rows[-1][f"client/{main}_mean"])
    if "local" not in family and "affine" not in family:
        assert math.isfinite(rows[-1][f"test/{main}"])
    if pruner == "none":
        assert server.mask is None
    else:
        assert server.params.flat[~server.mask.flat].count_nonzero() == 0
        assert 0.5 < rows[-1]["model/sparsity"] < 0.7
    if wire != "threshold":  # with which small models may send nothing at all in a round
        assert rows[0]["digest"] != rows[1]["digest"]


# Dealt so that every pruner meets every family and every wire; families meet four wires each.
PAIRS = [
    (family, pruner, WIRES[(at + 4 * turn) % len(WIRES)])
    for at, family in enumerate(FAMILIES)
    for turn, pruner in enumerate(PRUNERS)
]


@pytest.mark.parametrize(("family", "pruner", "wire"), PAIRS)
def test_two_rounds_of_a_family_with_a_pruner_and_a_wire(family, pruner, wire):
    check(family, pruner, wire)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_with_the_engine_that_auto_chooses(family):
    check(family, "none", "float32", engine="auto")


def test_the_sample_covers_every_pair_of_pruner_with_family_and_wire():
    assert {(f, p) for f, p, _ in PAIRS} == {(f, p) for f in FAMILIES for p in PRUNERS}
    missing = {(p, w) for p in PRUNERS for w in WIRES} - {(p, w) for _, p, w in PAIRS}
    assert not missing

    groups = {
        group: {path.stem for path in (Path(conf_folder()) / group).glob("*.yaml")} for group in ("pruner", "wire")
    }
    assert groups["wire"] == set(WIRES)
    assert groups["pruner"] >= set(PRUNERS)  # of every kind one; the others are in test_combinations


@pytest.mark.full
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("family", [*FAMILIES, *LARGE])
def test_two_rounds_of_every_family_with_every_wire(family, wire):
    check(family, list(PRUNERS)[(len(family) + WIRES.index(wire)) % len(PRUNERS)], wire)
