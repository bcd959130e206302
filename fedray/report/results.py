"""Every run of a folder, whatever became of it, and the finished ones in groups that differ only in their seed."""

from __future__ import annotations

import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fedray import metrics
from fedray.errors import ConfigError, FedrayError, RunError
from fedray.report.runs import manifest_of, natural, sentence, shown
from fedray.report.settings import Settings, cell, differing, order, settings_of, short
from fedray.track.store import CONFIG_FILE, MANIFEST_FILE, ROUNDS_FILE, Row, read_clients, read_rows

When = Literal["final", "best", "target"]
Cost = Literal["rounds", "bytes", "seconds"]

SWEEP_FILE = "sweep.json"
COSTS: Mapping[Cost, str] = {"rounds": "round", "bytes": "wire/total_bytes", "seconds": "time/total_s"}
"""What a run has spent, by the metric of a row that says so."""

_SPENT = ("wire/", "time/", "energy/", "target/", "device/")
_SPENT_ENDS = ("_bytes", "_params", "flops", "_s", "_j", "seconds", "rounds", "bytes")
_METHODS = ("pruner", "personal", "strategy", "correction", "wire")
_ORDER = (*_METHODS, "model", "trainer", "data", "partition")
"""Groups of the configuration as they come in a label."""
_CELL_ENDED = {"done": "finished", "skipped": "finished"}
SHOWN = 3
"""How many names a sentence lists."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run, or a cell of a sweep that never became one.

    name:      its path below the folder that was asked for.
    status:    finished | running | failed | interrupted as the store says, unreadable where it cannot be read, and
               waiting | failed | running of a cell that has no run directory.
    seed, run_id: None where nobody knows.
    settings:  by dotted key, without what is ignored; of a cell without a run only its overrides.
    error:     the sentence of what went wrong.
    overrides: of the cell, where a sweep recorded them.
    """

    folder: Path
    name: str
    status: str
    seed: int | None
    run_id: str | None
    started: str
    settings: Settings
    manifest: Mapping[str, Any]
    error: str | None
    overrides: tuple[str, ...] = ()

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of the finished rounds, in order; empty for an unreadable run and for a cell without one."""
        if self.status == "unreadable":
            return []
        # The names of metrics are the same in every row of hundreds of runs: kept once, they are a third of the size.
        return [{sys.intern(name): value for name, value in row.items()} for row in read_rows(self.folder)]

    @cached_property
    def clients(self) -> list[Row]:
        """The lines of clients.jsonl of the finished rounds. Raises RunError if they cannot be read."""
        return [] if self.status == "unreadable" else read_clients(self.folder)

    @cached_property
    def metrics(self) -> frozenset[str]:
        """Names of the numbers that its rows have, finite or not."""
        numbers = {name for row in self.rows for name, value in row.items() if _is_number(value) or value is None}
        return frozenset(numbers - {"round"})

    def series(self, *names: str) -> list[tuple[float, ...]]:
        """The values of several metrics (`round` is one) at each round that has them all, finite."""
        found = []
        for row in self.rows:
            values = tuple(finite(row.get(name)) for name in names)
            if None not in values:
                found.append(values)
        return found  # type: ignore[return-value]

    def at(
        self,
        metric: str,
        when: When = "final",
        higher_is_better: bool | None = None,
        *,
        target: float | None = None,
        cost: Cost = "rounds",
    ) -> float | None:
        """A number of the run; None where it has none.

        final:  the last recorded value; None too if that is not finite.
        best:   the best finite value of all rounds. NaN never wins.
        target: what it had spent when the metric first reached `target`, in rounds, bytes (both ways) or seconds;
                without `target` from the run's own `target/...` metrics. None if it was not reached. Raises
                ConfigError where the run has no target of its own, or several, and none is given.

        higher_is_better: None goes by the name, see `rises`.
        """
        rising = rises(metric) if higher_is_better is None else higher_is_better
        if when == "target":
            target = self.own_target(metric) if target is None else target
            for row in self.rows:
                value = finite(row.get(metric))
                if value is not None and (value >= target if rising else value <= target):
                    return finite(row.get(COSTS[cost]))
            return None
        recorded = [row[metric] for row in self.rows if metric in row]
        if when == "final":
            return finite(recorded[-1]) if recorded else None
        values = [value for one in recorded if (value := finite(one)) is not None]
        return (max if rising else min)(values) if values else None

    def own_target(self, metric: str) -> float:
        """The one target of `stop.targets`. Raises ConfigError where there is none, several, or another's."""
        stop = self.manifest.get("config", {}).get("stop") or {}
        targets, watched = stop.get("targets") or [], stop.get("metric")
        if not targets:
            raise ConfigError(f"--at target: {self.name} has no stop.targets; give one, as in --target 0.9")
        if watched != metric:
            raise ConfigError(
                f"--at target: stop.targets of {self.name} are of {watched}, not of {metric}; give --target"
            )
        if len(targets) > 1:
            listed = ", ".join(f"{target:g}" for target in targets)
            raise ConfigError(f"--at target: {self.name} has the targets {listed}; choose one with --target")
        return float(targets[0])


@dataclass(frozen=True, kw_only=True)
class Group:
    """Finished runs that differ in nothing but their seed, one for each seed, in order of their seeds."""

    settings: Settings
    results: Sequence[Result]

    @property
    def seeds(self) -> list[int | None]:
        return [result.seed for result in self.results]

    def at(
        self,
        metric: str,
        when: When = "final",
        higher_is_better: bool | None = None,
        *,
        target: float | None = None,
        cost: Cost = "rounds",
    ) -> dict[int | None, float]:
        """`Result.at` by seed, without the seeds that have no such number."""
        found = {
            result.seed: result.at(metric, when, higher_is_better, target=target, cost=cost) for result in self.results
        }
        return {seed: value for seed, value in found.items() if value is not None}


def read_results(folder: Path) -> list[Result]:
    """Every run under `folder` at any depth, and every cell of a sweep.json there that has no run directory.

    Raises ConfigError if there is neither. A run that cannot be read is unreadable and says why in `error`.
    """
    folder = Path(folder)
    if not folder.exists():
        raise ConfigError(f"'{folder}' does not exist; give the folder of a run or of a sweep")
    results: list[Result] = []
    cells: list[tuple[Path, Mapping[str, Any]]] = []
    for place, inside, files in os.walk(folder):
        inside.sort(key=natural)
        here = Path(place)
        if _is_run(files):
            results.append(_result(here, shown(here, [folder])))
            inside.clear()  # what lies in a run belongs to it
        elif SWEEP_FILE in files:
            try:
                cells += [(here, one) for one in _cells(here / SWEEP_FILE)]
            except (RunError, OSError) as error:
                results.append(_unreadable(here / SWEEP_FILE, shown(here / SWEEP_FILE, [folder]), error))
    results = _with_cells(results, cells, folder)
    if not results:
        raise ConfigError(f"'{folder}' holds no run directory at any depth; give the folder of a run or of a sweep")
    return results


def grouped(results: Sequence[Result]) -> tuple[list[Group], list[str]]:
    """The finished runs in groups, in the order of their settings, and a sentence on each that is left out.

    Of two runs with the same seed the newer counts.
    """
    by_settings: dict[str, dict[int | None, Result]] = defaultdict(dict)
    notes, waiting = [], []
    for result in results:
        if result.status == "waiting":
            waiting.append(result.name)
            continue
        if result.status != "finished":
            notes.append(left_out(result))
            continue
        same = by_settings[repr(sorted(result.settings.items()))]
        if result.seed in same:
            older, result = sorted((same[result.seed], result), key=lambda one: one.started)
            notes.append(f"{older.name} is left out: {result.name} repeats it with the same seed.")
        same[result.seed] = result
    if waiting:
        notes.append(f"{listed(waiting)} left out: waiting to be run.")
    kept = [result for same in by_settings.values() for result in same.values()]
    older_version = [result.name for result in kept if "choices" not in result.manifest]
    if 0 < len(older_version) < len(kept):
        notes.append(
            f"{listed(older_version, 'was', 'were')} recorded by an older version of fedray, which did not keep the "
            "choices of groups; lines of theirs may be the same setting as another line."
        )
    groups = [
        Group(
            settings=next(iter(same.values())).settings,
            results=sorted(same.values(), key=lambda one: order(one.seed)),
        )
        for same in by_settings.values()
    ]
    keys = differing([group.settings for group in groups])
    return sorted(groups, key=lambda group: [order(group.settings.get(key)) for key in keys]), notes


def left_out(result: Result) -> str:
    """The sentence on a run that did not finish."""
    if result.status == "unreadable":
        return f"{result.name} is left out: {sentence(result.error)}"
    why = f": {sentence(result.error)}" if result.error else "."
    return f"{result.name} is left out: {result.status}{why}"


def listed(names: Sequence[str], one: str = "is", several: str = "are") -> str:
    """The first names and how many more, with the verb that suits their number."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more} {one if len(names) == 1 else several}"


def labels(groups: Sequence[Group]) -> list[str]:
    """A short name for each group from what differs between them, as in "feddst 0.9, alpha 0.3"; no two are alike.

    Methods and sparsities that differ are always named, other settings only where they tell two groups apart that
    would have the same name without.
    """
    several = [group.settings for group in groups]
    sparse = sparsity_keys(groups)
    # Of pruners with one sparsity each it tells none apart, and nobody compares them without it.
    differ = list(dict.fromkeys([*differing(several), *sparse]))
    if not differ:
        # One group, or none: there is nothing to tell apart, so it has the name of its pruner.
        named = [[key for key in ("pruner", "pruner.sparsity") if key in settings] for settings in several]
        return [_label(settings, own) for settings, own in zip(several, named, strict=True)]
    keys = [key for key in differ if key in _METHODS or key in sparse]
    looks = [tuple(cell(settings, key) for key in keys) for settings in several]
    for key in sorted(differ, key=lambda key: ("." in key, _rank(key))):
        longer = [(*look, cell(settings, key)) for look, settings in zip(looks, several, strict=True)]
        if key not in keys and len(set(longer)) > len(set(looks)):
            keys, looks = [*keys, key], longer
    found = [_label(settings, keys) for settings in several]
    names = short(keys)
    return [
        label if found.count(label) == 1 else ", ".join(f"{names[key]} {cell(settings, key)}" for key in keys)
        for label, settings in zip(found, several, strict=True)
    ]


def sparsity_keys(groups: Sequence[Group]) -> list[str]:
    """The settings that say how sparse a pruner makes the model, if groups differ in that; at most one of a group.

    Methods have their own names for it: `pruner.sparsity`, `pruner.target_sparsity`.
    """
    several = [group.settings for group in groups]
    keys = dict.fromkeys(key for settings in several for key in settings if _is_sparsity(key))
    apart = {"pruner.sparsity", *differing(several)}
    found = [key for key in keys if key in apart]
    if any(sum(key in settings for key in found) > 1 for settings in several):
        found = [key for key in found if key == "pruner.sparsity"]
    values = {cell(settings, key) for settings in several for key in found if key in settings}
    return found if len(values) > 1 else []


def sparsities(groups: Sequence[Group]) -> list[Any]:
    """The value of that setting by group; None where a group has none."""
    keys = sparsity_keys(groups)
    return [next((group.settings[key] for key in keys if key in group.settings), None) for group in groups]


def rises(metric: str) -> bool:
    """Whether more of a metric is better: not of losses and errors, and not of what a run spends."""
    if metric.endswith("ratio"):
        return True
    spent = metric.startswith(_SPENT) or metric.rpartition("/")[2].endswith(_SPENT_ENDS)
    return not spent and metrics.rises(metric)


def finite(value: Any) -> float | None:
    """A number as it is, whole numbers included; None for everything else, NaN and infinities too."""
    return value if _is_number(value) and math.isfinite(value) else None


# -- reading ---------------------------------------------------------------------------------------------------------


def _is_run(files: Sequence[str]) -> bool:
    """Two of the three files make a run directory, so that one whose third is lost is still named."""
    return len({MANIFEST_FILE, ROUNDS_FILE, CONFIG_FILE} & set(files)) >= 2


def _result(folder: Path, name: str) -> Result:
    try:
        manifest = manifest_of(folder)
        if not (folder / ROUNDS_FILE).is_file():
            raise RunError(f"'{folder}' has no {ROUNDS_FILE}; restore it from a copy, or run again")
        error = manifest.get("error")
        result = Result(
            folder=folder,
            name=name,
            status=str(manifest["status"]),
            seed=manifest["config"]["seed"],
            run_id=manifest.get("run_id"),
            started=str(manifest.get("started", "")),
            settings=settings_of(manifest),
            manifest=manifest,
            error=None if error is None else str(error),
        )
        _check_whole(result)
    except (FedrayError, OSError) as error:
        return _unreadable(folder, name, error)
    return result


def _check_whole(result: Result) -> None:
    """Raise RunError for a damaged line, and where lines are missing: an earlier round is not the final one."""
    there, rounds = len(result.rows), result.manifest.get("rounds")
    if result.status == "finished" and "stopped" not in result.manifest and isinstance(rounds, int) and there < rounds:
        raise RunError(
            f"'{result.folder}' finished {rounds} rounds and its {ROUNDS_FILE} has {there}; restore it from a copy, or "
            "delete the folder and run again"
        )


def _unreadable(folder: Path, name: str, error: Exception) -> Result:
    return Result(
        folder=folder,
        name=name,
        status="unreadable",
        seed=None,
        run_id=None,
        started="",
        settings={},
        manifest={},
        error=str(error),
    )


def _cells(path: Path) -> list[Mapping[str, Any]]:
    """The cells of a sweep.json. Raises RunError if it cannot be read."""
    try:
        cells = json.loads(path.read_bytes())["cells"]
        if not all(isinstance(one["folder"], str) and isinstance(one["status"], str) for one in cells):
            raise TypeError("a cell without its folder or status")
        if not all(isinstance(one.get("overrides") or [], list) for one in cells):
            raise TypeError("the overrides of a cell are no list")
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"'{path}' cannot be read ({error}); run the sweep's command again to write it anew") from error
    return list(cells)


def _with_cells(results: list[Result], cells: Sequence[tuple[Path, Mapping[str, Any]]], under: Path) -> list[Result]:
    """The runs with what their sweeps say of them, and the cells that have no run."""
    at = {result.folder.resolve(): index for index, result in enumerate(results)}
    results = list(results)
    for sweep, one in cells:
        folder = Path(one["folder"])
        # A sweep may have been moved or copied since: its cells lie beside its file.
        folder = next(
            (place for place in (sweep / folder, sweep / folder.name) if place.resolve() in at), sweep / folder
        )
        overrides = tuple(str(override) for override in one.get("overrides") or ())
        index = at.get(folder.resolve())
        if index is None:
            results.append(_cell_result(folder, _below(folder, under), one, overrides))
            continue
        result = results[index]
        changes: dict[str, Any] = {"overrides": overrides}
        if result.status == "running" and one["status"] == "failed":
            # Whoever was killed could not write its own end; whoever started it did.
            changes |= {"status": "failed", "error": one.get("error") or "it ended without a word"}
        results[index] = _changed(result, changes)
    return results


def _below(folder: Path, under: Path) -> str:
    return str(folder.relative_to(under)) if folder.is_relative_to(under) and folder != under else str(folder)


def _changed(result: Result, changes: Mapping[str, Any]) -> Result:
    changed = replace(result, **changes)
    if "rows" in result.__dict__:
        changed.__dict__["rows"] = result.rows  # read once
    return changed


def _cell_result(folder: Path, name: str, one: Mapping[str, Any], overrides: tuple[str, ...]) -> Result:
    settings = {key: _typed(value) for key, value in map(_override, overrides)}
    seed = settings.pop("seed", None)
    status, error = _CELL_ENDED.get(one["status"], one["status"]), one.get("error")
    if status == "finished":
        status, error = "unreadable", f"{SWEEP_FILE} has it as {one['status']}, and '{folder}' holds no run directory"
    return Result(
        folder=folder,
        name=name,
        status=status,
        seed=seed if isinstance(seed, int) else None,
        run_id=None,
        started="",
        settings=settings,
        manifest={},
        error=None if error is None else str(error),
        overrides=overrides,
    )


def _override(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    return key.lstrip("+~"), value


def _typed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# -- labels ----------------------------------------------------------------------------------------------------------


def _is_sparsity(key: str) -> bool:
    return key.startswith("pruner.") and key.endswith("sparsity")


def _rank(key: str) -> int:
    group = key.partition(".")[0]
    return _ORDER.index(group) if group in _ORDER else len(_ORDER)


def _label(settings: Settings, keys: Sequence[str]) -> str:
    """The parts of each group of the configuration with spaces between, and the groups with commas."""
    names = short(keys)
    by_group: dict[str, list[str]] = defaultdict(list)
    nothing: dict[str, str] = {}
    for key in keys:
        if key not in settings:
            continue
        group, value = key.partition(".")[0], cell(settings, key)
        if key == group and value == "none":
            nothing[group] = f"no {group}"
        elif key == group and isinstance(settings[key], str):
            by_group[group].insert(0, value)
        elif _is_sparsity(key) and not any(_is_sparsity(one) and one in settings for one in keys if one != key):
            by_group[group].append(value)
        else:
            by_group[group].append(f"{names[key]} {value}")
    # That there is no correction goes without saying, that nothing is pruned does not.
    if "pruner" in nothing or not by_group:
        group = next(iter(nothing), "")
        by_group["pruner" if "pruner" in nothing else group].append(
            nothing.get("pruner", nothing.get(group, "all runs"))
        )
    return ", ".join(" ".join(by_group[group]) for group in sorted(by_group, key=_rank))
