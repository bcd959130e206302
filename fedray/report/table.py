"""The table of a sweep: what differs between its runs, and what came of it over the seeds."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedray.errors import ConfigError, FedrayError
from fedray.report.runs import find_runs, manifest_of, markdown, sentence, shown, sized
from fedray.report.settings import ABSENT, Settings, cell, closest, differing, order, settings_of, short
from fedray.track.store import read_rows

MEGABYTE = 1e6
SHOWN = 3
"""How many unfinished runs an error names."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One finished run. settings: flattened, without what is ignored.

    values: the last that was recorded, by name of a metric; None if it was not finite.
    """

    name: str
    seed: int
    started: str
    settings: Settings
    values: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in nothing but their seed."""

    settings: Settings
    outcomes: Sequence[Outcome]

    def of(self, metric: str) -> list[float]:
        found = (outcome.values.get(metric) for outcome in self.outcomes)
        return [value for value in found if value is not None]


HEADLINES = ("test/accuracy", "test/mse", "client/accuracy_mean", "client/mse_mean")
"""What a table shows unless it is told: the first of these that a run has."""


def table(folder: Path, *, metric: str | None = None, rows: str | None = None, cols: str | None = None) -> str:
    """Markdown: a line for each setting under `folder`, or with `rows` and `cols` the metric by two settings.

    metric: a name of rounds.jsonl, None for the first of HEADLINES; its last recorded value counts, mean +- standard
    deviation of the sample over seeds.
    rows, cols: settings, as `pruner.sparsity` or short as `sparsity`. Runs that are not finished, that have no such
    metric or that repeat a seed are named below. Raises ConfigError.
    """
    if (rows is None) != (cols is None):
        raise ConfigError("--rows and --cols are given together or not at all")
    if metric is None:
        known = {name for run in find_runs(folder) for name in _recorded(run)}
        metric = next((name for name in HEADLINES if name in known), HEADLINES[0])
    groups, notes = _groups(folder, metric)
    text = _lines(groups, metric) if rows is None or cols is None else _pivot(groups, metric, rows, cols)
    return "\n".join([text, "", "MB = 1e6 bytes." if rows is None else f"{metric} by {rows} and {cols}.", *notes])


def _recorded(run: Path) -> set[str]:
    """The metrics of a run; none where it cannot be read, which is said elsewhere."""
    try:
        return {name for row in read_rows(run) for name in row}
    except (FedrayError, OSError):
        return set()


def _groups(folder: Path, metric: str) -> tuple[list[Group], list[str]]:
    """The groups, ordered by their settings, and notes on what was left out."""
    by_settings: dict[str, dict[int, Outcome]] = defaultdict(dict)
    notes, known, unfinished, unread = [], set(), [], []
    older_version: dict[str, bool] = {}
    for run in find_runs(folder):
        name = shown(run, [folder])
        try:
            manifest = manifest_of(run)
            status = manifest["status"]
            outcome = _outcome(run, name, manifest) if status == "finished" else None
        except (FedrayError, OSError) as error:
            unread.append(str(error))
            notes.append(f"- {name} is left out: {sentence(error)}")
            continue
        if outcome is None:
            unfinished.append((run, status))
            notes.append(f"- {name} is left out: {status}.")
            continue
        known |= set(outcome.values)
        if outcome.values.get(metric) is None:
            why = f"its last {metric} is not finite" if metric in outcome.values else f"it has no {metric}"
            notes.append(f"- {name} is left out: {why}.")
            continue
        older_version[name] = "choices" not in manifest
        same = by_settings[repr(sorted(outcome.settings.items()))]
        if outcome.seed in same:
            older, outcome = sorted((same[outcome.seed], outcome), key=lambda one: one.started)
            notes.append(f"- {older.name} is left out: {outcome.name} repeats it with the same seed.")
        same[outcome.seed] = outcome
    if not by_settings:
        if metric in known:
            raise ConfigError(f"--metric {metric} is not finite at the end of any run; choose another")
        if known:
            # Those of tests come first, those of single layers last.
            names = sorted(known, key=lambda one: (one.count("/"), not one.startswith("test/"), one))
            raise ConfigError(f"--metric {metric} is in no run; {closest(metric, names)}")
        raise _nothing_finished(folder, unfinished, unread)
    if 0 < sum(older_version.values()) < len(older_version):
        names = [name for name, older in older_version.items() if older]
        notes.append(
            f"- {_listed(names)} recorded by an older version of fedray, which did not keep the choices of groups; "
            "lines of theirs may be the same setting as another line."
        )
    groups = [Group(settings=next(iter(s.values())).settings, outcomes=list(s.values())) for s in by_settings.values()]
    keys = differing([group.settings for group in groups])
    return sorted(groups, key=lambda group: [order(group.settings.get(key)) for key in keys]), notes


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more} {'was' if len(names) == 1 else 'were'}"


def _nothing_finished(folder: Path, unfinished: Sequence[tuple[Path, str]], unread: Sequence[str]) -> ConfigError:
    if not unfinished:
        return ConfigError(
            f"'{folder}' holds no run that can be read: {unread[0]}"
            if unread
            else f"'{folder}' holds no finished run with a metric; run it for at least one round"
        )
    found = [f"'{run}' is {status}" for run, status in unfinished[:SHOWN]]
    more = f" and {len(unfinished) - SHOWN} more" if len(unfinished) > SHOWN else ""
    wait = "wait for it, or if it was cut off " if unfinished[0][1] == "running" else ""
    return ConfigError(
        f"'{folder}' holds no finished run: {', '.join(found)}{more}; {wait}go on with fedray resume {unfinished[0][0]}"
    )


def _outcome(run: Path, name: str, manifest: Mapping[str, Any]) -> Outcome:
    values: dict[str, float | None] = {}
    for row in read_rows(run):
        values |= {key: value for key, value in row.items() if isinstance(value, int | float | None) and key != "round"}
    return Outcome(
        name=name,
        seed=manifest["config"]["seed"],
        started=manifest.get("started", ""),
        settings=settings_of(manifest),
        values=values,
    )


# -- tables ----------------------------------------------------------------------------------------------------------


def _lines(groups: Sequence[Group], metric: str) -> str:
    keys = differing([group.settings for group in groups])
    names = short(keys)
    columns: list[tuple[str, str, Callable[[Sequence[float]], str]]] = [
        ("sparsity at the end", "model/sparsity", lambda found: f"{statistics.fmean(found):.4f}"),
        ("MB up", "wire/total_up_bytes", _megabytes),
        ("MB down", "wire/total_down_bytes", _megabytes),
        ("dense / sent", "wire/total_ratio", lambda found: f"{statistics.fmean(found):,.2f}"),
    ]
    columns = [column for column in columns if any(group.of(column[1]) for group in groups)]
    lines = [
        [
            *(cell(group.settings, key) for key in keys),
            str(len(group.outcomes)),
            _spread(group.of(metric)),
            *(form(found) if (found := group.of(name)) else ABSENT for _, name, form in columns),
        ]
        for group in groups
    ]
    return markdown([*(names[k] for k in keys), "seeds", metric, *(c[0] for c in columns)], lines, text=len(keys))


def _pivot(groups: Sequence[Group], metric: str, rows: str, cols: str) -> str:
    if "seed" in (rows, cols):
        groups = [
            Group(settings={**group.settings, "seed": outcome.seed}, outcomes=[outcome])
            for group in groups
            for outcome in group.outcomes
        ]
    keys = list(dict.fromkeys(key for group in groups for key in group.settings))
    row, col = (_resolve(key, keys, option) for key, option in ((rows, "--rows"), (cols, "--cols")))
    cells: dict[tuple[str, str], list[Group]] = defaultdict(list)
    for group in groups:
        cells[cell(group.settings, row), cell(group.settings, col)].append(group)
    for (at, across), several in cells.items():
        if len(several) > 1:
            raise ConfigError(
                f"the cell {rows}={at}, {cols}={across} has {len(several)} settings, which differ in "
                f"{', '.join(differing([group.settings for group in several]))}; give the folder of fewer runs, or "
                "leave out --rows and --cols"
            )
    down = [cell(g.settings, row) for g in sorted(groups, key=lambda g: order(g.settings.get(row)))]
    across_ = [cell(g.settings, col) for g in sorted(groups, key=lambda g: order(g.settings.get(col)))]
    lines = [
        [at, *(_spread(cells[at, to][0].of(metric)) if (at, to) in cells else ABSENT for to in dict.fromkeys(across_))]
        for at in dict.fromkeys(down)
    ]
    return markdown([f"{rows} \\ {cols}", *dict.fromkeys(across_)], lines)


def _resolve(key: str, keys: Sequence[str], option: str) -> str:
    """A setting from its full or short name."""
    found = [key] if key in keys else [known for known in keys if known.endswith(f".{key}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{option} {key} may be {' or '.join(found)}; write one of them in full")
    raise ConfigError(f"{option} {key} is not a setting of these runs; {closest(key, keys)}")


def _spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of the sample, which one value does not have, with decimals that suit the mean."""
    mean = statistics.fmean(values)
    if all(isinstance(value, int) for value in values) and len(set(values)) == 1:
        decimals = 0  # a count
    elif abs(mean) < 10:
        decimals = 4 if mean == 0 or abs(mean) >= 0.001 else 3 - math.floor(math.log10(abs(mean)))
    else:
        decimals = 2 if abs(mean) < 1000 else 0
    deviation = f"{statistics.stdev(values):,.{decimals}f}" if len(values) > 1 else ABSENT
    return f"{mean:,.{decimals}f} ± {deviation}"


def _megabytes(values: Sequence[float]) -> str:
    """Mean, and the deviation where seeds differ."""
    mean = sized(statistics.fmean(values) / MEGABYTE)
    return mean if len(set(values)) == 1 else f"{mean} ± {sized(statistics.stdev(values) / MEGABYTE)}"
