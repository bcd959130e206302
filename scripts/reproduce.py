"""Tables of BENCHMARKS.md: runs every cell of one, goes on where it was cut off, prints it.

    scripts/reproduce niid_bench --data FOLDER --out outputs/niid_bench [--jobs 2] [--only iid-fedavg-0 ...]
    scripts/reproduce zoo --data FOLDER --out outputs/zoo --jobs 2

A cell is one run in a folder of its own under --out. A finished cell is not run again, one that was cut off goes on
from its last checkpoint with the bits of an uninterrupted run, so the command may be stopped and repeated at will.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
QUIET = ["runtime=inline", "tracker.progress=none", "tracker.wandb.mode=disabled"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run. row: its line in the table, which several seeds share. published: in per cent; None where nobody has."""

    name: str
    row: str
    data: str
    overrides: tuple[str, ...]
    published: float | None = None


def _niid_bench() -> list[Cell]:
    iid, skew, two = (
        ("partition=iid", "~partition.alpha", "~partition.min_size"),
        (),
        ("partition=classes", "~partition.alpha", "~partition.min_size"),
    )
    corrections = {
        "FedAvg": (),
        "FedProx": ("correction=fedprox", "correction.fedprox.mu=0.01"),
        "SCAFFOLD": ("correction=scaffold",),
        "FedNova": ("strategy=fednova",),
    }
    # The README of Flower's baseline niid_bench: best test accuracy over the rounds.
    table = [
        ("iid", "FedAvg", iid, (0, 1, 2), 99.09),
        ("dirichlet", "FedAvg", skew, (0,), 98.89),
        ("two-label", "FedAvg", two, (0,), 96.86),
        ("dirichlet", "FedProx", skew, (0,), 99.02),
        ("dirichlet", "SCAFFOLD", skew, (0,), 99.07),
        # An earlier README says 98.03 and a later one 98.8: two seeds, to see which it is.
        ("dirichlet", "FedNova", skew, (0, 1), 98.03),
    ]
    cells = [
        Cell(
            name=f"mnist-{partition}-{method.lower()}-{seed}",
            row=f"MNIST, {partition}, {method}",
            data="mnist",
            overrides=("+experiment=niid_bench", *split, *corrections[method], f"seed={seed}"),
            published=published,
        )
        for partition, method, split, seeds, published in table
        for seed in seeds
    ]
    cifar = ("+experiment=niid_bench", "data=cifar10", "augment=cifar", "seed=0")
    cells.append(
        Cell(
            name="cifar10-augmented-dirichlet-fedavg-0",
            row="CIFAR-10, dirichlet, FedAvg, cropped and flipped",
            data="cifar10",
            overrides=cifar,
            published=62.47,
        )
    )
    # What else the published code does there: pixels as they are, and crops out of the mirrored image.
    as_published = ("data.mean=[0]", "data.std=[1]", "augment.crop.reflect=true")
    cells.append(
        Cell(
            name="cifar10-mirrored-dirichlet-fedavg-0",
            row="CIFAR-10, dirichlet, FedAvg, flipped, cropped with a mirrored margin, not standardised",
            data="cifar10",
            overrides=(*cifar, *as_published),
            published=62.47,
        )
    )
    return cells


# The pruner's settings for a sparsity. Masks that move have moved for the last time at two thirds of the rounds.
ZOO: dict[str, tuple[str, ...]] = {
    "random": ("pruner=random", "pruner.sparsity={s}"),
    "magnitude": ("pruner=magnitude", "pruner.sparsity={s}", "pruner.start=10"),
    "gradual": ("pruner=gradual", "pruner.sparsity={s}"),
    "snip": ("pruner=snip", "pruner.sparsity={s}"),
    "synflow": ("pruner=synflow", "pruner.sparsity={s}"),
    "feddst": ("pruner=feddst", "pruner.sparsity={s}", "pruner.every=5", "pruner.until={until}"),
    "rigl": ("pruner=rigl", "pruner.sparsity={s}", "pruner.every=5", "pruner.until={until}"),
    "set": ("pruner=set", "pruner.sparsity={s}", "pruner.every=5", "pruner.until={until}"),
    # Its size is an outcome: the target is a bound.
    "prunefl": (
        *("pruner=prunefl", "pruner.target_sparsity={s}", "pruner.every=5", "pruner.finish={until}"),
        "pruner.until={until}",
    ),
    "fedtiny": ("pruner=fedtiny", "pruner.sparsity={s}", "pruner.every=5", "pruner.until={until}"),
    "lotteryfl": ("pruner=lotteryfl", "pruner.sparsity={s}", "strategy.weight_by=uniform"),
    # A client takes part about 12 times, so it cuts as much in one event as LotteryFL's; the method needs two epochs.
    "subfedavg": (
        *("pruner=subfedavg", "pruner.sparsity={s}", "pruner.rate=0.2", "strategy.weight_by=uniform"),
        "trainer.epochs=2",
    ),
}


def _zoo() -> list[Cell]:
    cells: list[Cell] = []

    def add(
        setting: str, method: str, sparsity: float, seeds: tuple[int, ...], *more: str, label: str | None = None
    ) -> None:
        data, until = setting.split("-")[0], 80 if setting == "cifar10" else 40
        settings = (
            [text.format(s=sparsity, until=until) for text in ZOO[method]] if method != "none" else ["pruner=none"]
        )
        row = f"{setting} | {label or method} | " + (f"{sparsity:.0%}" if method != "none" else "")
        if method == "subfedavg" and sparsity == 0.95:
            more = (*more, "trainer.lr=0.02")  # at 0.05 some client's training diverges before round 60
        for seed in seeds:
            named = (label or method).replace(", ", "-")
            name = "-".join([setting, named, *([f"{100 * sparsity:g}"] if method != "none" else []), str(seed)])
            overrides = (f"+experiment=zoo_{data}", *settings, *more, f"seed={seed}")
            cells.append(Cell(name=name, row=row, data=data, overrides=overrides))

    three, four = (0, 1, 2), ("magnitude", "feddst", "random")
    add("mnist", "none", 0.0, three)
    for method in ZOO:
        for sparsity in (0.5, 0.8, 0.9, 0.95) if method in four else (0.8, 0.95):
            add("mnist", method, sparsity, three)
    add("cifar10", "none", 0.0, (0,))
    for method in four:
        for sparsity in (0.8, 0.95):
            add("cifar10", method, sparsity, (0,))
    # What isolates: no skew, and two classes a client.
    iid, two = ("partition=iid", "~partition.alpha", "~partition.min_size"), ("partition=classes", "~partition.alpha")
    for method in ("none", "gradual"):
        add("mnist-iid", method, 0.8, three, *iid)
    for method in ("none", "lotteryfl", "subfedavg"):
        # At 0.05 with momentum FedAvg learns nothing from clients of two classes.
        add("mnist-two-classes", method, 0.8, (0,), *two, "~partition.min_size", "trainer.lr=0.01")
    # FedTiny cuts every layer by the same share; the other dynamic methods and random keep small layers denser.
    add("mnist", "fedtiny", 0.95, three, "pruner.allocation=erk", label="fedtiny, erk")
    add("mnist", "random", 0.95, three, "pruner.allocation=uniform", label="random, uniform")
    return cells


TABLES = {"niid_bench": _niid_bench, "zoo": _zoo}


def run(cell: Cell, data: Path, out: Path) -> str:
    """Run or go on with a cell; returns how it ended."""
    folder = out / cell.name
    manifest = folder / "manifest.json"
    if manifest.is_file() and json.loads(manifest.read_text())["status"] == "finished":
        return "finished before"
    saved = sorted((folder / "checkpoints").glob("round-*"))
    if saved:
        command = ["resume", str(folder), "runtime.kind=inline"]
    else:
        command = [*cell.overrides, f"data.path={data / cell.data}", "checkpoint.every=2", *QUIET]
        command.append(f"hydra.run.dir={folder}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{cell.name}.log").open("a") as log:
        done = subprocess.run([sys.executable, "-m", "fedray", *command], env=environment, stdout=log, stderr=log)
    return "finished" if done.returncode == 0 else f"failed, see {out / cell.name}.log"


def rows_of(cell: Cell, out: Path) -> list[dict[str, Any]]:
    path = out / cell.name / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def published_table(cells: list[Cell], out: Path) -> str:
    """Markdown: best, last and mean of the last ten evaluations, over the seeds that are there."""
    lines = ["| setting | published | best | last | mean of last 10 | rounds | seeds |", "| --- | " + "---: | " * 6]
    for row in dict.fromkeys(cell.row for cell in cells):
        mine = [cell for cell in cells if cell.row == row]
        found = []
        for cell in mine:
            scores = [100 * r["test/accuracy"] for r in rows_of(cell, out) if "test/accuracy" in r]
            if scores:
                found.append((max(scores), scores[-1], sum(scores[-10:]) / len(scores[-10:]), len(scores)))
        if not found:
            continue
        best, last, mean = (sum(f[i] for f in found) / len(found) for i in range(3))
        rounds = "/".join(str(f[3]) for f in found)
        lines.append(
            f"| {row} | {mine[0].published:.2f} | {best:.2f} | {last:.2f} | {mean:.2f} | {rounds} | {len(found)} |"
        )
    return "\n".join(lines)


def zoo_table(cells: list[Cell], out: Path) -> str:
    """Markdown: means over the seeds that are there, of finished runs alone, at the end of the run; the deviation of
    the accuracies beside them. Sparsity is of the server's model, or of what clients send where they have masks of
    their own."""
    lines = [
        "| setting | method | asked | reached | global model | clients' own | MB | training TFLOPs | seconds | seeds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in dict.fromkeys(cell.row for cell in cells):
        ends = []
        for cell in [cell for cell in cells if cell.row == row]:
            manifest = out / cell.name / "manifest.json"
            if manifest.is_file() and json.loads(manifest.read_text())["status"] == "finished":
                ends.append(rows_of(cell, out)[-1])
        if not ends:
            continue

        def mean(*names: str, factor: float = 1.0, ends: list[dict[str, Any]] = ends) -> list[float]:
            return [factor * next((end[name] for name in names if end.get(name)), 0.0) for end in ends]

        spread = statistics.stdev(mean("test/accuracy", factor=100)) if len(ends) > 1 else 0.0
        average = statistics.fmean
        lines.append(
            f"| {row} | {average(mean('model/sparsity', 'client/sparsity_mean')):.3f} "
            f"| {average(mean('test/accuracy', factor=100)):.2f} ± {spread:.2f} "
            f"| {average(mean('client/accuracy_mean', factor=100)):.2f} "
            f"| {average(mean('wire/total_bytes', factor=1e-6)):.1f} "
            f"| {average(mean('model/train_flops', factor=1e-12)):.2f} "
            f"| {average(mean('time/total_s')):.0f} | {len(ends)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist/ and cifar10/ in hub layout")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one core each")
    parser.add_argument("--only", nargs="*", help="names of cells, in the order in which to run them")
    options = parser.parse_args()
    cells = {cell.name: cell for cell in TABLES[options.table]()}
    chosen = [cells[name] for name in options.only] if options.only else list(cells.values())
    with ThreadPoolExecutor(options.jobs) as pool:
        for cell, how in zip(chosen, pool.map(lambda c: run(c, options.data, options.out), chosen), strict=True):
            print(f"{cell.name}: {how}", flush=True)
    table = zoo_table if options.table == "zoo" else published_table
    print(table(list(cells.values()), options.out))


if __name__ == "__main__":
    main()
