"""What a sweep costs beside its rounds: 24 runs on digits, 4 pruners x 3 sparsities x 2 seeds, on a local cluster.

    scripts/bench_sweep [--cpus N] [--folder FOLDER] [--only leased,fresh,repeat,killed]

leased   the sweep with processes that are lent from run to run
fresh    the same with processes of its own for every run
repeat   the leased command again, which has nothing to do
killed   the sweep, killed with -9 when half of it is done, and repeated

The overhead of a run is the time from its start to its end less the time of its rounds. The digests of all four are
compared. A figure is worth reading only if nothing else ran meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CELLS = ["pruner=magnitude,feddst,rigl,gradual", "pruner.sparsity=0.5,0.8,0.9", "seed=0,1"]
COMMON = ["+experiment=quickstart", "rounds=20", "checkpoint.every=5", "tracker.progress=none"]
PARTS = ("leased", "fresh", "repeat", "killed")


def begin(folder: Path, cpus: int, *more: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {"RAY_AUTH_MODE": "disabled", **os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", "fedray", "-m", *COMMON, *CELLS, f"runtime.num_cpus={cpus}"]
    command += [f"hydra.sweep.dir={folder}", *more]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def run(folder: Path, cpus: int, *more: str) -> float:
    """Seconds that the command took."""
    began = time.perf_counter()
    process = begin(folder, cpus, *more)
    _, err = process.communicate()
    if process.returncode:
        sys.exit(f"exit code {process.returncode}: {err}")
    return time.perf_counter() - began


def rows_of(folder: Path) -> dict[str, list[dict]]:
    """Rows of every finished run by its id."""
    found = {}
    for path in folder.glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        if manifest["status"] == "finished":
            lines = (path.parent / "rounds.jsonl").read_text().splitlines()
            found[manifest["run_id"]] = [json.loads(line) for line in lines]
    return found


def digests(folder: Path) -> dict[str, list[str]]:
    return {run_id: [row["digest"] for row in rows] for run_id, rows in rows_of(folder).items()}


def report(name: str, folder: Path, seconds: float) -> None:
    rows = rows_of(folder)
    cells = json.loads((folder / "sweep.json").read_text())["cells"]
    overheads = sorted(cell["seconds"] - sum(row["time/round_s"] for row in rows[cell["id"]]) for cell in cells)
    middle, worst = statistics.median(overheads), overheads[-1]
    rounds = statistics.median(sum(row["time/round_s"] for row in one) for one in rows.values())
    print(
        f"{name:<7} {seconds:6.1f} s in all, {len(rows)} of {len(cells)} finished; rounds of a run {rounds:.2f} s, "
        f"beside them {middle:.2f} s (median), {overheads[0]:.2f} to {worst:.2f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpus", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="where runs go; a temporary folder without")
    parser.add_argument("--only", default=",".join(PARTS))
    options = parser.parse_args()
    parts = options.only.split(",")
    with tempfile.TemporaryDirectory(prefix="fedray-sweep-") as scratch:
        root = options.folder or Path(scratch)
        done: dict[str, dict[str, list[str]]] = {}
        if "leased" in parts:
            report("leased", root / "leased", run(root / "leased", options.cpus))
            done["leased"] = digests(root / "leased")
        if "repeat" in parts:
            print(f"repeat  {run(root / 'leased', options.cpus):6.1f} s in all", flush=True)
        if "fresh" in parts:
            seconds = run(root / "fresh", options.cpus, "hydra.launcher.lease=false")
            report("fresh", root / "fresh", seconds)
            done["fresh"] = digests(root / "fresh")
        if "killed" in parts:
            process = begin(root / "killed", options.cpus)
            while len(rows_of(root / "killed")) < 12 and process.poll() is None:
                time.sleep(0.2)
            process.send_signal(signal.SIGKILL)
            process.wait()
            before = len(rows_of(root / "killed"))
            seconds = run(root / "killed", options.cpus)
            done["killed"] = digests(root / "killed")
            print(f"killed  {before} were done, the others took {seconds:6.1f} s", flush=True)
    same = len({json.dumps(found, sort_keys=True) for found in done.values()}) <= 1
    print(f"digests of {', '.join(done)}: {'the same' if same else 'DIFFERENT'}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
