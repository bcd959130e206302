"""fedray beside a plain PyTorch loop, measured side by side in one run, as ratios.

    scripts/bench --data FOLDER                 every part; FOLDER holds MNIST in hub layout
    scripts/bench --data FOLDER --only 2nn      one part: 2nn, cnn, thousand, wire, driver, startup, memory

The loop is what a researcher writes by hand: one process, one thread, an nn.Module, autograd, SGD by one foreach
call, batches by slicing a permuted tensor, a weighted mean of the clients. fedray runs with two actors on two CPUs.
Evaluation is off on both sides. Runs alternate; the ratio of each pair is taken, its median and quartiles printed.
A figure is worth reading only if nothing else ran meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMON = ["eval.every=0", "tracker.progress=none", "tracker.wandb.mode=disabled", "runtime.num_cpus=2"]
CASES = {
    "2nn": {"name": "mnist_2nn", "clients": 100, "cohort": 10, "rounds": 40, "model": "mlp"},
    "cnn": {"name": "mnist_cnn", "clients": 100, "cohort": 10, "rounds": 6, "model": "cnn"},
    "thousand": {"name": "mnist_2nn", "clients": 1000, "cohort": 100, "rounds": 30, "model": "mlp"},
}
REQUIRED = {"2nn": 0.80, "cnn": 0.65, "thousand": 0.85}
AIM = {"2nn": 0.60, "cnn": 0.55, "thousand": 0.65}


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled")}


# -- the loop --------------------------------------------------------------------------------------------------------


def plain_loop(case: dict, data: str, rounds: int) -> dict:
    """The loop, in this process. Returns seconds per round after the first, and start-up."""
    started = time.perf_counter()
    import numpy as np
    import torch
    from torch import nn

    from fedray.data import hub

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dataset = hub(name="mnist", path=data)
    pixels = torch.from_numpy(np.array(dataset.train_x)).float().div_(255).sub_(0.1307).div_(0.3081)
    labels = torch.from_numpy(np.array(dataset.train_y))
    if case["model"] == "mlp":
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
        )
    else:
        model = nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10),
        )  # fmt: skip
    params = list(model.parameters())
    owners = torch.randperm(60_000).view(case["clients"], -1)
    loss_of = nn.CrossEntropyLoss()
    weights = [p.detach().clone() for p in params]
    marks = [time.perf_counter()]
    for _ in range(rounds):
        cohort = torch.randperm(case["clients"])[: case["cohort"]]
        total = [torch.zeros_like(w) for w in weights]
        for client in cohort.tolist():
            with torch.no_grad():
                torch._foreach_copy_(params, weights)
            rows = owners[client][torch.randperm(owners.shape[1])]
            x, y = pixels[rows], labels[rows]
            for start in range(0, len(rows), 20):
                loss = loss_of(model(x[start : start + 20]), y[start : start + 20])
                grads = torch.autograd.grad(loss, params)
                with torch.no_grad():
                    torch._foreach_add_(params, grads, alpha=-0.1)
            with torch.no_grad():
                torch._foreach_add_(total, params, alpha=1 / len(cohort))
        weights = total
        marks.append(time.perf_counter())
    return {"round_s": (marks[-1] - marks[1]) / (rounds - 1), "startup_s": marks[0] - started}


def run_loop(case: dict, data: str) -> dict:
    command = [sys.executable, __file__, "--loop", json.dumps(case), "--data", data]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment(), cwd=ROOT)
    return json.loads(answer.stdout.splitlines()[-1])


# -- fedray ----------------------------------------------------------------------------------------------------------


def run_fedray(overrides: list[str], data: str) -> dict:
    """One run as a user starts it. Seconds per round after the first, by the wall clock, and start-up."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fedray", *overrides, *COMMON, f"data.path={data}", f"hydra.run.dir={folder}"]
        started = time.time()
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
        rows = [json.loads(line) for line in (Path(folder) / "rounds.jsonl").read_text().splitlines()]
        total = rows[-1]["time/total_s"] - rows[0]["time/total_s"]
        wall = time.time() - started
    return {
        "round_s": total / (len(rows) - 1),
        "startup_s": wall - rows[-1]["time/total_s"],
        "driver_cpu_s": statistics.median(row["time/driver_cpu_s"] for row in rows[1:]),
        "rows": rows,
    }


def overrides_of(case: dict) -> list[str]:
    return [
        f"+experiment={case['name']}",
        f"num_clients={case['clients']}",
        f"cohort={case['cohort']}",
        f"rounds={case['rounds']}",
    ]


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def compare(name: str, data: str, pairs: int) -> str:
    case = CASES[name]
    ratios, ours, theirs, start_ups = [], [], [], []
    for pair in range(pairs):
        first_loop = pair % 2 == 0
        loop = run_loop(case, data) if first_loop else None
        fedray = run_fedray(overrides_of(case), data)
        loop = loop or run_loop(case, data)
        ratios.append(fedray["round_s"] / loop["round_s"])
        ours.append(fedray["round_s"])
        theirs.append(loop["round_s"])
        start_ups.append((loop["startup_s"], fedray["startup_s"]))
        print(f"  {name} pair {pair + 1}: loop {loop['round_s']:.4f} s, fedray {fedray['round_s']:.4f} s", flush=True)
    loop_start, fedray_start = (statistics.median(values) for values in zip(*start_ups, strict=True))
    return (
        f"| {name} | {quartiles(theirs)} | {quartiles(ours)} | **{quartiles(ratios)}** | {REQUIRED[name]:.2f} | "
        f"{AIM[name]:.2f} | {loop_start:.1f} | {fedray_start:.1f} |"
    )


WIRES = {
    "float32": ["wire=float32"],
    "float16": ["wire=float16"],
    "int8": ["wire=int8"],
    "float32 under masks of 50 % that every client changes every round": [
        "pruner=feddst",
        "pruner.sparsity=0.5",
        "pruner.every=1",
        "pruner.until=200",
        "pruner.ratio=0.5",
    ],
    "topk": ["wire=topk"],
    "sign": ["wire=sign"],
    "stc": ["wire=stc"],
    "powersgd": ["wire=powersgd"],
}
LIMITS = {"topk": 0.20, "sign": None, "stc": None, "powersgd": None}


def wire(data: str, pairs: int) -> str:
    """Encoding plus decoding, both ends and both directions, as a share of the round, in one process."""
    lines = [
        "| wire, mnist_cnn | coding s/round | round s | share, median (quartiles) | limit |",
        "|---|---|---|---|---|",
    ]
    for name, overrides in WIRES.items():
        rows = []
        for _ in range(pairs):
            case = [*overrides_of({**CASES["cnn"], "rounds": 4}), "runtime=inline", *overrides]
            rows += run_fedray(case, data)["rows"][1:]
        shares = [row["time/wire_s"] / row["time/round_s"] for row in rows]
        coding, whole = (statistics.median(row[f"time/{kind}_s"] for row in rows) for kind in ("wire", "round"))
        limit = LIMITS.get(name, 0.10)
        lines.append(f"| {name} | {coding:.3f} | {whole:.3f} | **{quartiles(shares)}** | {limit or '-'} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def driver_cost(data: str) -> str:
    """The driver's own CPU time with 100 clients a round that train zero steps."""
    case = {**CASES["thousand"], "rounds": 30}
    answer = run_fedray([*overrides_of(case), "trainer.epochs=null", "trainer.steps=0"], data)
    spent_ms = 1e3 * answer["driver_cpu_s"]
    return f"driver CPU in a 100-client round, 2NN, float32 wire, zero steps: {spent_ms:.1f} ms (limit 50)"


def startup(data: str) -> str:
    """Seconds from `ray.init` returning to the first finished round, with 1,000 logical clients."""
    overrides = [*overrides_of({**CASES["thousand"], "rounds": 3}), *COMMON[:3], f"data.path={data}"]
    code = (
        "import os, sys, time, threading, tempfile, pathlib, ray\n"
        "ray.init(num_cpus=2, log_to_driver=False, logging_level='ERROR')\n"
        "t = time.perf_counter()\n"
        "import fedray\n"
        "folder = pathlib.Path(tempfile.mkdtemp()) / 'run'\n"
        "def watch():\n"
        "    rows = folder / 'rounds.jsonl'\n"
        "    while not (rows.is_file() and rows.stat().st_size):\n"
        "        time.sleep(0.02)\n"
        "    print('first', time.perf_counter() - t, flush=True)\n"
        "w = threading.Thread(target=watch, daemon=True); w.start()\n"
        f"fedray.run({overrides!r}, folder=folder)\n"
        "w.join()\n"
    )
    values = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT)
        found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("first")]
        if not found:
            raise SystemExit(done.stderr[-2000:])
        values.append(float(found[0]))
    return f"first round of 1,000 logical clients after ray.init returned: {quartiles(values)} s (limit 10)"


def memory(data: str) -> str:
    """Resident memory of driver and actors over 1,000 rounds of 100 clients that train zero steps."""
    with tempfile.TemporaryDirectory() as folder:
        case = {**CASES["thousand"], "rounds": 1000}
        command = [
            sys.executable, "-m", "fedray", *overrides_of(case), "trainer.epochs=null", "trainer.steps=0", *COMMON,
            f"data.path={data}", f"hydra.run.dir={folder}",
        ]  # fmt: skip
        samples: list[tuple[int, float]] = []
        process = subprocess.Popen(
            command, env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        rows = Path(folder) / "rounds.jsonl"
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(2):
                if rows.is_file():
                    samples.append((len(rows.read_text().splitlines()), private_megabytes()))

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        stop.set()
        watcher.join()
        if code:
            raise SystemExit(f"the memory run ended with {code}")
    at = {mark: next((mb for done, mb in samples if done >= mark), None) for mark in (100, 300, 500, 700, 900)}
    return "private memory of driver and client actors (MB) at round: " + ", ".join(
        f"{mark}: {value:.0f}" for mark, value in at.items() if value is not None
    )


def private_megabytes() -> float:
    """Private memory of this user's fedray actor processes; what they share through the object store is left out."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "cmdline").read_bytes().replace(b"\0", b" ")
            if b"ray::DriverActor" in name or b"ray::ClientActor" in name:
                for line in (process / "smaps_rollup").read_text().splitlines():
                    if line.startswith("Private_"):
                        total += int(line.split()[1])
        except OSError:
            continue
    return total / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of MNIST in hub layout")
    parser.add_argument("--only", default="2nn,cnn,thousand,wire,driver,startup,memory")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    options = parser.parse_args()
    data = str(Path(options.data).resolve())
    if options.loop:
        sys.path.insert(0, str(ROOT))
        case = json.loads(options.loop)
        print(json.dumps(plain_loop(case, data, case["rounds"])))
        return
    others = {"driver": driver_cost, "startup": startup, "memory": memory, "wire": partial(wire, pairs=options.pairs)}
    rounds, lines = [], []
    for name in options.only.split(","):
        if name in CASES:
            rounds.append(compare(name, data, options.pairs))
        elif name in others:
            lines.append(others[name](data))
        else:
            raise SystemExit(f"--only {name} is no part; choose of {', '.join([*CASES, *others])}")
    if rounds:
        print(
            "\n| case | loop s/round | fedray s/round | ratio, median (quartiles) "
            "| required | aim | loop start s | fedray start s |"
        )
        print("|---|---|---|---|---|---|---|---|")
        print("\n".join(rounds))
    print("\n" + "\n\n".join(lines))


if __name__ == "__main__":
    main()
