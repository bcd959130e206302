"""What the page of a sweep shows, as plain values: the template gets most of it, the charts get `charts` as JSON.

Numbers of the tables are those of every recorded round. Curves may be thinned so that hundreds of runs stay a small
file: whole rounds are left out, evenly, and no value is averaged over rounds or changed; `Page.thinning` says so.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fedray.errors import FedrayError
from fedray.report.results import SWEEP_FILE, Group, Result, finite, grouped, labels, rises
from fedray.report.runs import sentence
from fedray.report.settings import ABSENT, cell, differing, order, short
from fedray.track.store import CLIENTS_FILE, Row

MEGABYTE = 1e6
FEW = 12
"""Lines that a chart shows at once before it shows only the best setting of each method."""

CURVE_CHARACTERS = 3_600_000
"""About how much of the page the curves may take."""
LAYER_CHARACTERS = 700_000
MOST_POINTS = 400
FEWEST_POINTS = 16
_CHARACTERS = 7  # of a number with six significant digits and its comma, on average
_DIGITS = 6
MOST_CELLS = 80  # columns of a heat map
BINS = 20
LOG_LINES = 25
LOG_CHARACTERS = 6000
MOST_LOGS = 40
MOST_COMMANDS = 60
MOST_FACETS = 24
"""Values of a setting up to which the page has a button for each."""

HEADLINES = ("test/accuracy", "test/mse", "client/accuracy_mean", "client/mse_mean")
METHODS = ("pruner", "personal", "strategy", "correction", "wire", "model", "trainer", "data", "partition")
WAYS = ("down", "up")
PARTS = ("value", "mask", "header")
# Changes of masks are single spikes between rounds of nothing: thinning keeps the rounds that stick out.
SPIKES: Mapping[str, bool] = {"prune/churn": True, "prune/regrown": True, "prune/overlap": False}
_MOTION = tuple(SPIKES)
_AXES: Mapping[str, tuple[str, float]] = {
    "mb": ("wire/total_bytes", MEGABYTE),
    "seconds": ("time/total_s", 1.0),
    "simulated": ("time/total_simulated_s", 1.0),
}


@dataclass(frozen=True, kw_only=True)
class Column:
    """A number of the headline table.

    rising: whether more is better; None where neither is. cost: it is shown shorter, see `costed`.
    """

    title: str
    hint: str
    rising: bool | None
    cost: bool
    values: Sequence[Sequence[float]]
    """By group, then by seed; empty where a group has none."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that did not finish. log: the end of its log.txt; None where there is none."""

    name: str
    folder: str
    status: str
    error: str | None
    log: str | None


@dataclass(frozen=True, kw_only=True)
class Page:
    """Everything on the page. charts: what the charts read, ready for JSON."""

    folder: str
    counts: Mapping[str, int]
    keys: Mapping[str, str]
    """Settings that differ: key to its short name."""
    names: Sequence[str]
    cells: Sequence[Sequence[str]]
    """By group, the values of `keys`."""
    seeds: Sequence[Sequence[int | None]]
    columns: Sequence[Column]
    headline: str
    method: str
    charts: Mapping[str, Any]
    notes: Sequence[str]
    thinning: str | None
    failures: Sequence[Failure]
    settings: Sequence[tuple[str, Sequence[tuple[str, int]]]]
    """Settings that differ, each with its values and how many groups have them."""
    common: Sequence[tuple[str, str]]
    environments: Sequence[tuple[Mapping[str, str], int]]
    commands: Sequence[str]
    more_commands: int
    runs: Sequence[Mapping[str, str]]
    warnings: Sequence[tuple[str, int]]


def collect(folder: Path, results: Sequence[Result]) -> Page:
    """The page of the runs that were found under `folder`, with at least one finished or not."""
    groups, notes = grouped(results)
    keys = differing([group.settings for group in groups])
    known = sorted(set().union(*(result.metrics for group in groups for result in group.results)))
    headline = headline_of(known)
    names = labels(groups)
    charts, thinning = _charts(groups, names, keys, known, headline, notes)
    return Page(
        folder=str(folder),
        counts=Counter(result.status for result in results),
        keys=short(keys),
        names=names,
        cells=[[cell(group.settings, key) for key in keys] for group in groups],
        seeds=[group.seeds for group in groups],
        columns=_columns(groups, known, headline),
        headline=headline,
        method=charts["method"],
        charts=charts,
        notes=notes,
        thinning=thinning,
        failures=_failures(results),
        settings=_settings(groups),
        common=_common(groups),
        environments=_environments(results),
        **_commands(folder, results),
        runs=[_run(result, headline) for result in results],
        warnings=Counter(str(one) for result in results for one in result.manifest.get("warnings") or ()).most_common(),
    )


def headline_of(known: Sequence[str]) -> str:
    """The metric that the page opens with."""
    for name in HEADLINES:
        if name in known:
            return name
    return next((name for prefix in ("test/", "client/", "") for name in known if name.startswith(prefix)), "")


# -- tables ----------------------------------------------------------------------------------------------------------


def _columns(groups: Sequence[Group], known: Sequence[str], headline: str) -> list[Column]:
    found: list[Column] = []

    def add(
        title: str,
        hint: str,
        metric: str,
        rising: bool | None,
        *,
        best: bool = False,
        cost: bool = False,
        unit: float = 1.0,
    ) -> None:
        if metric in known:
            values = [
                [value / unit for value in group.at(metric, "best" if best else "final").values()] for group in groups
            ]
            found.append(Column(title=title, hint=hint, rising=rising, cost=cost, values=values))

    if headline:
        up = rises(headline)
        add(headline, "the last that was recorded", headline, up)
        add(f"{headline}, best round", "the best of all evaluations of a run", headline, up, best=True)
    main = headline.partition("/")[2].removesuffix("_mean")
    for metric in ("test/loss", f"client/{main}_mean"):
        if metric != headline:
            add(metric, "the last that was recorded", metric, rises(metric))
    add("sparsity at the end", "model/sparsity: the fraction of the prunable weights removed", "model/sparsity", None)
    for way in WAYS:
        metric = f"wire/total_{way}_bytes"
        add(f"MB {way}", f"{metric} / 1e6: all rounds, all clients", metric, False, cost=True, unit=MEGABYTE)
    add(
        "dense / sent",
        "what float32 without a mask would have cost, over what was sent",
        "wire/total_ratio",
        True,
        cost=True,
    )
    add(
        "simulated s",
        "time/total_simulated_s: by the device and link profiles",
        "time/total_simulated_s",
        False,
        cost=True,
    )
    add("s", "time/total_s: wall time of the rounds on the machine that ran them", "time/total_s", None, cost=True)
    return [column for column in found if any(column.values)]


def spread(values: Sequence[float]) -> str:
    """Mean and, where seeds differ, standard deviation of the sample over them, with decimals that suit the mean."""
    if not values:
        return ABSENT
    mean = statistics.fmean(values)
    size = abs(mean)
    decimals = 4 if size == 0 or 0.001 <= size < 10 else 2 if 10 <= size < 1000 else 0
    if 0 < size < 0.001:
        decimals = min(12, 3 - math.floor(math.log10(size)))
    # Seeds that agree to the last digit, as in what they sent, have no deviation worth a column's width.
    deviation = f" ± {statistics.stdev(values):,.{decimals}f}" if len(set(values)) > 1 else ""
    return f"{mean:,.{decimals}f}{deviation}"


def costed(values: Sequence[float]) -> str:
    """The mean alone, with fewer digits: what a run cost hardly differs between seeds, and columns are many."""
    if not values:
        return ABSENT
    size = abs(statistics.fmean(values))
    if size == 0 or size >= 0.1:
        return f"{statistics.fmean(values):,.{0 if size >= 1000 else 1 if size >= 100 else 2}f}"
    return f"{statistics.fmean(values):,.{min(12, 1 - math.floor(math.log10(size)))}f}"


def best_of(column: Column) -> set[int]:
    """The groups whose mean is the best of a column; several if they are equal."""
    means = {at: statistics.fmean(values) for at, values in enumerate(column.values) if values}
    if column.rising is None or len(means) < 2:
        return set()
    best = (max if column.rising else min)(means.values())
    found = {at for at, mean in means.items() if mean == best}
    return found if len(found) < len(means) else set()


def _run(result: Result, headline: str) -> dict[str, str]:
    last = result.rows[-1] if result.rows and result.status != "unreadable" else {}
    value = result.at(headline) if headline and last else None
    return {
        "name": result.name,
        "status": result.status,
        "seed": ABSENT if result.seed is None else str(result.seed),
        "rounds": str(last.get("round", 0)),
        "value": ABSENT if value is None else f"{value:.4g}",
        "started": result.started.replace("+00:00", " UTC").replace("T", " "),
        "id": result.run_id or ABSENT,
    }


def _failures(results: Sequence[Result]) -> list[Failure]:
    found = [result for result in results if result.status != "finished"]
    # What broke comes before what merely is not done.
    rank = {"failed": 0, "unreadable": 1, "interrupted": 2}
    found.sort(key=lambda result: rank.get(result.status, 3))
    return [
        Failure(
            name=result.name,
            folder=str(result.folder),
            status=result.status,
            error=None if result.error is None else sentence(result.error),
            log=_log(result.folder) if at < MOST_LOGS else None,
        )
        for at, result in enumerate(found)
    ]


def _log(folder: Path) -> str | None:
    """The last lines of a run's log.txt."""
    try:
        with (folder / "log.txt").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4 * LOG_CHARACTERS))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return None
    return "\n".join(text.rstrip().splitlines()[-LOG_LINES:])[-LOG_CHARACTERS:] or None


def _settings(groups: Sequence[Group]) -> list[tuple[str, list[tuple[str, int]]]]:
    found = []
    for key in differing([group.settings for group in groups]):
        counted = Counter(cell(group.settings, key) for group in groups)
        ranks = {cell(group.settings, key): order(group.settings.get(key)) for group in groups}
        found.append((key, sorted(counted.items(), key=lambda item: ranks[item[0]])))
    return found


def _common(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """The settings that all groups have alike."""
    varying = _varying(groups)
    return [(key, str(value)) for key, value in groups[0].settings.items() if key not in varying] if groups else []


def _environments(results: Sequence[Result]) -> list[tuple[dict[str, str], int]]:
    counted: Counter[str] = Counter()
    for result in results:
        environment = result.manifest.get("environment")
        if isinstance(environment, Mapping):
            packages = environment.get("packages")
            listed = (
                [f"{name} {version}" for name, version in packages.items()] if isinstance(packages, Mapping) else []
            )
            shown = {
                "python": str(environment.get("python", ABSENT)),
                "packages": ", ".join(listed) or ABSENT,
                "processor": f"{environment.get('processor', ABSENT)}, {environment.get('cpus', ABSENT)} CPUs",
                "platform": str(environment.get("platform", ABSENT)),
                "device": str(result.manifest.get("device", ABSENT)),
            }
            counted[json.dumps({name: text for name, text in shown.items() if text != ABSENT})] += 1
    return [(json.loads(text), number) for text, number in counted.most_common()]


def _commands(folder: Path, results: Sequence[Result]) -> dict[str, Any]:
    """The command of each sweep, and those of runs that no sweep started."""
    found: dict[str, None] = {}
    for place in sorted({above for result in results for above in (folder, *_between(folder, result.folder))}):
        try:
            command = json.loads((place / SWEEP_FILE).read_bytes())["command"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # the readers of results have said so where it matters
        found[command if isinstance(command, str) else shlex.join(map(str, command))] = None
    for result in results:
        environment = result.manifest.get("environment")
        if result.overrides or not isinstance(environment, Mapping) or not environment.get("command"):
            continue
        program, *arguments = map(str, environment["command"])
        start = "python -m fedray" if Path(program).name == "__main__.py" else Path(program).name
        found[f"{start} {shlex.join(arguments)}"] = None
    commands = list(found)
    return {"commands": commands[:MOST_COMMANDS], "more_commands": max(0, len(commands) - MOST_COMMANDS)}


def _between(top: Path, place: Path) -> list[Path]:
    return [above for above in place.parents if above.is_relative_to(top)]


# -- charts ----------------------------------------------------------------------------------------------------------


def _charts(
    groups: Sequence[Group],
    names: Sequence[str],
    keys: Sequence[str],
    known: Sequence[str],
    headline: str,
    notes: list[str],
) -> tuple[dict[str, Any], str | None]:
    metrics = _metrics(known, headline)
    numbers = sum(
        len(group.results) * sum(any(name in result.metrics for result in group.results) for name in metrics)
        + 4 * len(_AXES)
        for group in groups
    )
    points = max(FEWEST_POINTS, min(MOST_POINTS, CURVE_CHARACTERS // (_CHARACTERS * max(1, numbers))))
    main = headline.partition("/")[2].removesuffix("_mean")
    clients, missing = _clients(groups, f"test/{main}") if main else ([None] * len(groups), [])
    notes += missing
    layers = _layers(groups)
    varying = _varying(groups)
    thinned = 0
    shown: list[dict[str, Any]] = []
    for at, group in enumerate(groups):
        grids, series, most = _curves(group, metrics, points)
        thinned = max(thinned, most)
        shown.append(
            {
                "label": names[at],
                "values": [cell(group.settings, key) for key in keys],
                "seeds": group.seeds,
                "grids": grids,
                "series": series,
                "final": _at_end(group, [*metrics, "model/flops"]),
                "best": _at_end(group, [name for name in metrics if name.startswith(("test/", "client/"))], best=True),
                "cost": _costs(group),
                "bytes": _bytes(group),
                "layers": layers[at],
                "clients": clients[at],
                "settings": {key: str(value) for key, value in group.settings.items() if key in varying},
            }
        )
    thinning = (
        f"Curves of more than {points} recorded rounds (the longest has {thinned:,}) show {points} of them, evenly "
        "picked with the first and the last; of mask changes those that stick out. No value is smoothed or averaged "
        "over rounds, and every number of the tables is from all rounds."
        if thinned > points
        else None
    )
    method = next((key for key in METHODS if key in keys), keys[0] if keys else "")
    facets: list[dict[str, Any]] = [
        {"key": key, "at": at, "values": values}
        for at, key in enumerate(keys)
        if 1 < len(values := [value for value, _ in _values(groups, key)]) <= MOST_FACETS or key == method
    ]
    facets.sort(key=lambda facet: facet["key"] != method)
    charts = {
        "few": FEW,
        "headline": headline,
        "method": method,
        "methods": [value for value, _ in _values(groups, method)] if method else [],
        "methodAt": list(keys).index(method) if method else -1,
        "names": [short(keys)[key] for key in keys],
        "facets": [{**facet, "name": short(keys)[facet["key"]]} for facet in facets],
        "metrics": metrics,
        "rising": {name: rises(name) for name in metrics},
        "motion": [name for name in _MOTION if name in known],
        "clientMetric": f"test/{main}",
        "groups": shown,
    }
    return charts, thinning


def _values(groups: Sequence[Group], key: str) -> list[tuple[str, Any]]:
    found = {cell(group.settings, key): order(group.settings.get(key)) for group in groups}
    return sorted(found.items(), key=lambda item: item[1])


def _metrics(known: Sequence[str], headline: str) -> list[str]:
    """What the chooser of the curves has, the headline first."""
    wanted = [
        headline,
        *(name for name in known if name.startswith("test/")),
        *(name for name in known if name.startswith("client/") and name.count("/") == 1),
        "train/loss",
        "model/sparsity",
        *_MOTION,
    ]
    return [name for name in dict.fromkeys(wanted) if name in known]


def _varying(groups: Sequence[Group]) -> set[str]:
    """Every setting that is not the same in all groups, those that one of them lacks included."""
    found: dict[str, set[str]] = defaultdict(set)
    for group in groups:
        for key, value in group.settings.items():
            found[key].add(str(value))
    having = Counter(key for group in groups for key in group.settings)
    return {key for key, values in found.items() if len(values) > 1 or having[key] < len(groups)}


def _curves(group: Group, metrics: Sequence[str], points: int) -> tuple[list[Any], dict[str, Any], int]:
    """Grids of rounds with what had been spent by then, each metric on one of them by seed, and the longest curve."""
    by_seed = [{row["round"]: row for row in result.rows} for result in group.results]
    grids: dict[tuple[int, ...], list[Any]] = {}
    series: dict[str, Any] = {}
    most = 0
    for metric in metrics:
        rounds = sorted({number for rows in by_seed for number, row in rows.items() if metric in row})
        if not rounds:
            continue
        most = max(most, len(rounds))
        if len(rounds) > points:
            rounds = _standing_out(by_seed, metric, rounds, points) if metric in SPIKES else evenly(rounds, points)
        key = tuple(rounds)
        if key not in grids:
            grids[key] = [rounds, *(_spent(by_seed, rounds, *_AXES[axis]) for axis in _AXES)]
        number = list(grids).index(key)
        series[metric] = [number, *([rounded(rows.get(at, {}).get(metric)) for at in rounds] for rows in by_seed)]
    return list(grids.values()), series, most


def evenly(rounds: Sequence[int], points: int) -> list[int]:
    """`points` of the rounds, evenly spread, the first and the last among them."""
    last = len(rounds) - 1
    return [rounds[round(at * last / (points - 1))] for at in range(points)]


def _standing_out(by_seed: Sequence[Mapping[int, Row]], metric: str, rounds: Sequence[int], points: int) -> list[int]:
    """One round of each of `points` stretches: that with the largest (or smallest) value of any seed."""
    pick = max if SPIKES[metric] else min
    worst = -math.inf if SPIKES[metric] else math.inf

    def height(number: int) -> float:
        values = [finite(rows.get(number, {}).get(metric)) for rows in by_seed]
        return pick((value for value in values if value is not None), default=worst)

    edges = [round(at * len(rounds) / points) for at in range(points + 1)]
    return [pick(rounds[start:end], key=height) for start, end in pairwise(edges) if end > start]


def _spent(by_seed: Sequence[Mapping[int, Row]], rounds: Sequence[int], metric: str, unit: float) -> list[Any] | None:
    """The mean over seeds of what had been spent by each round; None where nobody recorded it."""
    found = []
    for number in rounds:
        values = [finite(rows.get(number, {}).get(metric)) for rows in by_seed]
        kept = [value / unit for value in values if value is not None]
        found.append(rounded(statistics.fmean(kept)) if kept else None)
    return found if any(value is not None for value in found) else None


def rounded(value: Any) -> float | int | None:
    """A finite number with as many digits as a curve can show, else None."""
    number = finite(value)
    if number is None or isinstance(number, int):
        return number
    short_one = float(f"{number:.{_DIGITS}g}")
    return int(short_one) if short_one.is_integer() and abs(short_one) < 1e15 else short_one


def _at_end(group: Group, metrics: Sequence[str], *, best: bool = False) -> dict[str, Any]:
    found = {}
    for metric in metrics:
        values = list(group.at(metric, "best" if best else "final").values())
        if values:
            found[metric] = [rounded(statistics.fmean(values)), _deviation(values), len(values)]
    return found


def _deviation(values: Sequence[float]) -> float | None:
    return rounded(statistics.stdev(values)) if len(values) > 1 else None


def _costs(group: Group) -> dict[str, float | int | None]:
    """What a run of the group cost in the mean: megabytes, seconds, and the size and work of its final model."""
    wanted = {
        "mb": ("wire/total_bytes", MEGABYTE),
        "upMb": ("wire/total_up_bytes", MEGABYTE),
        "sparsity": ("model/sparsity", 1.0),
        "flops": ("model/flops", 1.0),
        "trainFlops": ("model/train_flops", 1.0),
        "simulated": ("time/total_simulated_s", 1.0),
        "joules": ("energy/total_simulated_j", 1.0),
        "seconds": ("time/total_s", 1.0),
    }
    found = {}
    for name, (metric, unit) in wanted.items():
        values = [value / unit for value in group.at(metric).values()]
        if values:
            found[name] = rounded(statistics.fmean(values))
    return found


def _bytes(group: Group) -> dict[str, list[float | int | None]] | None:
    """Megabytes of a run by direction, then by part (values, mask, header); None where they were not recorded."""
    found = {}
    for way in WAYS:
        names = [f"wire/{way}_{part}_bytes" for part in PARTS]
        if not all(any(name in row for row in result.rows) for result in group.results for name in names):
            return None
        found[way] = [
            rounded(
                statistics.fmean(
                    sum(finite(row.get(name)) or 0 for row in result.rows) / MEGABYTE for result in group.results
                )
            )
            for name in names
        ]
    return found


def _layers(groups: Sequence[Group]) -> list[dict[str, Any] | None]:
    """Sparsity of each layer by round, of the group's first seed."""
    prefix = "model/layer_sparsity/"
    names = [
        [name for name in _in_order(group.results[0].rows) if name.startswith(prefix)] if group.results else []
        for group in groups
    ]
    total = sum(map(len, names)) * 6
    columns = max(8, min(MOST_CELLS, LAYER_CHARACTERS // total)) if total else MOST_CELLS
    found: list[dict[str, Any] | None] = []
    for group, layers in zip(groups, names, strict=True):
        if not layers:
            found.append(None)
            continue
        # Before a mask there is none: every layer is whole, and the row says so with a sparsity of 0.
        rows = {
            row["round"]: dict.fromkeys(layers, 0.0) | row
            for row in group.results[0].rows
            if row.get("model/sparsity") == 0 or any(name in row for name in layers)
        }
        rounds = sorted(rows)
        shown = evenly(rounds, columns) if len(rounds) > columns else rounds
        values = [
            [None if (value := finite(rows[at].get(name))) is None else round(value, 4) for at in shown]
            for name in layers
        ]
        found.append(
            {
                "names": [name.removeprefix(prefix) for name in layers],
                "rounds": shown,
                "of": len(rounds),
                "seed": group.results[0].seed,
                "values": [_repeated(line) for line in values],
            }
        )
    return found


def _in_order(rows: Sequence[Row]) -> list[str]:
    return list(rows[-1]) if rows else []


def _repeated(values: Sequence[float | None]) -> list[Any]:
    """Runs of equal values as [value, how many]: masks rest most of the time."""
    found: list[list[Any]] = []
    for value in values:
        if found and found[-1][0] == value:
            found[-1][1] += 1
        else:
            found.append([value, 1])
    return found


def _clients(groups: Sequence[Group], metric: str) -> tuple[list[dict[str, Any] | None], list[str]]:
    """How the clients of the last evaluation are spread, all seeds together, and notes on what cannot be read."""
    found: list[list[tuple[int, list[float]]]] = []
    notes = []
    for group in groups:
        read = []
        for result in group.results:
            try:
                one = _last_clients(result, metric)
            except (FedrayError, OSError, ValueError) as error:
                notes.append(f"The clients of {result.name} are left out: {sentence(error)}")
                continue
            if one is not None:
                read.append(one)
        found.append(read)
    everything = [value for read in found for _, values in read for value in values]
    if not everything:
        return [None] * len(groups), notes
    low, high = _ends(min(everything), max(everything))
    width = (high - low) / BINS
    shown: list[dict[str, Any] | None] = []
    for read in found:
        values = sorted(value for _, several in read for value in several)
        if not values:
            shown.append(None)
            continue
        counts = [0] * BINS
        for value in values:
            counts[min(BINS - 1, int((value - low) / width))] += 1
        shown.append(
            {
                "range": [low, high],
                "counts": counts,
                "p10": rounded(_quantile(values, 0.1)),
                "mean": rounded(statistics.fmean(values)),
                "p90": rounded(_quantile(values, 0.9)),
                "rounds": sorted({number for number, _ in read}),
                "seeds": len(read),
            }
        )
    return shown, notes


def _ends(low: float, high: float) -> tuple[float, float]:
    """Round numbers around the values, so that classes have readable borders."""
    power = 10.0 ** math.floor(math.log10(max(high - low, 1e-6)))
    step = power / 2
    return round(math.floor(low / step) * step, 9), round(
        max(math.ceil(high / step), math.floor(low / step) + 1) * step, 9
    )


def _last_clients(result: Result, metric: str) -> tuple[int, list[float]] | None:
    """The last round whose clients were tested, and their values.

    Only the end of the file is decoded: it has a line for each client of each round.
    """
    try:
        data = (result.folder / CLIENTS_FILE).read_bytes()
    except FileNotFoundError:
        return None
    finished = {row["round"] for row in result.rows}
    values: list[float] = []
    at: int | None = None
    end = len(data)
    last = True
    while end > 0:
        start = data.rfind(b"\n", 0, end - 1) + 1
        line, end = data[start:end].strip(), start
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if last:
                last = False
                continue  # torn by a crash
            raise
        last = False
        if row["round"] not in finished:
            continue
        if at is not None and row["round"] != at:
            break
        value = finite(row.get(metric))
        if value is not None:
            at = row["round"]
            values.append(value)
    return None if at is None else (at, values)


def _quantile(values: Sequence[float], share: float) -> float:
    """Of sorted values, with linear interpolation between neighbours."""
    place = share * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (place - below)
