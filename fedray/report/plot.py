"""`fedray plot`: the figures of a sweep, as files for a paper. What is drawn is worked out here, `figures` draws it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedray.errors import ConfigError, FedrayError
from fedray.report.results import (
    Group,
    Result,
    finite,
    grouped,
    labels,
    listed,
    read_results,
    rises,
    sparsities,
    sparsity_keys,
)
from fedray.report.runs import sentence
from fedray.report.settings import cell, closest, only, order, resolve, short
from fedray.report.table import HEADLINES, MEGABYTE, no_number
from fedray.track.store import CLIENTS_FILE, MANIFEST_FILE, ROUNDS_FILE

Width = Literal["single", "double"]
Range = tuple[float, float] | None

MOST_LINES = 12
"""Lines that one panel shows clearly; with more, there is a panel for each sparsity."""
MOST_METHODS = 24
"""Looks of a line that can be told apart."""
MOST_PANELS = 12
MOST_NAMES = 60
"""Rows of a heat map or a box plot."""
CLIENT_METRICS = ("test/accuracy", "test/mse")
LAYER = "model/layer_sparsity/"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What is drawn of a group, or of groups that differ only in their sparsity.

    label: who it is, and panel: where. look: the number of its colour, dash and marker.
    x, y:  means over seeds; x_spread, y_spread: standard deviations of the sample, None for one seed. n: seeds, of
           the point with the fewest.
    """

    label: str
    panel: str
    look: int
    n: int
    x: tuple[float, ...]
    y: tuple[float, ...]
    x_spread: tuple[float | None, ...]
    y_spread: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Lines over rounds, megabytes or seconds, with a band over seeds.

    spent: x is what is spent, which may be far apart between curves. x_range, y_range: what is shown; None for all.
    """

    curves: Sequence[Curve]
    x_label: str
    y_label: str
    spent: bool = False
    x_range: Range = None
    y_range: Range = None


@dataclass(frozen=True, kw_only=True)
class Points:
    """Final values as points with bars over seeds; those of one method are joined.

    front: the points that no other beats in both, as (x, y); empty for no front. spent, x_range, y_range: as of Lines.
    """

    curves: Sequence[Curve]
    x_label: str
    y_label: str
    sparsity_axis: bool = False
    front: Sequence[tuple[float, float]] = ()
    spent: bool = False
    x_range: Range = None
    y_range: Range = None


@dataclass(frozen=True, kw_only=True)
class Heat:
    """A number for each group and each layer. cells: by group, None where a group has no such layer."""

    labels: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[float | None]]
    x_label: str
    colour_label: str


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """Values of single clients by group, of all seeds together."""

    labels: Sequence[str]
    values: Sequence[Sequence[float]]
    x_label: str


Drawing = Lines | Points | Heat | Boxes


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a kind is asked to draw. panels: the setting that has a panel for each value; None for what suits.

    notes, skipped: what the kind says of its drawing, and the runs that are not in it.
    """

    groups: Sequence[Group]
    metric: str | None
    panels: str | None
    notes: list[str]
    x_range: Range = None
    y_range: Range = None
    skipped: list[Result] = field(default_factory=list)

    def chosen_metric(self) -> str:
        """What was asked for, or the first of HEADLINES that is there. Raises ConfigError where it is in no run."""
        known = {name for group in self.groups for result in group.results for name in result.metrics}
        if self.metric is not None:
            if self.metric not in known:
                raise ConfigError(f"--metric {self.metric} is in no run; {closest(self.metric, sorted(known))}")
            return self.metric
        found = next((name for name in HEADLINES if name in known), None)
        if found is None:
            raise ConfigError("no finished run has a test metric: run with eval.every=1 to record one")
        return found


def plot_command(arguments: Sequence[str], *, parser: type[argparse.ArgumentParser]) -> None:
    """Write figures of a folder of runs, each as PNG, PDF and a JSON file that says what it was made from."""
    command = parser(
        prog="fedray plot",
        description="Figures of a sweep for a paper, as PNG and PDF, with what they were made from as JSON.",
        epilog="\n".join(
            ["kinds:", *(f"  {name:<19}{(draw.__doc__ or '').splitlines()[0]}" for name, draw in KINDS.items())]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("folder", type=Path, help="a folder that holds runs at any depth")
    command.add_argument("--kind", required=True, metavar="KIND,...", help="one or more of those below, or all")
    command.add_argument("--metric", help="instead of test/accuracy")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="DIR/figures without")
    command.add_argument("--width", choices=("single", "double"), default="single", help="of one or two columns")
    command.add_argument(
        "--only", metavar="KEY=VALUE", action="append", default=[], help="only such runs; KEY=A|B for several values"
    )
    command.add_argument("--x", metavar="LOW,HIGH", help="the part of the x axis that is shown; all of it without")
    command.add_argument("--y", metavar="LOW,HIGH", help="the part of the y axis, as in --y 0.9,1")
    command.add_argument("--panels", metavar="KEY", help="a panel for each value of this setting")
    options = command.parse_args(arguments)
    kinds = list(KINDS) if options.kind == "all" else list(dict.fromkeys(options.kind.split(",")))
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"--kind {kind} is not a kind; {closest(kind, list(KINDS))}")
    x_range, y_range = _range(options.x, "--x"), _range(options.y, "--y")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("fedray plot needs matplotlib: pip install 'fedray[report]'")
    out = options.folder / "figures" if options.out is None else options.out
    if os.path.lexists(out) and not os.path.isdir(out):  # unlike those of Path, these two never raise
        raise ConfigError(f"--out is {str(out)!r}; it is no folder, so name one")
    results = only(read_results(options.folder), options.only)
    groups, notes = grouped(results)
    if not groups:
        raise no_number(results, HEADLINES[0], options.folder)
    said = dict.fromkeys(notes)
    refused: list[tuple[str, FedrayError]] = []
    for kind in kinds:
        ask = Ask(
            groups=groups,
            metric=options.metric,
            panels=options.panels,
            notes=list(notes),
            x_range=x_range,
            y_range=y_range,
        )
        try:
            drawing = _drawn(kind, ask)
        except FedrayError as error:  # a damaged file too: only some kinds read the lines of clients
            if len(kinds) == 1:
                raise
            refused.append((kind, error))
            continue
        for path in write(drawing, kind, ask, out, options.width):
            print(path)
        said |= dict.fromkeys(ask.notes)
    if len(refused) == len(kinds):
        raise refused[0][1]
    for kind, why in refused:
        print(f"- {kind} is left out: {sentence(why)}")
    for note in said:
        print(f"- {note}")


def _range(text: str | None, option: str) -> Range:
    """The two ends of `0.9,1`. Raises ConfigError."""
    if text is None:
        return None
    try:
        low, high = (float(end) for end in text.split(","))
    except ValueError:
        raise ConfigError(
            f"{option} is {text!r}; write two numbers with a comma between, as in {option} 0.9,1"
        ) from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"{option} is {text!r}; the first number must be the smaller one, as in {option} 0.9,1")
    return low, high


def _drawn(kind: str, ask: Ask) -> Drawing:
    """What a kind draws. Raises ConfigError too where --x has nothing that its axis can show."""
    from fedray.report.figures import x_shown

    drawing = KINDS[kind](ask)
    if isinstance(drawing, Lines | Points):
        x_shown(drawing)
    return drawing


def write(drawing: Drawing, kind: str, ask: Ask, out: Path, width: Width) -> list[Path]:
    """Draw to OUT/<kind>.png and .pdf, with a .json of the runs, the numbers and the notes beside them.

    Raises ConfigError where they cannot be written.
    """
    from fedray.report.figures import draw

    stem = kind if ask.metric is None else f"{kind}_{ask.metric.replace('/', '-')}"
    paths = [out / f"{stem}{end}" for end in (".png", ".pdf", ".json")]
    read = (MANIFEST_FILE, ROUNDS_FILE, *((CLIENTS_FILE,) if isinstance(drawing, Boxes) else ()))
    skipped = {id(result) for result in ask.skipped}
    made_from = [
        {
            "label": label,
            "seed": result.seed,
            "run_id": result.run_id,
            "folder": str(result.folder.resolve()),
            "files": list(read),
        }
        for group, label in zip(ask.groups, labels(ask.groups), strict=True)
        for result in group.results
        if id(result) not in skipped
    ]
    facts = {
        "kind": kind,
        "metric": ask.metric,
        "band": "one standard deviation of the sample over seeds, to each side",
        "made_from": made_from,
        "drawn": asdict(drawing),
        "notes": ask.notes,
    }
    text = json.dumps(facts, indent=2, allow_nan=False) + "\n"
    try:
        out.mkdir(parents=True, exist_ok=True)
        draw(drawing, paths[:2], width)
        paths[2].write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--out is {str(out)!r}, which cannot be written ({error.strerror or error}); name a folder that can be"
        ) from error
    return paths


# -- kinds -----------------------------------------------------------------------------------------------------------


def _rounds(ask: Ask) -> Lines:
    """the metric by round, with a band over seeds"""
    return _over(ask, ask.chosen_metric(), "round", "round", 1.0)


def _megabytes(ask: Ask) -> Lines:
    """the metric by what was transferred so far, both ways"""
    return _over(ask, ask.chosen_metric(), "wire/total_bytes", "transferred (MB)", 1 / MEGABYTE)


def _time(ask: Ask) -> Lines:
    """the metric by time: simulated if every run has a device or a link, else measured"""
    every = [result for group in ask.groups for result in group.results]
    simulated = all("time/total_simulated_s" in result.metrics for result in every)
    name = "time/total_simulated_s" if simulated else "time/total_s"
    longest = max((row.get(name) or 0.0 for result in every for row in result.rows[-1:]), default=0.0)
    unit, seconds = ("h", 3600.0) if longest > 7200 else ("min", 60.0) if longest > 300 else ("s", 1.0)
    kind = "simulated" if simulated else "measured"
    return _over(ask, ask.chosen_metric(), name, f"{kind} time ({unit})", 1 / seconds)


def _churn(ask: Ask) -> Lines:
    """the share of the mask that changed, by round"""
    return _movement(ask, "prune/churn", "a pruner records it, as pruner=feddst does")


def _overlap(ask: Ask) -> Lines:
    """how much the masks of the clients of a round have in common"""
    return _movement(ask, "prune/overlap", "pruners record it whose clients send masks of their own, as pruner=feddst")


def _sparsity(ask: Ask) -> Points:
    """the metric at the end by the sparsity at the end, a line for each method"""
    metric = ask.chosen_metric()
    curves = _ends(ask, "model/sparsity", metric, _sparsity_at_the_end)
    own = [
        label
        for group, label in zip(ask.groups, labels(ask.groups), strict=True)
        if any(_sparsity_at_the_end(result) != result.at("model/sparsity") for result in group.results)
    ]
    if own:
        ask.notes.append(f"{listed(own)} at the mean sparsity of the clients, because the server has no mask.")
    return Points(
        curves=curves,
        x_label="sparsity (fraction removed)",
        y_label=axis_label(metric),
        sparsity_axis=True,
        y_range=ask.y_range,
    )


def _pareto(ask: Ask) -> Points:
    """the metric at the end by all that was transferred, and the front that no setting beats in both"""
    metric = ask.chosen_metric()
    curves = _ends(ask, "wire/total_bytes", metric, lambda result: _scaled(result.at("wire/total_bytes"), 1 / MEGABYTE))
    points = [point for curve in curves for point in zip(curve.x, curve.y, strict=True)]
    return Points(
        curves=curves,
        x_label="transferred (MB)",
        y_label=axis_label(metric),
        spent=True,
        x_range=ask.x_range,
        y_range=ask.y_range,
        front=front(points, rising=rises(metric)),
    )


def _layers(ask: Ask) -> Heat:
    """the sparsity of each layer at the end"""
    if ask.metric is not None:
        raise ConfigError("--metric is not for --kind layers, which shows the sparsity of layers; leave it out")
    groups = [group for group in ask.groups if any(_layers_of(result.rows) for result in group.results)]
    if not groups:
        raise ConfigError("no finished run has the sparsity of layers: a pruner records it, as pruner=magnitude does")
    _left_out(ask, groups, "no sparsity of layers")
    names = list(
        dict.fromkeys(name for group in groups for result in group.results for name in _layers_of(result.rows))
    )
    cells = []
    for group in groups:
        for result in group.results:
            if not _layers_of(result.rows):
                _skip(ask, result, "sparsity of layers")
        found = [_layers_of(result.rows) for result in group.results]
        by_name = {name: [one[name] for one in found if name in one] for name in names}
        cells.append([statistics.fmean(values) if values else None for values in by_name.values()])
    return Heat(
        labels=_names(ask, groups),
        columns=_layer_names(names),
        cells=cells,
        x_label="layer, from input to output",
        colour_label="sparsity (fraction removed)",
    )


def _clients(ask: Ask) -> Boxes:
    """the metric of single clients at the end, on their own test data"""
    wanted = (ask.metric,) if ask.metric is not None else CLIENT_METRICS
    # Values by metric, group and run.
    found: dict[str, list[list[list[float]]]] = {name: [] for name in wanted}
    for group in ask.groups:
        runs = [_last(result.clients, wanted) for result in group.results]
        for name in wanted:
            found[name].append([[v for line in run if (v := finite(line.get(name))) is not None] for run in runs])
    metric = next((name for name in wanted if any(any(runs) for runs in found[name])), None)
    if metric is None:
        raise ConfigError(
            f"no finished run has {' or '.join(wanted)} of single clients in {CLIENTS_FILE}: run with eval.every=1 and "
            "eval.clients=all to record it"
        )
    kept = [(group, by_run) for group, by_run in zip(ask.groups, found[metric], strict=True) if any(by_run)]
    for group, by_run in kept:
        for result, own in zip(group.results, by_run, strict=True):
            if not own:
                _skip(ask, result, f"{metric} of single clients")
    _left_out(ask, [group for group, _ in kept], f"no {metric} of single clients")
    return Boxes(
        labels=_names(ask, [group for group, _ in kept]),
        values=[[value for own in by_run for value in own] for _, by_run in kept],
        x_label=f"client's {axis_label(metric)}",
    )


KINDS: Mapping[str, Callable[[Ask], Drawing]] = {
    "accuracy-rounds": _rounds,
    "accuracy-mb": _megabytes,
    "accuracy-sparsity": _sparsity,
    "accuracy-time": _time,
    "layers": _layers,
    "churn": _churn,
    "overlap": _overlap,
    "clients": _clients,
    "pareto": _pareto,
}


# -- what is drawn ---------------------------------------------------------------------------------------------------


def front(points: Sequence[tuple[float, float]], *, rising: bool) -> list[tuple[float, float]]:
    """The points that none beats with less x and a better y, from the smallest x. Of equal points one is kept."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1] if rising else point[1])):
        if not found or (y > found[-1][1] if rising else y < found[-1][1]):
            found.append((x, y))
    return found


def axis_label(metric: str) -> str:
    """A metric in words, with its unit."""
    words = metric.replace("prune/", "mask ").replace("/", " ").replace("_", " ")
    for end, unit in ((" bytes", "bytes"), (" s", "s"), (" j", "J"), (" params", "parameters"), (" flops", "FLOPs")):
        if words.endswith(end):
            return f"{words.removesuffix(end)} ({unit})"
    last = metric.rpartition("/")[2]
    if last.startswith(("accuracy", "sparsity", "churn", "overlap", "regrown", "global_accuracy")):
        return f"{words} (fraction)"
    return words


def _over(ask: Ask, metric: str, x: str, x_label: str, scale: float) -> Lines:
    """The metric over something that grows, round by round."""
    curves = []
    for group, label, panel, look in _places(ask, [group for group in ask.groups if _has(group, metric)]):
        by_seed = [{round: (a, b) for round, a, b in result.series("round", x, metric)} for result in group.results]
        for result, one in zip(group.results, by_seed, strict=True):
            if not one:
                _skip(ask, result, x if result.series(metric) else metric)
        by_seed = [one for one in by_seed if one]
        if not by_seed:
            continue
        rounds = sorted(set.intersection(*(set(one) for one in by_seed)))
        rounds = rounds or sorted(set.union(*(set(one) for one in by_seed)))
        longest = max(max(one) for one in by_seed)
        if rounds[-1] < longest:
            ask.notes.append(f"{label} is drawn to round {rounds[-1]:g} of {longest:g}, where its shortest run ends.")
        points = [[one[round] for one in by_seed if round in one] for round in rounds]
        curves.append(
            _curve(
                [[point[0] * scale for point in several] for several in points],
                [[point[1] for point in several] for several in points],
                label=label,
                panel=panel,
                look=look,
            )
        )
    if not curves:
        raise ConfigError(f"no finished run has {metric} and {x} in one round: choose another --metric")
    _left_out(ask, [group for group in ask.groups if _has(group, metric)], f"no {metric}")
    return Lines(
        curves=curves,
        x_label=x_label,
        y_label=axis_label(metric),
        spent=x != "round",
        x_range=ask.x_range,
        y_range=ask.y_range,
    )


def _movement(ask: Ask, metric: str, remedy: str) -> Lines:
    if ask.metric is not None:
        raise ConfigError(f"--metric is not for this kind, which shows {metric}; leave it out")
    if not any(_has(group, metric) for group in ask.groups):
        raise ConfigError(f"no finished run has {metric}: {remedy}")
    return _over(ask, metric, "round", "round", 1.0)


def _sparsity_at_the_end(result: Result) -> float | None:
    """That of the model; where the server has no mask, as of methods with a mask for each client, theirs."""
    whole, own = result.at("model/sparsity"), result.at("client/sparsity_mean")
    return own if own is not None and not whole else whole


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def _ends(ask: Ask, x: str, metric: str, x_of: Callable[[Result], float | None]) -> list[Curve]:
    """A curve for each method, with a point for each of its sparsities; x: the metric that `x_of` is made from."""
    groups = [group for group in ask.groups if group.at(metric) and group.at(x)]
    if not groups:
        raise ConfigError(f"no finished run has both {metric} and {x}; choose another --metric")
    _left_out(ask, groups, f"no {metric}")
    named = _methods(groups, sparsity_keys(groups))
    by_panel = _panel_of(ask, groups)
    curves = []
    for look, name in enumerate(dict.fromkeys(named)):
        for panel in dict.fromkeys(by_panel):
            own = [g for g, n, p in zip(groups, named, by_panel, strict=True) if n == name and p == panel]
            points = []
            for group in own:
                pairs = [(x_of(result), result.at(metric)) for result in group.results]
                for result, pair in zip(group.results, pairs, strict=True):
                    if None in pair:
                        _skip(ask, result, metric if pair[1] is None else x)
                both = [(one, other) for one, other in pairs if one is not None and other is not None]
                if both:
                    points.append(([one for one, _ in both], [other for _, other in both]))
            points.sort(key=lambda point: statistics.fmean(point[0]))
            if points:
                xs_, ys_ = [point[0] for point in points], [point[1] for point in points]
                curves.append(_curve(xs_, ys_, label=name, panel=panel, look=look))
    _enough_looks(len(set(named)))
    return curves


def _curve(x: Sequence[Sequence[float]], y: Sequence[Sequence[float]], *, label: str, panel: str, look: int) -> Curve:
    def spreads(several: Sequence[Sequence[float]]) -> tuple[float | None, ...]:
        return tuple(statistics.stdev(values) if len(values) > 1 else None for values in several)

    return Curve(
        label=label,
        panel=panel,
        look=look,
        n=min(len(values) for values in y),
        x=tuple(statistics.fmean(values) for values in x),
        y=tuple(statistics.fmean(values) for values in y),
        x_spread=spreads(x),
        y_spread=spreads(y),
    )


def _places(ask: Ask, groups: Sequence[Group]) -> list[tuple[Group, str, str, int]]:
    """Each group with its label, its panel and its look; a group without the setting of the panels is in all."""
    if ask.panels is not None:
        key = _resolved(ask.panels, groups)
        name, values = short([key])[key], [group.settings.get(key) for group in groups]
        methods = _methods(groups, [key])
    elif len(groups) > MOST_LINES and any(value is not None for value in sparsities(groups)):
        name, values, methods = "sparsity", sparsities(groups), _methods(groups, sparsity_keys(groups))
    else:
        _enough_looks(len(groups))
        named = zip(groups, labels(groups), strict=True)
        return [(group, label, "", look) for look, (group, label) in enumerate(named)]
    looks = {method: look for look, method in enumerate(dict.fromkeys(methods))}
    _enough_looks(len(looks))
    # By their looks: a value may be a list.
    panels = sorted({str(value): value for value in values if value is not None}.values(), key=order)
    if len(panels) > MOST_PANELS:
        raise ConfigError(
            f"{name} has {len(panels)} values, and {MOST_PANELS} panels fit; choose with --only KEY=VALUE"
        )
    return [
        (group, method, f"{name} {panel}", looks[method])
        for panel in panels
        for group, method, value in zip(groups, methods, values, strict=True)
        if value is None or value == panel
    ]


def _panel_of(ask: Ask, groups: Sequence[Group]) -> list[str]:
    if ask.panels is None:
        return ["" for _ in groups]
    key = _resolved(ask.panels, groups)
    return [f"{short([key])[key]} {cell(group.settings, key)}" for group in groups]


def _resolved(panels: str, groups: Sequence[Group]) -> str:
    return resolve(panels, list(dict.fromkeys(key for group in groups for key in group.settings)), "--panels")


def _methods(groups: Sequence[Group], keys: Sequence[str]) -> list[str]:
    """A label for each group without some settings; groups that differ in nothing else have the same."""
    without = [{name: value for name, value in group.settings.items() if name not in keys} for group in groups]
    looks = [repr(sorted(settings.items())) for settings in without]
    unique = {look: Group(settings=settings, results=[]) for look, settings in zip(looks, without, strict=True)}
    named = dict(zip(unique, labels(list(unique.values())), strict=True))
    return [named[look] for look in looks]


def _enough_looks(count: int) -> None:
    if count > MOST_METHODS:
        raise ConfigError(
            f"{count} settings are more than the {MOST_METHODS} that a figure can tell apart; choose with --only "
            "KEY=VALUE, as in --only pruner.sparsity=0.9, or give --panels KEY"
        )


def _names(ask: Ask, groups: Sequence[Group]) -> list[str]:
    if len(groups) > MOST_NAMES:
        raise ConfigError(
            f"{len(groups)} settings are more than the {MOST_NAMES} rows that fit; choose with --only KEY=VALUE, as in "
            "--only pruner.sparsity=0.9"
        )
    named = {id(group): label for group, label in zip(ask.groups, labels(ask.groups), strict=True)}
    return [named[id(group)] for group in groups]


def _left_out(ask: Ask, groups: Sequence[Group], why: str) -> None:
    kept = {id(group) for group in groups}
    missing = [label for g, label in zip(ask.groups, labels(ask.groups), strict=True) if id(g) not in kept]
    if missing:
        ask.notes.append(f"{listed(missing)} not drawn: {why}.")
        ask.skipped.extend(result for group in ask.groups if id(group) not in kept for result in group.results)


def _skip(ask: Ask, result: Result, what: str) -> None:
    """Say that a run of a group is not drawn, once: a group may be in several panels."""
    if not any(result is one for one in ask.skipped):
        ask.skipped.append(result)
        ask.notes.append(f"{result.name} is not drawn: its {what} is not finite or missing.")


def _has(group: Group, metric: str) -> bool:
    return any(metric in result.metrics for result in group.results)


def _layers_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last recorded sparsity of each layer."""
    found: dict[str, float] = {}
    for row in reversed(rows):
        found = {
            n.removeprefix(LAYER): v for n, one in row.items() if n.startswith(LAYER) and (v := finite(one)) is not None
        }
        if found:
            break
    return found


def _layer_names(names: Sequence[str]) -> list[str]:
    """Without the `.weight` that they all end in."""
    if all(name.endswith(".weight") for name in names):
        return [name.removesuffix(".weight") for name in names]
    return list(names)


def _last(lines: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> list[Mapping[str, Any]]:
    """The lines of the last round in which a client has one of the metrics."""
    scored = [line for line in lines if any(name in line for name in metrics)]
    last = max((line["round"] for line in scored), default=None)
    return [line for line in scored if line["round"] == last]
