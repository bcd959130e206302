"""Any pruner goes with corrections, lossy wires, personal evaluation and every way to run: a sample of all of it."""

from __future__ import annotations

import itertools
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from hydra import compose, initialize_config_dir

import fedray
from fedray.config import assemble, conf_folder, register
from fedray.errors import ConfigError
from fedray.track.store import read_transfers

CELL = [
    "+experiment=zoo_smoke",
    "rounds=3",
    "num_clients=4",
    "cohort=3",
    "model.width=4",
    "tracker.progress=none",
    "tracker.wandb.mode=disabled",
]
PRUNERS = sorted(path.stem for path in (Path(conf_folder()) / "pruner").glob("*.yaml"))
SHORT = {
    **{name: ["pruner.every=1", "pruner.until=9"] for name in ("feddst", "rigl", "set", "fedtiny")},
    "prunefl": ["pruner.every=1", "pruner.until=9", "pruner.initial_rounds=3", "pruner.initial_every=1"],
}
COMPANIONS = {
    "fedprox": ["correction=fedprox"],
    "topk with feedback": ["wire=topk"],
    "int8": ["wire=int8"],
    "personal evaluation": ["personal=local_fine_tuning", "eval.clients=all"],
}
RUNTIMES = {
    "inline": ["runtime=inline"],
    "one actor a client": ["runtime=ray", "runtime.clients_per_actor=1"],
    "packed": ["runtime=ray", "runtime.clients_per_actor=3"],
}
# Company of which some pruners cannot be.
STRICT = {
    "fedper": ["personal=fedper"],
    "stc": ["wire=stc"],
    "fedsgd": ["strategy=fedsgd", "trainer.epochs=1"],
    "fedsam": ["correction=fedsam"],
    "fednova": ["strategy=fednova"],
    "regression": ["data=regression", "partition=iid", "~partition.alpha", "model=mlp", "+model.hidden=[9]"],
}
UNITS = ("fedrolex", "fjord", "heterofl", "hybrid", "structured")
GATED = ("lotteryfl", "subfedavg", "subfedavg_hybrid")
# What cannot go together, and what the sentence says.
REFUSED = {
    **{
        (pruner, "fedper"): "pruner cuts whole units, and personal.fedper keeps fc.bias at the clients"
        for pruner in UNITS
    },
    **{(pruner, "fedper"): f"pruner {pruner} looks at the model before they are in their place" for pruner in GATED},
    **{(pruner, "stc"): "pruner sends each client a message of its own" for pruner in (*UNITS[:3], *GATED)},
    **{
        (pruner, "fedsgd"): f"pruner is {pruner}; it needs a strategy that sends part 'delta'"
        for pruner in ("feddst", "local_magnitude", *UNITS[:3], *GATED)
    },
    ("fjord", "fedsam"): "each step of pruner fjord trains another part of them",
    ("lotteryfl", "fednova"): "pruner lotteryfl sets clients back to the initial weights without one",
    **{(pruner, "regression"): f"pruner is {pruner}; it asks for an accuracy" for pruner in GATED},
    ("fjord", "regression"): "pruner.distils is True and the data's objective is regression",
    ("grasp", "regression"): "pruner.per_class is 25; the objective of these data is regression",
    ("heterofl", "regression"): "pruner is heterofl and the data's objective is regression",
}

PAIRS = list(itertools.product(COMPANIONS, RUNTIMES))
# Three for each pruner, and in the quick tier a few of them: inline, literal and packed.
DEALT = [
    (pruner, *PAIRS[at])
    for number, pruner in enumerate(PRUNERS)
    for at in np.random.default_rng(number).permutation(len(PAIRS))[:3]
]
SAMPLE = [DEALT[at] for at in np.random.default_rng(0).permutation(len(DEALT))]
QUICK = [
    one
    for runtime, count in zip(RUNTIMES, (14, 1, 1), strict=True)
    for one in [one for one in SAMPLE if one[2] == runtime][:count]
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    temp_dir = tempfile.mkdtemp(prefix="fr")  # short enough for sockets
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _temp_dir=temp_dir)
    yield
    ray.shutdown()
    shutil.rmtree(temp_dir, ignore_errors=True)


def check(pruner: str, companion: str, runtime: str, folder: Path) -> None:
    wanted = [*CELL, f"pruner={pruner}", *SHORT.get(pruner, []), *COMPANIONS[companion]]
    inline = fedray.run([*wanted, "runtime=inline"], folder=folder / "inline")
    assert len(inline.rows) == 3
    assert all(0.0 <= row["client/accuracy_mean"] <= 1.0 for row in inline.rows)
    plain = [option for option in wanted if option not in COMPANIONS[companion]]
    without = fedray.run([*plain, "runtime=inline"], folder=folder / "without")
    told = ("digest", "client/accuracy_mean", "wire/total_bytes")
    # The companion does something beside this pruner.
    assert [[row[name] for name in told] for row in inline.rows] != [
        [row[name] for name in told] for row in without.rows
    ]
    if runtime != "inline":
        other = fedray.run([*wanted, *RUNTIMES[runtime]], folder=folder / "ray")
        assert [row["digest"] for row in other.rows] == [row["digest"] for row in inline.rows]
        assert read_transfers(other.folder) == read_transfers(inline.folder)


def named(one: tuple[str, str, str]) -> str:
    return ", ".join(one)


@pytest.mark.parametrize("one", [one for one in QUICK if one[2] == "inline"], ids=named)
def test_a_pruner_goes_with_what_it_is_given(one: tuple[str, str, str], tmp_path: Path) -> None:
    check(*one, tmp_path)


@pytest.mark.ray
@pytest.mark.parametrize("one", [one for one in QUICK if one[2] != "inline"], ids=named)
def test_a_pruner_runs_on_ray_as_inline(cluster: None, one: tuple[str, str, str], tmp_path: Path) -> None:
    check(*one, tmp_path)


@pytest.mark.full
@pytest.mark.ray
@pytest.mark.parametrize("one", [one for one in SAMPLE if one not in QUICK], ids=named)
def test_any_pruner_goes_with_any_company(cluster: None, one: tuple[str, str, str], tmp_path: Path) -> None:
    check(*one, tmp_path)


def composed(pruner: str, company: str) -> None:
    """Everything that is done before a run starts."""
    register()
    cell = [word for word in CELL if company != "regression" or not word.startswith("model.width")]
    gone = ["~model.width"] if company == "regression" else []
    with initialize_config_dir(conf_folder(), version_base="1.3"):
        assemble(compose("config", overrides=[*cell, *gone, f"pruner={pruner}", *STRICT[company]]))


@pytest.mark.parametrize(("pruner", "company"), REFUSED, ids=lambda word: word)
def test_what_cannot_go_together_is_refused_before_anything_starts(pruner: str, company: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(REFUSED[pruner, company])):
        composed(pruner, company)


@pytest.mark.full
@pytest.mark.parametrize("company", STRICT)
def test_nothing_else_is_refused_in_that_company(company: str) -> None:
    for pruner in PRUNERS:
        if (pruner, company) not in REFUSED:
            composed(pruner, company)


def test_the_sample_has_every_pruner_and_every_pair_of_company_and_runtime() -> None:
    assert len(SAMPLE) >= 60
    assert len(QUICK) >= 15
    assert {pruner for pruner, _, _ in SAMPLE} == set(PRUNERS)
    assert {(companion, runtime) for _, companion, runtime in SAMPLE} == set(itertools.product(COMPANIONS, RUNTIMES))
