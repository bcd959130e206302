"""`fedray wandb sync`: runs rebuilt at W&B, or as offline runs, from their run directories."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fedray.errors import ConfigError, FedrayError, RunError
from fedray.report.runs import find_runs, manifest_of, sentence, shown
from fedray.track.store import read_rows
from fedray.track.wandb import FOLDER, WandbConfig, WandbTracker, destination, sent_of

ROWS_PER_SECOND = 50.0
LOG_FILE = "log.txt"
SLACK_S = 2.0
"""The log's stamps are whole seconds, and so is the time of the boot."""


class _Outage(RunError):
    """W&B cannot be reached: what comes next would fail too."""


@dataclass(frozen=True, kw_only=True)
class Sync:
    """Where runs go and how fast.

    mode: "online" or "offline". project, entity: None is what each run was told. rate: rows a second, over all runs.
    cut_off: whether runs that say they are running are dead where nobody can see.
    """

    mode: str = "online"
    project: str | None = None
    entity: str | None = None
    rate: float = ROWS_PER_SECOND
    cut_off: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.rate < math.inf):
            raise ConfigError(f"--rate is {self.rate}; it must be a number of rows a second above 0, as in --rate 50")

    def config(self, manifest: Mapping[str, Any]) -> WandbConfig:
        """The run's own settings, towards this destination. Raises ConfigError."""
        known = {one.name for one in dataclasses.fields(WandbConfig)}
        own = manifest["config"].get("tracker", {}).get("wandb", {})
        chosen = {name: value for name, value in own.items() if name in known}
        chosen |= {"mode": self.mode, "tags": tuple(own.get("tags", ()))}
        chosen |= {name: value for name in ("project", "entity") if (value := getattr(self, name)) is not None}
        return WandbConfig(**chosen)


@dataclass
class Pace:
    """Lets `rate` calls a second through, evenly; a pause is not made up for."""

    rate: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    free_at: float = field(default=-math.inf, init=False)

    def __call__(self) -> None:
        now = self.clock()
        if now < self.free_at:
            self.sleep(self.free_at - now)
        self.free_at = max(now, self.free_at) + 1 / self.rate


def sync_command(arguments: Sequence[str], *, parser: type[argparse.ArgumentParser]) -> None:
    """Send runs to W&B from their run directories; print a line for each."""
    command = parser(
        prog="fedray wandb sync",
        description="Rebuild runs at W&B from their run directories; what W&B has already is not sent again.",
    )
    command.add_argument("runs", type=Path, nargs="+", help="folders of runs, or folders that hold some, as of a sweep")
    command.add_argument(
        "--mode", choices=("online", "offline"), default="online", help="offline writes RUN/wandb/offline-run-*"
    )
    command.add_argument("--project", help="the W&B project; without, what each run was told")
    command.add_argument("--entity", help="the W&B user or team; without, what each run was told, or your default")
    command.add_argument(
        "--rate", type=float, default=ROWS_PER_SECOND, help=f"rows a second at most; {ROWS_PER_SECOND:g} without"
    )
    command.add_argument(
        "--cut-off", action="store_true", help="send runs too that say they are running on another machine"
    )
    options = vars(command.parse_args(arguments))
    folders = options.pop("runs")
    # The command says what happens; what wandb would add is of its own workings.
    os.environ.setdefault("WANDB_SILENT", "true")
    runs = list(dict.fromkeys(run for folder in folders for run in find_runs(folder)))
    sync(runs, folders, Sync(**options), say=print)


def sync(runs: Sequence[Path], under: Sequence[Path], settings: Sync, say: Callable[[str], None]) -> None:
    """Send every run and say what became of it; `under` are the folders that were asked for.

    Raises ConfigError if W&B refuses the account, RunError at the end if some runs could not be sent.
    """
    pace, failed, sent = Pace(settings.rate), 0, 0
    for number, run in enumerate(runs):
        name = shown(run, under)
        try:
            line, rows = sync_run(run, settings, pace)
            sent += rows
        except _Outage as error:
            left = len(runs) - number
            raise RunError(
                f"{name}: {error}; {left} of {len(runs)} {'runs are' if len(runs) > 1 else 'run is'} not sent: repeat "
                "the command when W&B can be reached, it goes on from here"
            ) from error
        except (FedrayError, OSError) as error:
            if _is_of_the_account(error):
                raise
            failed += 1
            line = f"left out: {sentence(error)}"
        say(f"{name}: {line}")
    if len(runs) > 1:
        say(f"{len(runs)} runs, {sent:,} rows sent")
    if failed:
        raise RunError(f"{failed} of {len(runs)} runs could not be sent; the lines above say why")


def sync_run(run: Path, settings: Sync, pace: Callable[[], None]) -> tuple[str, int]:
    """Send what W&B does not have of one run; what happened and how many rows were sent. Raises FedrayError."""
    manifest = manifest_of(run)
    if not isinstance(manifest.get("run_id"), str):
        return "skipped: its manifest.json names no run_id; restore it from a copy", 0
    status = manifest["status"]
    if status == "running":
        place = _where(run)
        if place is None or place.alive is None:
            if not settings.cut_off:
                host = "somewhere" if place is None else f"on {place.host}"
                return f"skipped: it says it is running {host}; add --cut-off if it is dead", 0
        elif place.alive:
            return f"skipped: it is running, process {place.process} here; sync it when it has ended", 0
    rows = read_rows(run)
    if not rows:
        return "skipped: it has no finished round", 0
    config, last = settings.config(manifest), rows[-1]
    there = sent_of(run).get(destination(config))
    gone = settings.mode == "offline" and not any((run / FOLDER).glob(f"offline-run-*-{manifest['run_id']}"))
    if there == {"round": last["round"], "digest": last.get("digest"), "status": status} and not gone:
        holder = "its offline run" if settings.mode == "offline" else "W&B"
        return f"nothing new, {holder} has all {last['round']} rounds", 0
    tracker = WandbTracker(config, run_dir=run, run_id=manifest["run_id"], manifest=manifest)
    count = tracker.catch_up(pace)
    tracker.finish(last, status, manifest.get("error"))
    if tracker.failure is not None:
        raise (_Outage if tracker.outage else RunError)(tracker.failure)
    ended = "" if status == "finished" else f", marked {'cut off' if status == 'running' else status}"
    first = rows[len(rows) - count]["round"] if count else None
    which = "no new row" if first is None else f"rounds {first} to {last['round']}, {count} rows"
    place_ = "offline run" if settings.mode == "offline" else config.project
    return f"{which}, to {place_}{ended}", count


def _is_of_the_account(error: BaseException) -> bool:
    """Whether every run will be refused alike."""
    return isinstance(error, ConfigError) and str(error).startswith("tracker.wandb.")


# -- is it alive? ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a run's driver was started. alive: None on another machine."""

    process: int
    host: str
    alive: bool | None


def _where(run: Path) -> _Place | None:
    """What the last start in log.txt says; None if there is none."""
    try:
        text = (run / LOG_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    starts = re.findall(r"^(\S+) run \w+ [^\n]*; driver process (\d+) on (\S+)$", text, re.MULTILINE)
    if not starts:
        return None
    stamp, process, host = starts[-1]
    here = host == platform.node()
    return _Place(process=int(process), host=host, alive=_alive(int(process), stamp) if here else None)


def _alive(process: int, stamp: str) -> bool:
    """Whether a process of this machine that ran at `stamp` still does; another may have its number by now."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        # Of Linux: what comes after the name in parentheses, which may hold anything.
        facts = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        booted = re.search(r"^btime (\d+)$", Path("/proc/stat").read_text(), re.MULTILINE)
        logged = datetime.fromisoformat(stamp).timestamp()
    except (OSError, ValueError):
        return True
    if facts[0] == "Z" or booted is None:
        return facts[0] != "Z"
    started = int(booted.group(1)) + int(facts[19]) / os.sysconf("SC_CLK_TCK")
    return started <= logged + SLACK_S
