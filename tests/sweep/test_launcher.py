"""Laws of sweeps on a cluster: a failure is one row, nothing is run twice, every run has the bits of a single one."""

from __future__ import annotations

import html
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sweeping import TINY, begin, cells, digests, runs, statuses, sweep, wait_until

import fedray
from fedray.track.store import read_manifest, read_rows

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

PRUNED = ["pruner=feddst", "pruner.every=1", "pruner.until=3", "checkpoint.every=1"]
BAD = """
import os
import signal
from dataclasses import dataclass

from fedray.round import Policy


@dataclass(frozen=True, kw_only=True)
class Bad(Policy):
    mode: str
    at: int = 2

    def end(self, fit, message, memory, ctx):
        if ctx.round >= self.at and self.mode == "raise":
            raise ValueError("no luck")
        if ctx.round >= self.at and self.mode == "exit":
            os._exit(1)
        if ctx.round >= self.at and self.mode == "memory":
            kept = [bytearray(10**8) for _ in range(10**4)]
            raise AssertionError(len(kept))
        return fit, message, memory

    def settle(self, server, sums, memory, ctx):
        if ctx.round >= self.at and self.mode == "exit_driver":
            os._exit(1)
        if ctx.round >= self.at and self.mode == "kill_driver":
            os.kill(os.getpid(), signal.SIGKILL)
        return server, sums, memory
"""


@pytest.fixture
def session() -> Iterator[str]:
    """A folder for Ray's files with a path short enough for sockets."""
    folder = tempfile.mkdtemp(prefix="fr")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def bad(tmp_path: Path) -> tuple[str, ...]:
    """Options of a command that has the correction `bad` beside it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "bad.py").write_text(BAD)
    return ("--config-dir", str(tmp_path / "mine"))


def bad_modes(*modes: str) -> list[str]:
    return ["+correction.bad._target_=bad.Bad", f"+correction.bad.mode={','.join(modes)}"]


def straight(folder: Path, *overrides: str) -> list[str]:
    """Digests of a single run without Ray."""
    quiet = ["tracker.progress=none", "tracker.wandb.mode=disabled", "runtime=inline"]
    tiny = [one for one in TINY if not one.startswith(("tracker", "runtime"))]
    run = fedray.run([*tiny, *quiet, *overrides], folder=folder)
    return [row["digest"] for row in run.rows]


def drivers(folder: Path) -> dict[str, list[int]]:
    """Process ids of the drivers that each run had."""
    found = {}
    for name, run in runs(folder).items():
        found[name] = [int(pid) for pid in re.findall(r"driver process (\d+)", (run / "log.txt").read_text())]
    return found


def test_cells_run_once_with_the_bits_of_single_runs_and_a_repeated_command_starts_nothing(
    tmp_path: Path, session: str
) -> None:
    folder = tmp_path / "sweep"
    command = [*PRUNED, "pruner.sparsity=0.5,0.8", "seed=0,1", f"hydra.sweep.dir={folder}"]
    code, out, err = sweep(tmp_path, session, *command)
    assert code == 0, err
    assert set(statuses(folder).values()) == {"finished"}
    assert sorted(name.rpartition("-")[0] for name in runs(folder)) == [
        "sparsity-0.5_seed-0", "sparsity-0.5_seed-1", "sparsity-0.8_seed-0", "sparsity-0.8_seed-1",
    ]  # fmt: skip
    for run in runs(folder).values():
        manifest = read_manifest(run)
        assert run.name.endswith(manifest["run_id"][:8])
        config = manifest["config"]
        expected = straight(
            tmp_path / "straight" / run.name,
            *PRUNED,
            f"seed={config['seed']}",
            f"pruner.sparsity={config['pruner']['sparsity']}",
        )
        assert [row["digest"] for row in read_rows(run)] == expected
    assert [(row["status"], row["error"], row["tries"]) for row in cells(folder)] == [("done", None, 1)] * 4
    # Two runs at a time on two CPUs, on leased processes: two drivers for four runs.
    assert len({pid for pids in drivers(folder).values() for pid in pids}) == 2

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "sweep.json"}
    code, out, err = sweep(tmp_path, session, *command)
    assert code == 0, err
    assert "4 cells finished before" in out
    assert "starting Ray" not in out
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "sweep.json"}
    assert {path: at for path, at in after.items() if path.name not in ("sweep", "multirun.yaml")} == {
        path: at for path, at in before.items() if path.name not in ("sweep", "multirun.yaml")
    }

    # A longer sweep lengthens its runs and adds the new ones.
    code, out, err = sweep(tmp_path, session, *command, "rounds=5", "seed=0,2", "hydra.launcher.lease=false")
    assert code == 0, err
    rounds = {name.rpartition("-")[0]: len(read_rows(run)) for name, run in runs(folder).items()}
    assert rounds == {
        "sparsity-0.5_seed-0": 5, "sparsity-0.5_seed-1": 3, "sparsity-0.5_seed-2": 5,
        "sparsity-0.8_seed-0": 5, "sparsity-0.8_seed-1": 3, "sparsity-0.8_seed-2": 5,
    }  # fmt: skip
    (one,) = [run for name, run in runs(folder).items() if name.startswith("sparsity-0.5_seed-0")]
    longer = straight(tmp_path / "longer", *PRUNED, "seed=0", "pruner.sparsity=0.5", "rounds=5")
    assert [row["digest"] for row in read_rows(one)] == longer
    pids = [pids[-1] for name, pids in drivers(folder).items() if "seed-1" not in name]
    assert len(set(pids)) == len(pids) == 4  # without leases every run has a process of its own


@pytest.mark.parametrize(
    ("modes", "seeds"),
    [
        (["raise", "exit", "memory", "fine"], [0]),
        pytest.param(["raise", "exit", "exit_driver", "kill_driver", "memory", "fine"], [0, 1], marks=pytest.mark.full),
    ],
)
def test_every_way_to_fail_is_one_row_and_the_others_finish(
    modes: list[str], seeds: list[int], tmp_path: Path, session: str, bad: tuple[str, ...]
) -> None:
    folder = tmp_path / "sweep"
    command = [*bad_modes(*modes), "runtime.memory_gb=1", "checkpoint.every=1", f"hydra.sweep.dir={folder}"]
    command += [f"seed={','.join(map(str, seeds))}", "hydra.launcher.max_parallel=2"]
    code, out, err = sweep(tmp_path, session, *command, options=bad)
    assert code == 1, err
    assert "Traceback" not in err
    by_mode = {}
    for run in runs(folder).values():
        manifest = read_manifest(run)
        by_mode.setdefault(manifest["config"]["correction"]["bad"]["mode"], []).append((run, manifest))
    assert {mode: len(found) for mode, found in by_mode.items()} == dict.fromkeys(modes, len(seeds))
    assert [manifest["status"] for _, manifest in by_mode["fine"]] == ["finished"] * len(seeds)
    said = {
        "raise": "no luck",
        "exit": "lost its actor 3 times",
        "exit_driver": "the driver's process died",
        "kill_driver": "the driver's process died",
        "memory": "runtime.memory_gb gives each process of a run 1.0 GB",
    }
    said = {mode: sentence for mode, sentence in said.items() if mode in modes}
    for mode, sentence in said.items():
        for run, manifest in by_mode[mode]:
            assert manifest["status"] == "failed", mode
            assert sentence in manifest["error"], mode
            assert sentence in (run / "log.txt").read_text(), mode
            (line,) = [line for line in err.splitlines() if f"({run})" in line]
            assert sentence in line
            assert f"mode={mode}" in line
            # The round before is there; where the driver itself died it was still open, for its evaluation.
            assert len(read_rows(run)) == (0 if "driver" in mode else 1), mode
    assert "ValueError: no luck" in (by_mode["raise"][0][0] / "log.txt").read_text()
    assert "Traceback" in (by_mode["raise"][0][0] / "log.txt").read_text()
    assert (
        err.strip()
        .splitlines()[-1]
        .startswith(f"fedray: {len(said) * len(seeds)} of {len(modes) * len(seeds)} runs failed")
    )
    rows = {row["folder"]: row for row in cells(folder)}
    assert {row["status"] for row in rows.values()} == {"done", "failed"}
    assert all(row["error"] == read_manifest(folder / name).get("error") for name, row in rows.items())
    # The process of a failed run has no other run.
    seen = drivers(folder)
    for mode in said:
        for run, _ in by_mode[mode]:
            (pid,) = seen[run.name]
            later = [name for name, pids in seen.items() if pid in pids and name != run.name]
            assert all(read_manifest(folder / name)["status"] == "finished" for name in later)

    # The table and the page name every one of them with its reason.
    table = reported("table", folder)
    reported("report", folder, "--out", tmp_path / "page.html")
    page = html.unescape((tmp_path / "page.html").read_text())
    for mode, sentence in said.items():
        for run, _ in by_mode[mode]:
            assert run.name in table, mode
            assert run.name in page, mode
        assert sentence in table, mode
        assert sentence in page, mode

    # Mended, the same command repeats what failed and nothing else.
    (tmp_path / "mine" / "bad.py").write_text(BAD.replace("ctx.round >= self.at", "False"))
    code, out, err = sweep(tmp_path, session, *command, options=bad)
    assert code == 0, err
    assert f"{len(seeds)} cell{'s' if len(seeds) > 1 else ''} finished before" in out
    assert set(statuses(folder).values()) == {"finished"}
    digest = {tuple(read_digests(run)) for found in by_mode.values() for run, _ in found}
    assert len(digest) == len(seeds)


def reported(command: str, folder: Path, *options: str | Path) -> str:
    """What a command about a folder prints; it must succeed."""
    words = [sys.executable, "-m", "fedray", command, str(folder), *map(str, options)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_digests(run: Path) -> list[str]:
    return [row["digest"] for row in read_rows(run)]


@pytest.mark.full
def test_a_run_that_fails_is_tried_again_as_often_as_it_was_asked_for(tmp_path: Path, session: str) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "bad.py").write_text(
        BAD.replace('raise ValueError("no luck")', f"open({str(tmp_path / 'mark')!r}, 'x').close()\n            1 / 0")
    )
    code, out, err = sweep(
        tmp_path, session, *bad_modes("raise"), "seed=0,1", "hydra.launcher.retries=2",
        "hydra.launcher.max_parallel=1", f"hydra.sweep.dir={tmp_path}/sweep", options=("--config-dir", str(mine)),
    )  # fmt: skip
    # The first try divides by zero, the second finds the mark: FileExistsError; so all fail after three.
    assert code == 1, err
    assert [row["tries"] for row in cells(tmp_path / "sweep")] == [3, 3]
    assert "is tried again" in out
    assert "FileExistsError" in err


def test_a_sweep_that_was_killed_half_way_is_finished_with_the_same_bits(tmp_path: Path, session: str) -> None:
    folder = tmp_path / "sweep"
    command = [*PRUNED, "pruner.until=40", "seed=0,1,2,3", "rounds=40", f"hydra.sweep.dir={folder}"]
    process = begin(tmp_path, session, *command)
    wait_until(lambda: "finished" in statuses(folder).values(), process)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert "finished" in statuses(folder).values()
    assert set(statuses(folder).values()) != {"finished"} or len(statuses(folder)) < 4
    code, _, err = sweep(tmp_path, session, *command)
    assert code == 0, err
    assert list(statuses(folder).values()) == ["finished"] * 4
    for run in runs(folder).values():
        seed = read_manifest(run)["seed"]
        alone = straight(tmp_path / f"alone{seed}", *PRUNED, "pruner.until=40", "rounds=40", f"seed={seed}")
        assert read_digests(run) == alone


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_an_interrupted_sweep_says_how_to_go_on_and_goes_on(
    tmp_path: Path, session: str, number: signal.Signals
) -> None:
    folder = tmp_path / "sweep"
    command = ["seed=0,1,2", "rounds=100000", "checkpoint.every=5", f"hydra.sweep.dir={folder}"]
    process = begin(tmp_path, session, *command)
    wait_until(lambda: sum(len(read_rows(run)) >= 8 for run in runs(folder).values()) == 2, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted; 0 of 3 runs are done" in err
    assert "the same command goes on" in err
    assert set(statuses(folder).values()) == {"interrupted"}
    assert sorted(row["status"] for row in cells(folder)) == ["interrupted", "interrupted", "waiting"]
    wrote = {name: len(read_rows(run)) for name, run in runs(folder).items()}
    last = max(wrote.values()) + 2
    code, _, err = sweep(tmp_path, session, *command, f"rounds={last}")
    assert code == 0, err
    assert {len(read_rows(run)) for run in runs(folder).values()} == {last}
    assert all(read_manifest(folder / name)["resumed_after_round"] >= 5 for name in wrote)
    (first,) = [run for run in runs(folder).values() if read_manifest(run)["seed"] == 0]
    assert read_digests(first) == straight(tmp_path / "alone", f"rounds={last}", "seed=0")


@pytest.mark.full
def test_cells_without_ray_of_their_own_run_whole_in_one_process(tmp_path: Path, session: str) -> None:
    folder = tmp_path / "sweep"
    code, _, err = sweep(
        tmp_path, session, "runtime=inline", *PRUNED, "seed=0,1,2", "pruner.sparsity=0.5,2", f"hydra.sweep.dir={folder}"
    )
    assert code == 1, err
    assert err.count("pruner.sparsity is 2") == 3
    assert sorted(statuses(folder).values()) == ["finished"] * 3
    assert sorted(row["status"] for row in cells(folder)) == ["done"] * 3 + ["failed"] * 3
    for run in runs(folder).values():
        seed = read_manifest(run)["seed"]
        assert read_digests(run) == straight(tmp_path / f"alone{seed}", *PRUNED, "pruner.sparsity=0.5", f"seed={seed}")


@pytest.mark.full
def test_force_runs_what_is_done_again(tmp_path: Path, session: str) -> None:
    folder = tmp_path / "sweep"
    command = ["runtime=inline", "seed=0,1", "rounds=1", f"hydra.sweep.dir={folder}"]
    assert sweep(tmp_path, session, *command)[0] == 0
    before, bits = {name: read_manifest(run)["started"] for name, run in runs(folder).items()}, digests(folder)
    time.sleep(1.1)  # times in manifests are whole seconds
    code, _, err = sweep(tmp_path, session, *command, "hydra.launcher.force=true")
    assert code == 0, err
    assert all(read_manifest(run)["started"] > before[name] for name, run in runs(folder).items())
    assert digests(folder) == bits


@pytest.mark.full
def test_two_launchers_on_one_folder_run_every_cell_once(tmp_path: Path, session: str) -> None:
    folder = tmp_path / "sweep"
    command = ["seed=range(0,10)", "rounds=20", f"hydra.sweep.dir={folder}"]
    other = tempfile.mkdtemp(prefix="fr")
    try:
        both = [begin(tmp_path, one, *command) for one in (session, other)]
        for process in both:
            _, err = process.communicate(timeout=600)
            assert process.returncode == 0, err
    finally:
        shutil.rmtree(other, ignore_errors=True)
    seen = drivers(folder)
    assert len(seen) == 10
    assert all(len(pids) == 1 for pids in seen.values())
    assert list(statuses(folder).values()) == ["finished"] * 10
    assert [row["status"] for row in cells(folder)] == ["done"] * 10


@pytest.mark.full
def test_two_sweeps_on_one_cluster_of_two_nodes_end_and_use_both_nodes(tmp_path: Path, session: str) -> None:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "temp_dir": session}
    )
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        common = ["rounds=60", "trainer.epochs=2", f"runtime.address={cluster.address}", "runtime.num_cpus=null"]
        both = [
            begin(tmp_path, session, *common, f"seed={seeds}", f"hydra.sweep.dir={tmp_path}/{name}")
            for name, seeds in (("one", "0,1,2,3"), ("two", "4,5,6,7"))
        ]
        nodes: dict[str, set[int]] = {"DriverActor": set(), "ClientActor": set()}
        deadline = time.monotonic() + 900
        while any(process.poll() is None for process in both) and time.monotonic() < deadline:
            for kind in nodes:
                nodes[kind] |= raylets_of(kind, session)
            time.sleep(0.5)
        for process in both:
            _, err = process.communicate(timeout=10)
            assert process.returncode == 0, err
        assert {name: len(found) for name, found in nodes.items()} == {"DriverActor": 2, "ClientActor": 2}
        assert list(statuses(tmp_path / "one").values()) == ["finished"] * 4
        assert list(statuses(tmp_path / "two").values()) == ["finished"] * 4
        deadline = time.monotonic() + 60
        while ray.available_resources().get("CPU") != 2.0 and time.monotonic() < deadline:
            time.sleep(0.5)
        assert ray.available_resources()["CPU"] == 2.0
    finally:
        ray.shutdown()
        cluster.shutdown()


def raylets_of(kind: str, session: str) -> set[int]:
    """Process ids of the raylets, one a node, that have actors of this class now."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if not (process / "cmdline").read_bytes().startswith(f"ray::{kind}".encode()):
                continue
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if session.encode() in Path(f"/proc/{parent}/cmdline").read_bytes():
                found.add(parent)
        except OSError:
            continue  # it has just ended
    return found


@pytest.mark.full
def test_the_launcher_leaves_no_process_behind(tmp_path: Path, session: str) -> None:
    process = begin(tmp_path, session, "seed=0,1", f"hydra.sweep.dir={tmp_path}/sweep")
    process.communicate(timeout=600)
    deadline = time.monotonic() + 20
    while (left := of_session(session)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []


def of_session(session: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environment = (process / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if int(process.name) != os.getpid() and (session in line or session in environment):
            found.append(line)
    return found
