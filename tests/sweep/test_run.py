"""Laws of which cells run, in what order of events, and what is left behind; on a stand-in for the cluster.

The stand-in runs each cell in this process, a round at a time in turns, so that everything but Ray is the real thing.
"""

from __future__ import annotations

import json
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from sweeping import cells, digests, runs, statuses

from fedray import launch
from fedray.config import conf_folder, register, resolved
from fedray.errors import ConfigError, RunError
from fedray.launch import Interrupted
from fedray.sim.drive import drive
from fedray.sim.plan import Cluster
from fedray.sim.runtime import InlineRuntime
from fedray.sweep.run import Options, Request, run_sweep
from fedray.track.store import read_manifest, read_rows

TINY = [
    "data=digits", "model.hidden=[4]", "num_clients=4", "cohort=2", "rounds=2", "checkpoint.every=1",
    "trainer.epochs=null", "trainer.steps=1", "trainer.engine=eager", "tracker.progress=none",
    "tracker.wandb.mode=disabled",
]  # fmt: skip


class Hosts:
    """Two places. before_row: called with name and row before a row is handed on; may raise."""

    rooms = 2
    started: list[str] = []  # noqa: RUF012 - of this test, see `stand_in`
    most = 0
    populations: list[Any] = []  # noqa: RUF012
    before_row: Callable[[str, dict[str, Any]], None] | None = None

    def __init__(self, *, lease: bool, note: Any, lender: Any) -> None:
        self.running: dict[str, Iterator[dict[str, Any]]] = {}
        self.wanted: dict[Any, Any] = {}

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self.running.values():
            stream.close()  # type: ignore[attr-defined]

    def place(self, plan: Any) -> str | None:
        return "place" if len(self.running) < self.rooms else None

    def put_back(self, team: str) -> None:
        pass

    def keep_only(self, plans: Any) -> None:
        pass

    def start(self, name: str, team: str, order: Any) -> None:
        spec, population = pickle.loads(order.sealed.spec), order.population[0]
        Hosts.started.append(name)
        Hosts.populations.append(population)
        self.running[name] = drive(spec, population, InlineRuntime(spec, population), order.recording)
        Hosts.most = max(Hosts.most, len(self.running))

    def poll(self, timeout_s: float) -> list[tuple[str, dict[str, Any]]]:
        found = []
        for name, stream in list(self.running.items()):
            try:
                event = next(stream)
                if "row" in event and Hosts.before_row is not None:
                    Hosts.before_row(name, event["row"])
            except RunError as error:
                stream.close()  # type: ignore[attr-defined]
                event = {"end": "failed", "error": error, "died": True, "trace": "it went"}
            if "end" in event:
                del self.running[name]
            found.append((name, event))
        return found

    def stop(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
        return []


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedray.sweep.run.join", lambda *_: None)
    monkeypatch.setattr("fedray.sim.ray_runtime.look_at_cluster", lambda: Cluster(cpus=2.0, gpus=0.0, memory_bytes=8e9))
    monkeypatch.setattr("fedray.sim.ray_runtime.store", lambda population, _: population)
    monkeypatch.setattr("fedray.sim.hosts.Hosts", Hosts)
    Hosts.started, Hosts.most, Hosts.populations, Hosts.before_row = [], 0, [], None


@pytest.fixture(scope="module")
def composed() -> Callable[..., Request]:
    register()
    found: dict[tuple[str, ...], Request] = {}

    def request(*overrides: str) -> Request:
        if overrides not in found:
            with initialize_config_dir(conf_folder(), version_base="1.3"):
                cfg = compose("config", overrides=[*TINY, *overrides])
            found[overrides] = Request(overrides=(*TINY, *overrides), config=resolved(cfg))
        return found[overrides]

    return request


def test_every_cell_runs_once_and_what_is_done_is_passed_over(tmp_path: Path, composed: Any) -> None:
    requests = [composed(f"seed={seed}") for seed in (0, 1, 2)]
    run_sweep(requests, folder=tmp_path, options=Options())
    assert [row["status"] for row in cells(tmp_path)] == ["done"] * 3
    assert sorted(Hosts.started) == sorted(row["folder"] for row in cells(tmp_path)) == sorted(runs(tmp_path))
    assert [row["id"] for row in cells(tmp_path)] == [read_manifest(tmp_path / n)["run_id"] for n in Hosts.started]
    assert cells(tmp_path)[1]["overrides"][-1] == "seed=1"
    assert read_manifest(tmp_path / Hosts.started[1])["overrides"][-1] == "seed=1"
    assert not (tmp_path / ".claims").exists()
    bits, before = digests(tmp_path), (tmp_path / "sweep.json").read_text()
    Hosts.started.clear()
    run_sweep([*requests, composed("seed=3")], folder=tmp_path, options=Options())
    assert [name.rpartition("-")[0] for name in Hosts.started] == ["seed-3"]
    assert {run_id: digests(tmp_path)[run_id] for run_id in bits} == bits
    assert json.loads(before)["cells"] == cells(tmp_path)[:3]


def test_nothing_is_loaded_and_no_cluster_is_joined_where_nothing_is_left(
    tmp_path: Path, composed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [composed("seed=0"), composed("seed=1")]
    run_sweep(requests, folder=tmp_path, options=Options())

    def never(*args: Any, **more: Any) -> None:
        raise AssertionError("there is nothing to do")

    monkeypatch.setattr("fedray.sweep.run.join", never)
    monkeypatch.setattr("fedray.config._make", never)
    monkeypatch.setattr("fedray.config.assemble", never)
    run_sweep(requests, folder=tmp_path, options=Options())


def test_a_longer_command_lengthens_runs_and_a_shorter_one_leaves_them(tmp_path: Path, composed: Any) -> None:
    run_sweep([composed("seed=0"), composed("seed=1")], folder=tmp_path, options=Options())
    run_sweep([composed("seed=0", "rounds=4")], folder=tmp_path, options=Options())
    long, short = (tmp_path / name for name in sorted(runs(tmp_path)))
    assert (len(read_rows(long)), len(read_rows(short))) == (4, 2)
    assert read_manifest(long)["resumed_after_round"] == 2
    run_sweep([composed("seed=0")], folder=tmp_path, options=Options())
    assert len(read_rows(long)) == 4


def test_cells_that_differ_in_what_an_id_leaves_out_have_folders_of_their_own(tmp_path: Path, composed: Any) -> None:
    run_sweep([composed("rounds=1"), composed("rounds=3")], folder=tmp_path, options=Options())
    assert sorted(len(read_rows(run)) for run in runs(tmp_path).values()) == [1, 3]
    assert len(digests(tmp_path)) == 1


def test_the_same_run_twice_in_a_command_is_one(tmp_path: Path, composed: Any) -> None:
    run_sweep([composed("seed=0"), composed("seed=0")], folder=tmp_path, options=Options())
    assert len(Hosts.started) == len(runs(tmp_path)) == 1


def test_as_many_run_at_once_as_fit_or_as_are_allowed(tmp_path: Path, composed: Any) -> None:
    requests = [composed(f"seed={seed}") for seed in (0, 1, 2)]
    run_sweep(requests, folder=tmp_path / "two", options=Options())
    assert Hosts.most == 2
    Hosts.most = 0
    run_sweep(requests, folder=tmp_path / "one", options=Options(max_parallel=1))
    assert Hosts.most == 1


def test_cells_that_deal_the_same_data_share_one_population(tmp_path: Path, composed: Any) -> None:
    overrides = ("pruner=none", "pruner=random", "seed=1")
    run_sweep([composed(one) for one in overrides], folder=tmp_path, options=Options())
    none, random, other = Hosts.populations
    assert none is random
    assert other is not none
    assert other.train_x is none.train_x


def test_a_failure_is_a_row_with_its_reason_and_the_others_go_on(
    tmp_path: Path, composed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str, row: dict[str, Any]) -> None:
        if name.startswith("seed-1") and row["round"] == 2:
            raise RunError("the driver's process died: of age")

    Hosts.before_row = fail
    with pytest.raises(RunError, match=r"1 of 3 runs failed, named above; .* the same command repeats what failed"):
        run_sweep([composed(f"seed={seed}") for seed in (0, 1, 2)], folder=tmp_path, options=Options())
    (bad,) = [name for name in runs(tmp_path) if name.startswith("seed-1")]
    assert f"fedray: seed=1: the driver's process died: of age ({tmp_path / bad})" in capsys.readouterr().err
    manifest = read_manifest(tmp_path / bad)
    assert (manifest["status"], manifest["error"], manifest["died"]) == (
        "failed", "the driver's process died: of age", True,
    )  # fmt: skip
    assert "it went" in (tmp_path / bad / "log.txt").read_text()
    assert sorted(statuses(tmp_path).values()) == ["failed", "finished", "finished"]
    assert [(r["status"], r["error"]) for r in cells(tmp_path) if r["folder"] == bad] == [
        ("failed", "the driver's process died: of age")
    ]
    # A process that died says nothing of the code: it goes on from its checkpoint.
    Hosts.before_row = None
    Hosts.started.clear()
    run_sweep([composed(f"seed={seed}") for seed in (0, 1, 2)], folder=tmp_path, options=Options())
    assert Hosts.started == [bad]
    manifest = read_manifest(tmp_path / bad)
    assert (manifest["status"], manifest["resumed_after_round"]) == ("finished", 2)
    assert "error" not in manifest


def test_a_run_that_fails_is_tried_as_often_as_it_was_asked_for(tmp_path: Path, composed: Any) -> None:
    tries: list[str] = []

    def fail(name: str, row: dict[str, Any]) -> None:
        if len(tries) < 2:
            tries.append(name)
            raise RunError("no luck")

    Hosts.before_row = fail
    run_sweep([composed("seed=0", "rounds=4")], folder=tmp_path, options=Options(retries=2))
    assert [(row["status"], row["tries"], row["error"]) for row in cells(tmp_path)] == [("done", 3, None)]


def test_a_run_that_failed_by_an_error_is_repeated_from_the_start(tmp_path: Path, composed: Any) -> None:
    run_sweep([composed("seed=0")], folder=tmp_path, options=Options())
    (run,) = runs(tmp_path).values()
    bits = digests(tmp_path)
    manifest = read_manifest(run)
    (run / "manifest.json").write_text(json.dumps({**manifest, "status": "failed", "error": "a bug"}))
    run_sweep([composed("seed=0")], folder=tmp_path, options=Options())
    assert read_manifest(run)["resumed_after_round"] == 0
    assert digests(tmp_path) == bits


def test_a_refused_cell_is_a_row_and_the_others_run(tmp_path: Path, composed: Any) -> None:
    wrong = composed("pruner=random", "pruner.sparsity=2")
    unknown = Request(overrides=("pruner=nosuch",), config=None, error=ConfigError("pruner=nosuch does not exist"))
    late = composed("runtime.slots=64", "seed=1")  # known to be too many only on the cluster
    with pytest.raises(RunError, match="3 of 4 runs failed"):
        run_sweep([composed("seed=0"), wrong, unknown, late], folder=tmp_path, options=Options())
    found = {row["error"]: row for row in cells(tmp_path)}
    assert [row["status"] for row in cells(tmp_path)] == ["done", "failed", "failed", "failed"]
    assert any("pruner.sparsity is 2" in str(error) for error in found)
    assert found["pruner=nosuch does not exist"]["tries"] == 0
    assert any("runtime.slots is 64; this cluster has 2 CPUs" in str(error) for error in found)
    assert len(runs(tmp_path)) == 1


@pytest.mark.parametrize("overrides", [("trainer.lr=-1",), ("pruner=random", "pruner.sparsity=2")])
def test_cells_that_are_all_refused_for_one_reason_say_it_once_and_leave_nothing(
    tmp_path: Path, composed: Any, overrides: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    requests = [composed(*overrides, f"seed={seed}") for seed in (0, 1)]
    with pytest.raises(ConfigError, match=r"^(trainer\.lr is -1|pruner\.sparsity is 2)"):
        run_sweep(requests, folder=tmp_path / "sweep", options=Options())
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "sweep").exists()


def test_cells_that_are_refused_for_several_reasons_are_each_named(
    tmp_path: Path, composed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="none of the 2 cells can run"):
        run_sweep([composed("trainer.lr=-1"), composed("cohort=9")], folder=tmp_path, options=Options())
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["lr=-1", "cohort=9"]


def test_cells_of_two_clusters_are_refused(tmp_path: Path, composed: Any) -> None:
    requests = [composed(f"runtime.num_cpus={count}") for count in (1, 2)]
    with pytest.raises(ConfigError, match=r"runtime\.num_cpus is 1, 2; the runs of a sweep share one cluster"):
        run_sweep(requests, folder=tmp_path, options=Options())


def test_force_runs_what_is_done_from_the_start(tmp_path: Path, composed: Any) -> None:
    run_sweep([composed("seed=0")], folder=tmp_path, options=Options())
    (run,) = runs(tmp_path).values()
    (run / "mine.txt").touch()
    bits = digests(tmp_path)
    run_sweep([composed("seed=0")], folder=tmp_path, options=Options(force=True))
    assert len(Hosts.started) == 2
    assert "resumed" not in read_manifest(run)
    assert digests(tmp_path) == bits


def test_force_keeps_what_another_launcher_did_after_the_command_was_given(
    tmp_path: Path, composed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hosts, "rooms", 1)
    requests = [composed(f"seed={seed}") for seed in (0, 1)]
    run_sweep(requests, folder=tmp_path, options=Options())
    first, second = Hosts.started

    def elsewhere(name: str, row: dict[str, Any]) -> None:
        manifest = tmp_path / second / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"ended": "now"}))

    Hosts.started, Hosts.before_row = [], elsewhere
    run_sweep(requests, folder=tmp_path, options=Options(force=True))
    assert Hosts.started == [first]
    assert read_manifest(tmp_path / second)["ended"] == "now"


def test_equal_runs_that_are_written_in_two_ways_are_one(tmp_path: Path, composed: Any) -> None:
    run_sweep(
        [composed("pruner=magnitude"), composed("pruner=magnitude", "pruner.sparsity=0.8")],
        folder=tmp_path, options=Options(),
    )  # fmt: skip
    assert len(Hosts.started) == len(cells(tmp_path)) == 1


def test_a_client_that_does_not_fit_on_a_gpu_fails_its_cell_alone(
    tmp_path: Path, composed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(sealed: Any, population: Any) -> tuple[int, int]:
        if b"magnitude" in sealed.spec:
            raise RuntimeError("CUDA out of memory")
        return 10**10, 10**8

    cluster = Cluster(cpus=2.0, gpus=1.0, memory_bytes=8e9)
    monkeypatch.setattr("fedray.sim.ray_runtime.look_at_cluster", lambda: cluster)
    monkeypatch.setattr("fedray.sim.ray_runtime.probe_gpu", probe)
    sealing = launch.seal
    # Planned for a GPU, and run without one.
    without = Cluster(cpus=2.0, gpus=0.0, memory_bytes=8e9)
    monkeypatch.setattr("fedray.launch.seal", lambda made, _: (sealing(made, without)[0], "cuda"))
    with pytest.raises(RunError, match="1 of 2 runs failed"):
        run_sweep([composed("pruner=magnitude"), composed("pruner=none")], folder=tmp_path, options=Options())
    assert [(row["status"], row["error"]) for row in cells(tmp_path)] == [
        ("failed", "RuntimeError: CUDA out of memory"), ("done", None),
    ]  # fmt: skip


def test_a_cell_that_another_launcher_has_is_left_to_it(tmp_path: Path, composed: Any) -> None:
    from fedray.sweep.record import Claims

    run_sweep([composed("seed=0"), composed("seed=1")], folder=tmp_path / "names", options=Options())
    name = sorted(runs(tmp_path / "names"))[0]
    Hosts.started.clear()
    with Claims(tmp_path / "sweep") as other:
        assert other.take(name) is None
        run_sweep([composed("seed=0"), composed("seed=1")], folder=tmp_path / "sweep", options=Options())
    assert len(Hosts.started) == 1
    assert name not in Hosts.started
    assert name not in [row["folder"] for row in cells(tmp_path / "sweep") if row["status"] != "waiting"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_says_how_to_go_on_and_the_same_command_does(
    tmp_path: Path, composed: Any, number: signal.Signals
) -> None:
    def interrupt(name: str, row: dict[str, Any]) -> None:
        if row["round"] == 2 and Hosts.before_row is not None:
            Hosts.before_row = None
            signal.raise_signal(number)

    Hosts.before_row = interrupt
    handler = signal.getsignal(signal.SIGTERM)  # Ray sets one where a cluster was started before in this process
    requests = [composed(f"seed={seed}", "rounds=3") for seed in (0, 1, 2)]
    with pytest.raises(Interrupted, match=r"interrupted; 0 of 3 runs are done in .* the same command goes on"):
        run_sweep(requests, folder=tmp_path, options=Options())
    assert sorted(row["status"] for row in cells(tmp_path)) == ["interrupted", "interrupted", "waiting"]
    assert set(statuses(tmp_path).values()) == {"interrupted"}
    assert not (tmp_path / ".claims").exists()
    run_sweep(requests, folder=tmp_path, options=Options())
    assert list(statuses(tmp_path).values()) == ["finished"] * 3
    assert sorted(read_manifest(run).get("resumed_after_round", -1) for run in runs(tmp_path).values())[0] == -1
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_sweep_runs_in_a_thread_as_well(tmp_path: Path, composed: Any) -> None:
    thread = threading.Thread(
        target=lambda: run_sweep([composed("seed=0"), composed("seed=1")], folder=tmp_path, options=Options())
    )
    thread.start()
    thread.join()
    assert list(statuses(tmp_path).values()) == ["finished"] * 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"retries": -1}, r"hydra\.launcher\.retries is -1"),
        ({"max_parallel": 0}, r"hydra\.launcher\.max_parallel is 0"),
    ],
)
def test_wrong_options_are_one_sentence(options: dict[str, int], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Options(**options)  # type: ignore[arg-type]


def test_seconds_are_those_of_the_run(tmp_path: Path, composed: Any) -> None:
    began = time.monotonic()
    run_sweep([composed("seed=0")], folder=tmp_path, options=Options())
    (row,) = cells(tmp_path)
    assert 0 < row["seconds"] <= time.monotonic() - began
