"""Laws of how runs end: interrupted, killed, refused, one after the other."""

from __future__ import annotations

import json
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

import fedray
from fedray.track.store import read_manifest, read_rows

pytestmark = pytest.mark.ray

QUICK = [
    "data=digits", "model.hidden=[16]", "num_clients=8", "cohort=4", "trainer.batch_size=10",
    "tracker.progress=plain", "tracker.wandb.mode=disabled", "runtime.num_cpus=2",
]  # fmt: skip


@pytest.fixture
def session() -> Iterator[str]:
    """A folder for Ray's files with a path short enough for sockets."""
    folder = tempfile.mkdtemp(prefix="fr")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(tmp_path: Path, session: str, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedray", *QUICK, f"runtime.temp_dir={session}", *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)


def wait_for_rows(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "rounds.jsonl").is_file() and len(read_rows(folder)) >= count:
            return
        time.sleep(0.1)
    out, err = process.communicate(timeout=5) if process.poll() is not None else ("", "")
    raise AssertionError(f"no {count} rows in {folder}: {out} {err}")


def ours(session: str) -> list[str]:
    """Command lines of living processes of the Ray session in this folder, and of actors below them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environment = (process / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if session in line or session in environment:
            found.append(line)
    return found


def test_ctrl_c_ends_a_run_cleanly(tmp_path: Path, session: str) -> None:
    folder = tmp_path / "run"
    process = start(tmp_path, session, "rounds=100000", f"hydra.run.dir={folder}")
    wait_for_rows(folder, 5, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert f"finished rounds are in {folder}" in err
    assert read_manifest(folder)["status"] == "interrupted"
    rows = read_rows(folder)
    assert [row["round"] for row in rows] == list(range(1, len(rows) + 1))
    deadline = time.monotonic() + 20
    while ours(session) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not ours(session)


def test_kill_9_of_the_driver_loses_no_finished_round(tmp_path: Path, session: str) -> None:
    folder = tmp_path / "run"
    process = start(tmp_path, session, "rounds=100000", f"hydra.run.dir={folder}")
    wait_for_rows(folder, 5, process)
    driver = int(re.findall(r"driver process (\d+)", (folder / "log.txt").read_text())[0])
    seen_before = len(read_rows(folder))
    os.kill(driver, signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "fedray: the driver's process died" in err
    assert "Traceback" not in err
    rows = read_rows(folder)
    # Every line that the terminal showed is on disk, and none is torn.
    shown = [line for line in out.splitlines() if line.strip().split("/")[0].strip().isdigit()]
    assert len(rows) >= max(seen_before, len(shown))
    assert [row["round"] for row in rows] == list(range(1, len(rows) + 1))
    # And it goes on from its last checkpoint as if nothing had happened.
    last = len(rows) + 3
    command = [sys.executable, "-m", "fedray", "resume", str(folder), f"rounds={last}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    straight = fedray.run(
        [*QUICK[:5], "tracker.progress=none", "tracker.wandb.mode=disabled", "runtime=inline", f"rounds={last}"],
        folder=tmp_path / "straight",
    )
    assert [row["digest"] for row in read_rows(folder)] == [row["digest"] for row in straight.rows]


def test_a_sweep_uses_one_cluster_and_leaves_one_folder_a_cell(tmp_path: Path, session: str) -> None:
    process = start(
        tmp_path,
        session,
        "-m",
        "rounds=2",
        "seed=0,1",
        "pruner=random",
        "pruner.sparsity=0.5",
        f"hydra.sweep.dir={tmp_path}/sweep",
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    runs = sorted(path.parent for path in (tmp_path / "sweep").glob("*/rounds.jsonl"))
    assert len(runs) == 2
    assert all(read_manifest(run)["status"] == "finished" for run in runs)
    assert len(list(Path(session).glob("session_2*"))) == 1
    assert read_rows(runs[0])[-1]["digest"] != read_rows(runs[1])[-1]["digest"]


def test_an_existing_cluster_is_joined_and_survives(tmp_path: Path, session: str) -> None:
    """A second process joins by runtime.address, with code of its own beside --config-dir; the cluster goes on."""
    import ray

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "loud.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedray.round import Policy\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Loud(Policy):\n"
        "    pass\n"
    )
    context = ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _temp_dir=session
    )
    try:
        address = context.address_info["gcs_address"]
        overrides = [q for q in QUICK if not q.startswith("runtime.num_cpus")]
        command = [
            sys.executable, "-m", "fedray", "--config-dir", str(mine), *overrides, "rounds=2",
            f"runtime.address={address}", "+correction.loud._target_=loud.Loud", f"hydra.run.dir={tmp_path}/run",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert len(read_rows(tmp_path / "run")) == 2
        assert ray.cluster_resources()["CPU"] == 2.0
        deadline = time.monotonic() + 15
        while ray.available_resources().get("CPU") != 2.0 and time.monotonic() < deadline:
            time.sleep(0.3)
        assert ray.available_resources()["CPU"] == 2.0
    finally:
        ray.shutdown()


def test_an_address_without_a_cluster_is_one_sentence_with_the_token_remedy(tmp_path: Path, session: str) -> None:
    process = start(tmp_path, session, "runtime.address=127.0.0.1:1", "runtime.num_cpus=null")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(err.strip().splitlines()) == 1
    assert "runtime.address is '127.0.0.1:1'" in err
    assert "RAY_AUTH_MODE=token" in err
    assert "RAY_AUTH_MODE=disabled" in err


def test_a_cluster_that_wants_a_token_is_one_sentence_with_the_remedy(tmp_path: Path, session: str) -> None:
    head = (
        "import ray, sys, time\n"
        f"c = ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir={session!r})\n"
        "print(c.address_info['gcs_address'], flush=True)\n"
        "sys.stdin.read()\n"
    )
    secret = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
    with subprocess.Popen(
        [sys.executable, "-c", head],
        env=secret,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as cluster:
        assert cluster.stdout is not None
        address = next(line.strip() for line in cluster.stdout if re.fullmatch(r"[\d.]+:\d+", line.strip()))
        process = start(tmp_path, session, f"runtime.address={address}", "runtime.num_cpus=null")
        _, err = process.communicate(timeout=90)
        assert cluster.stdin is not None
        cluster.stdin.close()
    assert process.returncode == 2, err
    assert "RAY_AUTH_MODE=token" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_wandb_shows_the_rows_of_rounds_jsonl(tmp_path: Path, session: str) -> None:
    folder = tmp_path / "run"
    process = start(tmp_path, session, "rounds=3", "tracker.wandb.mode=offline", f"hydra.run.dir={folder}")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    inspected = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    history = [json.loads(line) for line in inspected.stdout.splitlines()]
    rows = [record["history"]["item"] for record in history if record["type"] == "history"]
    written = read_rows(folder)
    assert len(rows) == 3
    for shown, row in zip(rows, written, strict=True):
        assert {name: shown.get(name) for name in row} == row
