"""The table of a sweep: what differs between its runs, and what came of it over the seeds."""

from __future__ import annotations

import difflib
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedray.errors import ConfigError
from fedray.report.runs import find_runs, flattened, markdown, shown
from fedray.track.store import read_manifest, read_rows

IGNORED = ("name", "seed", "runtime", "tracker", "checkpoint")
"""Settings that do not change a result, and the seed; locations (every `path`) are ignored too."""
ABSENT = "-"
MEGABYTE = 1e6

Settings = Mapping[str, Any]


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

    def mean(self, metric: str) -> float | None:
        found = self.of(metric)
        return statistics.fmean(found) if found else None


def table(folder: Path, *, metric: str = "test/accuracy", rows: str | None = None, cols: str | None = None) -> str:
    """Markdown: a line for each setting under `folder`, or with `rows` and `cols` the metric by two settings.

    metric: a name of rounds.jsonl; its last recorded value counts, mean +- standard deviation of the sample over seeds.
    rows, cols: settings, as `pruner.sparsity` or short as `sparsity`. Runs that are not finished, that have no such
    metric or that repeat a seed are named below. Raises ConfigError.
    """
    if (rows is None) != (cols is None):
        raise ConfigError("--rows and --cols are given together or not at all")
    groups, notes = _groups(folder, metric)
    text = _lines(groups, metric) if rows is None or cols is None else _pivot(groups, metric, rows, cols)
    return "\n".join([text, "", "MB = 1e6 bytes." if rows is None else f"{metric} by {rows} and {cols}.", *notes])


def _groups(folder: Path, metric: str) -> tuple[list[Group], list[str]]:
    """The groups, ordered by their settings, and notes on what was left out."""
    by_settings: dict[str, dict[int, Outcome]] = defaultdict(dict)
    notes, known = [], set()
    for run in find_runs(folder):
        manifest, name = read_manifest(run), shown(run, [folder])
        if manifest["status"] != "finished":
            notes.append(f"- {name} is left out: {manifest['status']}.")
            continue
        outcome = _outcome(run, name, manifest)
        known |= set(outcome.values)
        if outcome.values.get(metric) is None:
            why = f"its last {metric} is not finite" if metric in outcome.values else f"it has no {metric}"
            notes.append(f"- {name} is left out: {why}.")
            continue
        same = by_settings[repr(sorted(outcome.settings.items()))]
        if outcome.seed in same:
            older, outcome = sorted((same[outcome.seed], outcome), key=lambda one: one.started)
            notes.append(f"- {older.name} is left out: {outcome.name} repeats it with the same seed.")
        same[outcome.seed] = outcome
    if not by_settings:
        if not known:
            raise ConfigError(f"'{folder}' holds no finished run; finish one with fedray resume RUN")
        if metric in known:
            raise ConfigError(f"--metric {metric} is not finite at the end of any run; choose another")
        raise ConfigError(f"--metric {metric} is in no run; {_closest(metric, sorted(known))}")
    groups = [Group(settings=next(iter(s.values())).settings, outcomes=list(s.values())) for s in by_settings.values()]
    differing = _differing(groups)
    return sorted(groups, key=lambda group: [_order(group.settings.get(key)) for key in differing]), notes


def _outcome(run: Path, name: str, manifest: Mapping[str, Any]) -> Outcome:
    config = manifest["config"]
    settings = {
        key: value
        for key, value in flattened({key: config[key] for key in config if key not in IGNORED}).items()
        if key.rsplit(".", 1)[-1] != "path"
    }
    # What was chosen of each group names it better than the sum of its settings; those that differ within it follow.
    choices = {group: choice for group, choice in manifest.get("choices", {}).items() if group not in IGNORED}
    settings = choices | settings | choices
    if "data" in manifest:
        settings["data.digest"] = manifest["data"]["digest"]  # the same location may have held other data
    values: dict[str, float | None] = {}
    for row in read_rows(run):
        values |= {key: value for key, value in row.items() if isinstance(value, int | float | None) and key != "round"}
    return Outcome(name=name, seed=config["seed"], started=manifest["started"], settings=settings, values=values)


# -- which settings differ -------------------------------------------------------------------------------------------


def _differing(groups: Sequence[Group]) -> list[str]:
    """Keys that tell the groups apart, in the order of the configuration.

    The settings of a component count where they differ between groups that have the same component, and made the
    same choice of its group: another pruner or wire is one difference, not one for each of its settings. Keys are
    added until no two groups look alike.
    """
    keys = list(dict.fromkeys(key for group in groups for key in group.settings))
    chosen = set()
    for key in keys:
        found: dict[tuple[str, str], set[str]] = defaultdict(set)
        for group in groups:
            if key in group.settings:
                same = (_cell(group, key.partition(".")[0]), _cell(group, key.rpartition(".")[0]))
                found[same if "." in key else ("", "")].add(_cell(group, key))
        if any(len(cells) > 1 for cells in found.values()):
            chosen.add(key)
    looks = [tuple(_cell(group, key) for key in keys if key in chosen) for group in groups]
    for key in keys:
        alike: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for group, look in zip(groups, looks, strict=True):
            alike[look].add(_cell(group, key))
        if any(len(cells) > 1 for cells in alike.values()):
            chosen.add(key)
            looks = [(*look, _cell(group, key)) for group, look in zip(groups, looks, strict=True)]
    return [key for key in keys if key in chosen]


def _short(keys: Sequence[str]) -> dict[str, str]:
    """Each key's last name where no other key ends in it, else the key."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def _cell(group: Group, key: str) -> str:
    return str(group.settings[key]) if key in group.settings else ABSENT


def _order(value: Any) -> tuple[int, float, str]:
    """Absent first, then numbers by size, then words."""
    if value is None:
        return (0, 0.0, "")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (1, value, "")
    return (2, 0.0, str(value))


# -- tables ----------------------------------------------------------------------------------------------------------


def _lines(groups: Sequence[Group], metric: str) -> str:
    keys = _differing(groups)
    short = _short(keys)
    columns = [
        ("sparsity at the end", "model/sparsity", 1.0, "{:.4f}"),
        ("MB up", "wire/total_up_bytes", MEGABYTE, "{:,.2f}"),
        ("MB down", "wire/total_down_bytes", MEGABYTE, "{:,.2f}"),
        ("dense / sent", "wire/total_ratio", 1.0, "{:,.2f}"),
    ]
    columns = [column for column in columns if any(group.of(column[1]) for group in groups)]
    lines = [
        [
            *(_cell(group, key) for key in keys),
            str(len(group.outcomes)),
            _spread(group.of(metric)),
            *(
                ABSENT if (mean := group.mean(name)) is None else form.format(mean / unit)
                for _, name, unit, form in columns
            ),
        ]
        for group in groups
    ]
    return markdown([*(short[k] for k in keys), "seeds", metric, *(c[0] for c in columns)], lines, text=len(keys))


def _pivot(groups: Sequence[Group], metric: str, rows: str, cols: str) -> str:
    keys = list(dict.fromkeys(key for group in groups for key in group.settings))
    row, col = (_resolve(key, keys, option) for key, option in ((rows, "--rows"), (cols, "--cols")))
    cells: dict[tuple[str, str], list[Group]] = defaultdict(list)
    for group in groups:
        cells[_cell(group, row), _cell(group, col)].append(group)
    for (at, across), several in cells.items():
        if len(several) > 1:
            raise ConfigError(
                f"the cell {rows}={at}, {cols}={across} has {len(several)} settings, which differ in "
                f"{', '.join(_differing(several))}; give the folder of fewer runs, or leave out --rows and --cols"
            )
    down = [_cell(g, row) for g in sorted(groups, key=lambda g: _order(g.settings.get(row)))]
    across_ = [_cell(g, col) for g in sorted(groups, key=lambda g: _order(g.settings.get(col)))]
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
    raise ConfigError(f"{option} {key} is not a setting of these runs; {_closest(key, keys)}")


def _spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of the sample, which one value does not have."""
    deviation = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ABSENT
    return f"{statistics.fmean(values):.4f} ± {deviation}"


def _closest(name: str, names: Sequence[str]) -> str:
    short = {known.rsplit(".", 1)[-1]: known for known in names}
    near = difflib.get_close_matches(name, [*names, *short], n=1)
    return f"did you mean {short.get(near[0], near[0])}?" if near else f"there are {', '.join(names)}"
