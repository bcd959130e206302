"""Sweeps as a user starts them, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedray.track.store import read_manifest, read_rows

TINY = [
    "data=digits", "model.hidden=[8]", "num_clients=6", "cohort=3", "trainer.batch_size=10", "rounds=3",
    "trainer.engine=eager", "tracker.progress=plain", "tracker.wandb.mode=disabled", "runtime.num_cpus=2",
]  # fmt: skip


def begin(cwd: Path, session: str, *overrides: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedray", *options, "-m", *TINY, f"runtime.temp_dir={session}", *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)


def sweep(cwd: Path, session: str, *overrides: str, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    process = begin(cwd, session, *overrides, options=options)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def runs(folder: Path) -> dict[str, Path]:
    """Run directories of a sweep by their names."""
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/manifest.json"))}


def digests(folder: Path) -> dict[str, list[str]]:
    """Digests of all rounds by run id."""
    return {read_manifest(run)["run_id"]: [row["digest"] for row in read_rows(run)] for run in runs(folder).values()}


def statuses(folder: Path) -> dict[str, str]:
    return {name: read_manifest(run)["status"] for name, run in runs(folder).items()}


def cells(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "sweep.json").read_text())["cells"]
    return found


def wait_until(good: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if good():
            return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    out, err = process.communicate(timeout=10) if process.poll() is not None else ("", "")
    raise AssertionError(f"it did not come to that: {out} {err}")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, **more}
