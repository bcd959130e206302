"""However many actors a node has, they share one copy of the data."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

import fedray

pytestmark = pytest.mark.ray
ACTORS = 8
SOURCE = '''
"""Images of noise: `megabytes` of them."""

import numpy as np

from fedray.data import Dataset


def noise(*, megabytes: int) -> Dataset:
    random = np.random.default_rng(0)
    train, test = (random.integers(0, 256, (n, 1, 100, 100), dtype=np.uint8) for n in (100 * megabytes, 100))
    labels = np.arange(100 * megabytes) % 10
    return Dataset.of(name="noise", train_x=train, train_y=labels, test_x=test, test_y=labels[:100], scale=1 / 255)
'''
COMMON = [
    "partition=iid",
    "model.hidden=[4]",
    f"num_clients={ACTORS}",
    f"cohort={ACTORS}",
    "runtime.clients_per_actor=1",
    "trainer.epochs=null",
    "trainer.steps=3",
    "eval.batch_size=100",
    "checkpoint.every=0",
    "tracker.progress=none",
    "tracker.wandb.mode=disabled",
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    temp_dir = tempfile.mkdtemp(prefix="fr")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _temp_dir=temp_dir)
    yield temp_dir
    ray.shutdown()
    shutil.rmtree(temp_dir, ignore_errors=True)


def actor_processes(temp_dir: str) -> list[int]:
    """Process ids of the actors of the cluster that lives in `temp_dir`: their names are those of their classes, and
    their parent is its raylet."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if not (folder / "cmdline").read_bytes().startswith((b"ray::ClientActor", b"ray::DriverActor")):
                continue
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if temp_dir.encode() in Path(f"/proc/{parent}/cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue  # it has just ended
    return found


def footprint(pid: int) -> dict[str, int]:
    """Bytes of a process that are its own (Private), and its share of everything (Pss)."""
    sizes = {"Private": 0, "Pss": 0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("Private_Clean", "Private_Dirty"):
            sizes["Private"] += int(rest.split()[0]) * 1024
        if name == "Pss":
            sizes["Pss"] += int(rest.split()[0]) * 1024
    return sizes


def peaks(temp_dir: str, overrides: list[str], folder: Path, config_dir: Path) -> tuple[int, int]:
    """Highest sums over driver and clients while a run trains: of private bytes, and of shares of everything."""
    private = share = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal private, share
        while not done.is_set():
            try:
                found = [footprint(pid) for pid in actor_processes(temp_dir)]
            except OSError:
                found = []  # one has just ended
            if len(found) == ACTORS + 1:
                private = max(private, sum(one["Private"] for one in found))
                share = max(share, sum(one["Pss"] for one in found))
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        fedray.run([*COMMON, *overrides], folder=folder, config_dir=config_dir)
    finally:
        done.set()
        watcher.join()
    assert private > 0, "the actors were never seen together"
    return private, share


def check_one_copy(small: tuple[int, int], large: tuple[int, int], data_bytes: int) -> None:
    private, share = (large[at] - small[at] for at in (0, 1))
    assert private < 0.5 * data_bytes, f"{ACTORS + 1} processes hold {private / data_bytes:.2f} copies of their own"
    assert share < 1.5 * data_bytes, f"together they hold {share / data_bytes:.2f} copies"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "noise_source.py").write_text(SOURCE)
    (folder / "data").mkdir()
    (folder / "data" / "noise.yaml").write_text("_target_: noise_source.noise\nmegabytes: 1\n")
    return folder


def test_eight_actors_hold_one_copy_of_the_data(cluster: str, sources: Path, tmp_path: Path) -> None:
    rounds = ["rounds=20", "data=noise"]
    small = peaks(cluster, rounds, tmp_path / "small", sources)
    large = peaks(cluster, [*rounds, "data.megabytes=120"], tmp_path / "large", sources)
    check_one_copy(small, large, 119 * 1_000_000)


@pytest.mark.full
@pytest.mark.data
def test_eight_actors_hold_one_copy_of_cifar10(
    cluster: str, sources: Path, tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = ["rounds=40", "eval.every=10"]
    small = peaks(cluster, [*rounds, "data=noise"], tmp_path / "small", sources)
    large = peaks(
        cluster, [*rounds, "data=cifar10", f"data.path={data_folder / 'cifar10'}"], tmp_path / "large", sources
    )
    check_one_copy(small, large, 60_000 * 3 * 32 * 32)
