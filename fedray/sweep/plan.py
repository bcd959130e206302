"""What a sweep would do and cost, before it does it: its cells, what is done already, and a forecast from one round."""

from __future__ import annotations

import argparse
import heapq
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedray.errors import ConfigError, FedrayError
from fedray.sweep import identity
from fedray.sweep.record import read_sweep
from fedray.track.progress import format_seconds
from fedray.track.store import MANIFEST_FILE

if TYPE_CHECKING:
    from fedray.config import Assembly
    from fedray.sweep.run import Request

START_SECONDS = 8.0
"""Until the first run of a sweep has processes: a local Ray cluster takes 5 to 10 s to start, torch 2.4 s to load."""
CELL_SECONDS = 1.0
"""What a run takes beside its rounds in processes that are lent from run to run (measured: 0.5 to 1.5 s)."""
REPEAT_BELOW_SECONDS = 2.0
"""A round that is quicker is measured twice: the first one of a process pays for what is loaded on first use."""
OUTSIDE_SHAPE = ("seed", "rounds", "name", "checkpoint", "stop", "tracker", "runtime")

What = Literal["done", "begin", "go on", "repeat", "refused"]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A cell of a plan. id: of its run; empty where the cell is refused. rounds: it will have. left: rounds to run.

    why: a few words on `what`; of a refused cell the sentence. config: resolved; None where that failed.
    """

    id: str
    label: str
    folder: Path
    rounds: int
    left: int
    what: What
    why: str
    config: dict[str, Any] | None
    choices: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What one round took in this process, on one core. seconds: per round, evaluations in their share. cpu_s: of
    them spent computing."""

    seconds: float
    cpu_s: float


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is left of a sweep. cpu_s: of all processes. wall_s: with `at_once` cells at a time on `cpus` CPUs.

    probes: by the label of the cell that was measured, with how many cells it stands for.
    """

    cpu_s: float
    wall_s: float
    at_once: int
    cpus: int
    probes: Mapping[str, tuple[Probe, int]]


# -- which cells ------------------------------------------------------------------------------------------------------


def planned(
    requests: Sequence[Request], *, folder: Path, code_folder: str | None, force: bool = False
) -> list[Planned]:
    """The cells of a command with what is left to do of each below `folder`; nothing is started or written.

    force: whether what is there is run anew. Raises ConfigError where none of them can run.
    """
    from fedray import config as config_room

    shared = config_room.Shared()
    digests: dict[str, str] = dict(read_sweep(folder).get("digests", {}))
    differences = identity.varying([request.overrides for request in requests])
    ids: list[str] = []
    errors: list[FedrayError | None] = []
    for request in requests:
        error: FedrayError | None = request.error
        found = ""
        if request.config is not None:
            try:
                found = config_room.identity(request.config, digests=digests, shared=shared, code_folder=code_folder)
            except FedrayError as refusal:
                error = refusal
            except OSError as refusal:
                error = ConfigError(f"its data or code cannot be read ({refusal})")
        ids.append(found)
        errors.append(error)
    named = [found or identity.stand_in(request.overrides) for found, request in zip(ids, requests, strict=True)]
    lengths = [0 if request.config is None else int(request.config["rounds"]) for request in requests]
    kept = identity.distinct(named, differences, lengths)  # the same run twice is one run
    cells: list[Planned] = []
    places = identity.place(folder, [named[at] for at in kept], [differences[at] for at in kept])
    for at, path in zip(kept, places, strict=True):
        request, run_id, rounds = requests[at], ids[at], lengths[at]
        config = request.config
        what, left, why = _left(path, run_id, rounds, errors[at], force)
        if what not in ("done", "refused"):
            assert config is not None
            try:
                config_room.assemble(config, code_folder=code_folder, choices=request.choices, shared=shared)
            except FedrayError as refusal:
                what, left, why = "refused", 0, str(refusal)
        cells.append(
            Planned(
                id=run_id,
                label=identity.label(differences[at]) or "the run",
                folder=path,
                rounds=rounds,
                left=left,
                what=what,
                why=why,
                config=config,
                choices=request.choices,
            )
        )
    sentences = {cell.why for cell in cells}
    if all(cell.what == "refused" for cell in cells) and len(sentences) == 1:
        raise ConfigError(sentences.pop())
    return cells


def _left(path: Path, run_id: str, rounds: int, failure: FedrayError | None, force: bool) -> tuple[What, int, str]:
    if failure is not None or not run_id:
        return "refused", 0, str(failure)
    if force:
        # Whatever is there is cleared away before the run begins.
        there = (path / MANIFEST_FILE).is_file()
        return ("repeat", rounds, "hydra.launcher.force is true") if there else ("begin", rounds, "")
    try:
        left = identity.left_to_do(path, run_id, rounds)
    except FedrayError as error:
        return "refused", 0, str(error)
    if left.what == "nothing":
        return "done", 0, ""
    return left.what, rounds - (left.resume_round or 0), left.why


# -- what it costs ----------------------------------------------------------------------------------------------------


def shape(config: Mapping[str, Any]) -> str:
    """What the cost of a round depends on: the configuration without the seed, without how long and where it runs,
    and without every fraction. Rates, sparsities and the like change what is computed, and hardly how long it takes;
    whole numbers, names and switches change both."""
    kept = {key: _without_fractions(value) for key, value in config.items() if key not in OUTSIDE_SHAPE}
    return json.dumps(kept, sort_keys=True, default=str)


def _without_fractions(value: Any) -> Any:
    if isinstance(value, float):
        return "a fraction"
    if isinstance(value, Mapping):
        return {key: _without_fractions(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_fractions(inner) for inner in value]
    return value


def probe(assembly: Assembly) -> Probe:
    """Run one round here, on one core and without Ray, and measure it. The run is not kept."""
    import torch

    from fedray.sim.drive import drive
    from fedray.sim.runtime import InlineRuntime
    from fedray.track.recording import Recording

    device = "cuda" if assembly.runtime.device != "cpu" and torch.cuda.is_available() else "cpu"
    # The pruner, the rates and the rest know the length of the whole run: only the loop ends early.
    spec = replace(assembly.spec, rounds=1, checkpoint_every=0, device=device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="fedray-probe-") as folder:
            recording = Recording(
                folder=str(Path(folder) / "run"),
                run_id=spec.run_id,
                config_yaml=assembly.config_yaml,
                config=spec.config,
                manifest=assembly.facts,
                wandb=replace(assembly.wandb, mode="disabled"),
            )
            began = time.perf_counter(), time.process_time()
            row: dict[str, Any] = {}
            for event in drive(spec, assembly.population, InlineRuntime(spec, assembly.population), recording):
                if "note" in event and not row:
                    began = time.perf_counter(), time.process_time()
                elif "row" in event:
                    ended, row = (time.perf_counter(), time.process_time()), event["row"]
                elif event.get("error") is not None:
                    raise event["error"]
    finally:
        torch.set_num_threads(threads)
    wall_s, cpu_s = ended[0] - began[0], ended[1] - began[1]
    # The one round is evaluated because it is the last one; in the run only every so many are.
    every = spec.evaluation.every
    evaluation_s = max(wall_s - row["time/round_s"], 0.0)
    share = 1.0 - evaluation_s / wall_s * (1.0 - (1.0 / every if every else 0.0))
    return Probe(seconds=wall_s * share, cpu_s=cpu_s * share)


def measure(
    cells: Sequence[Planned], *, code_folder: str | None, tell: Callable[[str], None]
) -> dict[str, tuple[Probe, str]]:
    """A probe by shape, with the label of the cell that it was taken from; of cells with something left to do."""
    from fedray import config as config_room

    shared = config_room.Shared()
    found: dict[str, tuple[Probe, str]] = {}
    for cell in cells:
        if not cell.left or cell.config is None or shape(cell.config) in found:
            continue
        tell(f"one round of {cell.label} ...")
        made = config_room.assemble(cell.config, code_folder=code_folder, choices=cell.choices, shared=shared)
        taken = probe(made)
        if taken.seconds < REPEAT_BELOW_SECONDS:
            again = probe(made)
            taken = min(taken, again, key=lambda one: one.seconds)
        found[shape(cell.config)] = (taken, cell.label)
    return found


def forecast(cells: Sequence[Planned], probes: Mapping[str, tuple[Probe, str]], *, cpus: int) -> Forecast:
    """The cost of what is left, if every round takes as long as the measured one of its shape.

    Cells are taken in order, as many at a time as the CPUs hold; one with more slots takes more of them and is that
    much quicker.
    """
    jobs: list[tuple[float, int]] = []
    total_cpu_s = 0.0
    counts: dict[str, int] = {}
    for cell in cells:
        if not cell.left or cell.config is None:
            continue
        taken, label = probes[shape(cell.config)]
        counts[label] = counts.get(label, 0) + 1
        slots = cell.config["runtime"]["slots"]
        width = 1 if slots == "auto" or cell.config["runtime"]["kind"] == "inline" else min(int(slots), cpus)
        total_cpu_s += cell.left * taken.cpu_s + CELL_SECONDS
        jobs.append((cell.left * taken.seconds / width + CELL_SECONDS, width))
    widest = max((width for _, width in jobs), default=1)
    return Forecast(
        cpu_s=total_cpu_s,
        wall_s=START_SECONDS + wall_seconds(jobs, cpus) if jobs else 0.0,
        at_once=min(max(cpus // widest, 1), max(len(jobs), 1)),
        cpus=cpus,
        probes={label: (taken, counts.get(label, 0)) for taken, label in probes.values()},
    )


def wall_seconds(jobs: Iterable[tuple[float, int]], cpus: int) -> float:
    """When the last of these jobs, (seconds, CPUs), ends if each starts as soon as enough CPUs are free."""
    now, free, running = 0.0, cpus, list[tuple[float, int]]()
    for seconds, width in jobs:
        while free < width:
            now, freed = heapq.heappop(running)
            free += freed
        heapq.heappush(running, (now + seconds, width))
        free -= width
    return max((end for end, _ in running), default=now)


def cpus_here() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# -- the command ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command's cells as they were composed. folder: of the sweep. dropped: cells that a filter took out. force:
    whether what is done is run anew."""

    requests: Sequence[Request]
    folder: Path
    dropped: int
    code_folder: str | None
    force: bool


def plan_command(
    arguments: Sequence[str],
    *,
    parser: Callable[..., argparse.ArgumentParser],
    composed: Callable[[Sequence[str], str | None], Command],
) -> None:
    """`fedray plan`: print the cells of a sweep, which are done, and what the others will cost."""
    known = parser(
        prog="fedray plan",
        description="Print the cells of a sweep, which are done already, and what the others will take.",
    )
    known.add_argument("overrides", nargs="*", help="as after python -m fedray -m: +sweep=NAME, pruner=a,b ...")
    known.add_argument("-m", "--multirun", action="store_true", help="taken and not needed: the command of the sweep")
    known.add_argument("-cd", "--config-dir", help="a folder of your own yaml and code")
    known.add_argument("--no-probe", action="store_true", help="no forecast: nothing is trained")
    options = known.parse_intermixed_args(list(arguments))
    command = composed(options.overrides, options.config_dir)
    cells = planned(command.requests, folder=command.folder, code_folder=command.code_folder, force=command.force)
    for line in cell_lines(cells, command):
        print(line, flush=True)
    if options.no_probe or not any(cell.left for cell in cells):
        return
    probes = measure(cells, code_folder=command.code_folder, tell=lambda text: print(text, flush=True))
    for line in forecast_lines(forecast(cells, probes, cpus=_cpus(cells)), cells):
        print(line, flush=True)


def _cpus(cells: Sequence[Planned]) -> int:
    """CPUs of the cluster that the sweep would run on: the one that is named or up, else what a local one has."""
    runtimes = [cell.config["runtime"] for cell in cells if cell.config is not None and cell.left]
    address, num_cpus = runtimes[0]["address"], runtimes[0]["num_cpus"]
    if address is None and num_cpus is not None:
        return int(num_cpus)
    from fedray.sim.warm import find_cluster

    found = None if address else find_cluster()
    if not address and not os.environ.get("RAY_ADDRESS") and found is None:
        return cpus_here()
    if found is not None and not os.environ.get("RAY_ADDRESS"):
        return found.cpus
    from fedray.sim import ray_runtime

    ray_runtime.connect(address, num_cpus=None, temp_dir=None, dashboard=False)
    return int(ray_runtime.look_at_cluster().cpus)


WORDS: Mapping[What, str] = {
    "done": "done",
    "begin": "to do",
    "go on": "goes on",
    "repeat": "repeats",
    "refused": "refused",
}


def cell_lines(cells: Sequence[Planned], command: Command) -> list[str]:
    """The table of cells, and how many there are of each kind."""
    lines = [f"{_count(len(cells), 'cell')} in {command.folder}" + _dropped(command.dropped), ""]
    lines.append(f"{'run':<8}  {'state':<8}  {'rounds':>9}  cell")
    for cell in cells:
        rounds = f"{cell.rounds - cell.left}/{cell.rounds}" if cell.what != "refused" else "-"
        why = f"  ({cell.why})" if cell.why and cell.what != "refused" else ""
        lines.append(
            f"{cell.id[: identity.ID_DIGITS] or '-':<8}  {WORDS[cell.what]:<8}  {rounds:>9}  {cell.label}{why}"
        )
    lines.append("")
    counts = {what: sum(cell.what == what for cell in cells) for what in WORDS}
    told = ", ".join(f"{count} {WORDS[what]}" for what, count in counts.items() if count)
    lines.append(f"{told}; {sum(cell.left for cell in cells):,} rounds left")
    lines += [f"refused: {cell.label}: {cell.why}" for cell in cells if cell.what == "refused"]
    return lines


def forecast_lines(found: Forecast, cells: Sequence[Planned]) -> list[str]:
    """The measured rounds and what follows from them."""
    lines = [
        f"{taken.seconds:.3g} s a round on one core: {label}"
        + (f", and {_count(count - 1, 'cell')} like it" * (count > 1))
        for label, (taken, count) in found.probes.items()
    ]
    stops = any(
        cell.config is not None and cell.left and (cell.config["stop"]["at_targets"] or cell.config["stop"]["patience"])
        for cell in cells
    )
    hours = f"{'at most ' if stops else ''}{found.cpu_s / 3600:.3g} CPU hours"
    place = f"on {_count(found.cpus, 'CPU')} with {_count(found.at_once, 'cell')} at once"
    return [*lines, f"forecast: {hours}, about {format_seconds(found.wall_s)} {place}"]


def _dropped(count: int) -> str:
    return f"; filters dropped {count} more" if count else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
