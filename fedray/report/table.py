"""The table of a sweep: what differs between its runs, and what came of it over the seeds."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from fedray.errors import ConfigError
from fedray.report.latex import latex
from fedray.report.paired import Baseline, Difference
from fedray.report.results import SHOWN, Cost, Group, Result, When, grouped, listed, read_results, rises
from fedray.report.runs import markdown, sized
from fedray.report.settings import ABSENT, cell, closest, differing, only, order, resolve, short

Format = Literal["md", "csv", "latex"]
Bold = Literal["column", "row", "none"]

MEGABYTE = 1e6
HEADLINES = ("test/accuracy", "test/mse", "client/accuracy_mean", "client/mse_mean")
"""What a table shows unless it is told: the first of these that a run has."""
NEVER = "never"
NOT_FINITE = "not finite"
"""Instead of the number of a setting that reached its target with no seed."""
_EXTRAS = ("model/sparsity", "client/sparsity_mean", "wire/total_up_bytes", "wire/total_down_bytes", "wire/total_ratio")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a table shows of each group.

    metric:  a name of rounds.jsonl. when: its last value, its best, or what was spent when it first reached `target`,
             counted in `cost`; target is None for the run's own.
    rising:  whether more of what is shown is better.
    """

    metric: str
    when: When = "final"
    target: float | None = None
    cost: Cost = "rounds"

    @property
    def rising(self) -> bool:
        return self.when != "target" and rises(self.metric)

    @property
    def heading(self) -> str:
        if self.when == "target":
            unit = "MB" if self.cost == "bytes" else self.cost
            return f"{unit} to {self.metric} {'target' if self.target is None else f'{self.target:g}'}"
        return self.metric if self.when == "final" else f"{self.metric} ({self.when})"

    @property
    def scale(self) -> float:
        """What the printed number is divided by; csv has it undivided."""
        return MEGABYTE if self.when == "target" and self.cost == "bytes" else 1.0

    @property
    def nothing(self) -> str:
        """What stands where runs finished and none has a number."""
        return NEVER if self.when == "target" else NOT_FINITE

    def of(self, group: Group) -> dict[int | None, float]:
        """The numbers by seed. Raises ConfigError where a run has no target."""
        return group.at(self.metric, self.when, target=self.target, cost=self.cost)

    def lacks(self, result: Result) -> str | None:
        """Why a finished run has no number; None if it has one. Raises ConfigError as `of` does."""
        if result.at(self.metric, self.when, target=self.target, cost=self.cost) is not None:
            return None
        if self.metric not in result.metrics:
            return f"is left out: it has no {self.metric}"
        return f"is left out: its {'last ' if self.when == 'final' else ''}{self.metric} is not finite"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A cell of a printed table. number: whether it stands to the right; bold: whether it is the best."""

    text: str
    number: bool = True
    bold: bool = False


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A printed table. title: a line above it, or nothing."""

    header: Sequence[str]
    lines: Sequence[Sequence[Entry]]
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One setting and what came of it. state: what became of it where there is no number. runs: finished ones."""

    keys: Mapping[str, str]
    values: Mapping[int | None, float]
    state: str = ""
    runs: int = 0
    best: bool = False
    difference: Difference | None = None
    extras: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Tabled:
    """A table in words: `text` as asked for, and a sentence on each run that is left out and on how numbers are
    counted, which `text` has too unless it is csv."""

    text: str
    notes: Sequence[str]


def table(
    folder: Path,
    *,
    metric: str | None = None,
    rows: str | None = None,
    cols: str | None = None,
    at: When = "final",
    target: float | None = None,
    cost: Cost = "rounds",
    baseline: str | None = None,
    confidence: float = 0.95,
    bold: Bold = "column",
    chosen: Sequence[str] = (),
    form: Format = "md",
) -> str:
    """The text of `tabled`."""
    return tabled(
        read_results(folder),
        metric=metric,
        rows=rows,
        cols=cols,
        at=at,
        target=target,
        cost=cost,
        baseline=baseline,
        confidence=confidence,
        bold=bold,
        chosen=chosen,
        form=form,
        folder=folder,
    ).text


def tabled(
    results: Sequence[Result],
    *,
    metric: str | None = None,
    rows: str | None = None,
    cols: str | None = None,
    at: When = "final",
    target: float | None = None,
    cost: Cost = "rounds",
    baseline: str | None = None,
    confidence: float = 0.95,
    bold: Bold = "column",
    chosen: Sequence[str] = (),
    form: Format = "md",
    folder: Path | None = None,
) -> Tabled:
    """A line for each setting, or with `rows` and `cols` the metric by settings: mean and standard deviation of the
    sample over seeds.

    metric: a name of rounds.jsonl, None for the first of HEADLINES; at, target, cost: see `Result.at`.
    rows, cols: settings with commas between, as `pruner.sparsity` or short as `sparsity`.
    baseline: settings as `pruner=none`, with commas between: the difference to it by seed, with its t interval of
    `confidence`. bold: where the best is looked for. chosen: `KEY=VALUE` that a run must have.
    folder: what errors name. Runs that are not finished, that have no such metric or that repeat a seed are named in
    the notes. Raises ConfigError.
    """
    if (rows is None) != (cols is None):
        raise ConfigError("--rows and --cols are given together or not at all")
    if target is not None and at != "target":
        raise ConfigError(f"--target {target:g} goes with --at target, not with --at {at}")
    if target is not None and not math.isfinite(target):
        raise ConfigError(f"--target is {target}; write a number, as in --target 0.9")
    if not 0 < confidence < 1:
        raise ConfigError(f"--confidence is {confidence:g}; it must be between 0 and 1, as in --confidence 0.95")
    results = only(results, chosen)
    known = {name for result in results for name in result.metrics}
    if metric is None:
        metric = next((name for name in HEADLINES if name in known), HEADLINES[0])
    question = Question(metric=metric, when=at, target=target, cost=cost)
    groups, notes = grouped(results)
    groups, lacking = _with_numbers(groups, question)
    notes = [*notes, *lacking]
    if not groups or (at != "target" and not any(question.of(group) for group in groups)):
        raise no_number(results, metric, folder)
    against = None if baseline is None else Baseline(groups, baseline, question.of, confidence)
    if rows is None or cols is None:
        keys = differing([group.settings for group in groups])
        lines = _lines(groups, keys, question, against)
        if bold == "column":
            best = {id(line) for line in _best(lines, question)}
            lines = [replace(line, best=id(line) in best) for line in lines]
        sheets = [_line_sheet(lines, keys, question, against)]
        legend = ["MB = 1e6 bytes."]
        names = list(keys)
    else:
        row_keys, col_keys = rows.split(","), cols.split(",")
        lines, down, across = _cells(groups, results, row_keys, col_keys, question, against)
        if bold != "none":
            picks, kind = (across, col_keys) if bold == "column" else (down, row_keys)
            parts = [[line for line in lines if _look(line, kind) == pick] for pick in picks]
            best = {id(line) for part in parts for line in _best(part, question)}
            lines = [replace(line, best=id(line) in best) for line in lines]
        sheets = _pivot_sheets(lines, down, across, row_keys, col_keys, question, against)
        legend = [f"{question.heading} by {rows} and {cols}."]
        if usual := _usual([len(line.values) for line in lines if line.values]):
            others = (
                " where no other n is given" if len({len(line.values) for line in lines if line.values}) > 1 else ""
            )
            legend.append(f"Mean ± standard deviation over seeds, n={usual}{others}.")
        names = [*row_keys, *col_keys]
    notes = [*([] if against is None else against.notes), *notes]
    if any(line.state == ABSENT for line in lines):
        legend.append(f"{ABSENT} is a cell without a run.")
    if at == "best":
        legend.append(f"The best of all evaluated rounds is shown: it is chosen by {metric} itself.")
    if against is not None:
        legend.append(
            f"Differences are paired by seed, to {baseline}, with {confidence * 100:g} % t intervals; none is "
            "corrected for the number of comparisons."
        )
    if form == "csv":
        return Tabled(text=_csv(lines, names, question, against), notes=[*legend, *notes])
    if form == "latex":
        return Tabled(text=_latex(sheets, [*legend, *notes]), notes=[*legend, *notes])
    blocks = [block for sheet in sheets for block in ([sheet.title] if sheet.title else []) + [_markdown(sheet)]]
    said = [" ".join(legend), *(f"- {note}" for note in notes)]
    return Tabled(text="\n\n".join([*blocks, "\n".join(said)]), notes=[*legend, *notes])


def _with_numbers(groups: Sequence[Group], question: Question) -> tuple[list[Group], list[str]]:
    """The groups without the runs that never had the metric, and why; one that missed its target or diverged stays,
    without a number."""
    found, notes, missed = [], [], []
    for group in groups:
        kept = []
        for result in group.results:
            why = question.lacks(result)
            if why is not None and question.when == "target" and question.metric in result.metrics:
                missed.append(result.name)
            elif why is not None:
                notes.append(f"{result.name} {why}.")
                if question.metric not in result.metrics:
                    continue
            kept.append(result)
        if kept:
            found.append(replace(group, results=kept))
    if missed:
        does = listed(missed, "does not reach its target and is", "do not reach their target and are")
        notes.append(f"{does} not in a mean.")
    return found, notes


def no_number(results: Sequence[Result], metric: str, folder: Path | None) -> ConfigError:
    """Why no run has a number."""
    where = "what was given" if folder is None else f"'{folder}'"
    finished = [result for result in results if result.status == "finished"]
    known = {name for result in finished for name in result.metrics}
    if metric in known:
        return ConfigError(f"--metric {metric} is not finite at the end of any run; choose another")
    if known:
        # Those of tests come first, those of single layers last.
        names = sorted(known, key=lambda one: (one.count("/"), not one.startswith("test/"), one))
        return ConfigError(f"--metric {metric} is in no run; {closest(metric, names)}")
    unfinished = [result for result in results if result.status not in ("finished", "unreadable")]
    if not unfinished:
        unread = next((result.error for result in results if result.status == "unreadable"), None)
        return ConfigError(
            f"{where} holds no finished run with a metric; run it for at least one round"
            if unread is None
            else f"{where} holds no run that can be read: {unread}"
        )
    said = [f"'{run.folder}' is {run.status}{f': {run.error}' if run.error else ''}" for run in unfinished[:SHOWN]]
    more = f" and {len(unfinished) - SHOWN} more" if len(unfinished) > SHOWN else ""
    text = f"{where} holds no finished run: {', '.join(said)}{more}"
    first = next((result for result in unfinished if result.manifest), None)
    if first is None:
        return ConfigError(f"{text.rstrip('.')}; run the sweep's command again")
    wait = "wait for it, or if it was cut off " if first.status == "running" else ""
    return ConfigError(f"{text.rstrip('.')}; {wait}go on with fedray resume {first.folder}")


# -- numbers ---------------------------------------------------------------------------------------------------------


def _lines(groups: Sequence[Group], keys: Sequence[str], question: Question, against: Baseline | None) -> list[Line]:
    return [
        Line(
            keys={key: cell(group.settings, key) for key in keys},
            values=(values := question.of(group)),
            state="" if values else question.nothing,
            runs=len(group.results),
            difference=None if against is None else against.difference(group),
            extras={name: list(group.at(name).values()) for name in _EXTRAS},
        )
        for group in groups
    ]


def _cells(
    groups: Sequence[Group],
    results: Sequence[Result],
    row_keys: Sequence[str],
    col_keys: Sequence[str],
    question: Question,
    against: Baseline | None,
) -> tuple[list[Line], list[tuple[str, ...]], list[tuple[str, ...]]]:
    """A line for each cell, row by row, and the looks of the rows and of the columns in their order."""
    typed = [*row_keys, *col_keys]
    if len(set(typed)) < len(typed):
        raise ConfigError(f"--rows {','.join(row_keys)} and --cols {','.join(col_keys)} name a setting twice")
    pieces = [(group, group) for group in groups]
    if "seed" in typed:
        pieces = [(_of_seed(group, at), group) for group in groups for at in range(len(group.results))]
    known = list(dict.fromkeys(key for piece, _ in pieces for key in piece.settings))
    full = {key: resolve(key, known, "--rows" if key in row_keys else "--cols") for key in typed}

    def look(settings: Mapping[str, object], keys: Sequence[str]) -> tuple[str, ...]:
        return tuple(cell(settings, full[key]) for key in keys)

    found: dict[tuple[tuple[str, ...], tuple[str, ...]], list[tuple[Group, Group]]] = defaultdict(list)
    for piece, group in pieces:
        found[look(piece.settings, row_keys), look(piece.settings, col_keys)].append((piece, group))
    for (at, to), several in found.items():
        if len(several) > 1:
            where = ", ".join(f"{key}={value}" for key, value in zip(typed, (*at, *to), strict=True))
            raise ConfigError(
                f"the cell {where} has {len(several)} settings, which differ in "
                f"{', '.join(differing([piece.settings for piece, _ in several]))}; add one to --rows or --cols, "
                "choose with --only KEY=VALUE, or leave out --rows and --cols"
            )
    states: dict[tuple[tuple[str, ...], tuple[str, ...]], str] = {}
    settings = [dict(piece.settings) for piece, _ in pieces]
    for result in results:
        told = {**result.settings, "seed": result.seed}
        whole = bool(result.manifest) or all(full[key] in told for key in typed)
        if result.status in ("finished", "unreadable") or not whole:
            continue  # of a cell without a run only its overrides are known
        states.setdefault((look(told, row_keys), look(told, col_keys)), result.status)
        settings.append(told)

    def looks_in_order(keys: Sequence[str]) -> list[tuple[str, ...]]:
        rank = {look(one, keys): [order(one.get(full[key])) for key in keys] for one in settings}
        return sorted(rank, key=rank.__getitem__)

    down, across = looks_in_order(row_keys), looks_in_order(col_keys)
    lines = []
    for at in down:
        for to in across:
            looks = dict(zip(typed, (*at, *to), strict=True))
            if (at, to) not in found:
                lines.append(Line(keys=looks, values={}, state=states.get((at, to), ABSENT)))
                continue
            ((piece, group),) = found[at, to]
            values = question.of(piece)
            difference = None if against is None else against.difference(group, seeds=piece.seeds)
            state, runs = "" if values else question.nothing, len(piece.results)
            lines.append(Line(keys=looks, values=values, state=state, runs=runs, difference=difference))
    return lines, down, across


def _of_seed(group: Group, at: int) -> Group:
    result = group.results[at]
    return Group(settings={**group.settings, "seed": result.seed}, results=[result])


def _look(line: Line, keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(line.keys[key] for key in keys)


def _best(lines: Sequence[Line], question: Question) -> list[Line]:
    """The best of them, all that are equal; none where there are no two to compare.

    A mean over only those seeds that reached a target, or did not diverge, is no match for one over all.
    """
    full = [line for line in lines if line.values and len(line.values) == line.runs]
    means = [statistics.fmean(line.values.values()) for line in full]
    if len(means) < 2:
        return []
    best = max(means) if question.rising else min(means)
    return [line for line, mean in zip(full, means, strict=True) if mean == best]


# -- sheets ----------------------------------------------------------------------------------------------------------


def _line_sheet(lines: Sequence[Line], keys: Sequence[str], question: Question, against: Baseline | None) -> Sheet:
    names = short(keys)
    columns: list[tuple[str, str, Callable[[Sequence[float]], str]]] = [
        ("sparsity at the end", "model/sparsity", lambda found: f"{statistics.fmean(found):.4f}"),
        ("clients' sparsity", "client/sparsity_mean", lambda found: f"{statistics.fmean(found):.4f}"),
        ("MB up", "wire/total_up_bytes", _megabytes),
        ("MB down", "wire/total_down_bytes", _megabytes),
        ("dense / sent", "wire/total_ratio", lambda found: f"{statistics.fmean(found):,.2f}"),
    ]
    columns = [column for column in columns if any(line.extras[column[1]] for line in lines)]
    # Clients mostly have the masks of the model; the column is for those that have their own.
    own = any(line.extras["client/sparsity_mean"] and not any(line.extras["model/sparsity"]) for line in lines)
    columns = [column for column in columns if own or column[1] != "client/sparsity_mean"]
    compared = [] if against is None else [f"difference to {against.text}"]
    return Sheet(
        header=[
            *(names[key] for key in keys),
            "seeds",
            question.heading,
            *compared,
            *(column[0] for column in columns),
        ],
        lines=[
            [
                *(Entry(text=line.keys[key], number=False) for key in keys),
                Entry(text=str(len(line.values))),
                Entry(text=spread(line.values.values(), question.scale) if line.values else line.state, bold=line.best),
                *(Entry(text=_difference(line.difference, question)) for _ in compared),
                *(Entry(text=form(found) if (found := line.extras[name]) else ABSENT) for _, name, form in columns),
            ]
            for line in lines
        ],
    )


def _usual(counts: Sequence[int]) -> int:
    """The number of seeds of most cells; 0 where no cell has a number."""
    return max(set(counts), key=lambda count: (counts.count(count), count), default=0)


def _pivot_sheets(
    lines: Sequence[Line],
    down: Sequence[tuple[str, ...]],
    across: Sequence[tuple[str, ...]],
    row_keys: Sequence[str],
    col_keys: Sequence[str],
    question: Question,
    against: Baseline | None,
) -> list[Sheet]:
    by_look = {(_look(line, row_keys), _look(line, col_keys)): line for line in lines}
    counts = [len(line.values) for line in lines if line.values]
    usual = _usual(counts)

    def shown(line: Line) -> str:
        if not line.values:
            return line.state or ABSENT
        text = spread(line.values.values(), question.scale)
        return text if len(line.values) == usual else f"{text} (n={len(line.values)})"

    header = [*row_keys[:-1], f"{row_keys[-1]} \\ {','.join(col_keys)}", *(", ".join(to) for to in across)]

    def sheet(text: Callable[[Line], str], *, title: str = "", bold: bool = True) -> Sheet:
        return Sheet(
            title=title,
            header=header,
            lines=[
                [
                    *(Entry(text=name, number=False) for name in at),
                    *(Entry(text=text(line), bold=line.best and bold) for to in across for line in [by_look[at, to]]),
                ]
                for at in down
            ],
        )

    sheets = [sheet(shown)]
    if against is not None:
        title = f"Difference to {against.text}:"
        sheets.append(sheet(lambda line: _difference(line.difference, question), title=title, bold=False))
    return sheets


def _markdown(sheet: Sheet) -> str:
    lines = [[f"**{entry.text}**" if entry.bold else entry.text for entry in line] for line in sheet.lines]
    words = sum(not entry.number for entry in sheet.lines[0])
    return markdown(list(sheet.header), lines, text=words)


def _latex(sheets: Sequence[Sheet], notes: Sequence[str]) -> str:
    parts = [
        latex(
            sheet.header,
            [[(entry.text, entry.bold) for entry in line] for line in sheet.lines],
            text=sum(not entry.number for entry in sheet.lines[0]),
            title=sheet.title,
        )
        for sheet in sheets
    ]
    said = [f"% {' '.join(note.split())}" for note in ["Needs \\usepackage{booktabs}.", *notes]]
    return "\n".join([*said, "\n\n".join(parts)])


def _csv(lines: Sequence[Line], names: Sequence[str], question: Question, against: Baseline | None) -> str:
    """A line for each cell, in full precision: `repr` of a float, read back as the same bits."""
    extras = [name for name in _EXTRAS if any(line.extras.get(name) for line in lines)]
    header = [*names, "metric", "at", "n", "mean", "std", "best", "state", "seeds", "values"]
    if question.when == "target":
        header[len(names) + 2 : len(names) + 2] = ["target", "cost"]
    header += [f"{name} {what}" for name in extras for what in ("mean", "std")]
    if against is not None:
        header += ["baseline", "pairs", "difference", "low", "high"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for line in lines:
        values = list(line.values.values())
        row: list[object] = [*line.keys.values(), question.metric, question.when]
        if question.when == "target":
            row += ["" if question.target is None else question.target, question.cost]
        state = "" if values else "missing" if line.state in ("", ABSENT) else line.state
        row += [len(values), *_moments(values), int(line.best), state]
        row += [" ".join(str(seed) for seed in line.values), " ".join(repr(value) for value in values)]
        row += [moment for name in extras for moment in _moments(line.extras.get(name, ()))]
        if against is not None:
            found = line.difference
            empty = found is None or not found.pairs
            row += [against.text]
            row += ["", "", "", ""] if found is None or empty else [found.pairs, found.mean, found.low, found.high]
        writer.writerow(["" if one is None else one for one in row])
    return out.getvalue().rstrip("\n")


def _moments(values: Sequence[float]) -> tuple[float | None, float | None]:
    return (statistics.fmean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None)


# -- text ------------------------------------------------------------------------------------------------------------


def spread(values: Iterable[float], scale: float = 1.0) -> str:
    """Mean and standard deviation of the sample, which one value does not have, with decimals that suit the mean."""
    numbers = [value / scale if scale != 1.0 else value for value in values]
    mean = statistics.fmean(numbers)
    decimals = _decimals(numbers, mean)
    deviation = f"{statistics.stdev(numbers):,.{decimals}f}" if len(numbers) > 1 else ABSENT
    return f"{mean:,.{decimals}f} ± {deviation}"


def _decimals(values: Sequence[float], mean: float) -> int:
    if all(isinstance(value, int) for value in values) and len(set(values)) == 1:
        return 0  # a count
    if abs(mean) < 10:
        return 4 if mean == 0 or abs(mean) >= 0.001 else 3 - math.floor(math.log10(abs(mean)))
    return 2 if abs(mean) < 1000 else 0


def _difference(found: Difference | None, question: Question) -> str:
    """`+0.0123 [+0.0051, +0.0195] (n=3)`, with the decimals of the values that were compared."""
    if found is None:
        return ABSENT
    if found.itself:
        return "baseline"
    if not found.pairs or found.mean is None:
        return ABSENT
    decimals = max(_decimals([value / question.scale], value / question.scale) for value in found.compared)
    text = f"{found.mean / question.scale:+,.{decimals}f}"
    if found.low is not None and found.high is not None:
        low, high = found.low / question.scale, found.high / question.scale
        text += f" [{low:+,.{decimals}f}, {high:+,.{decimals}f}]"
    return f"{text} (n={found.pairs})"


def _megabytes(values: Sequence[float]) -> str:
    """Mean, and the deviation where seeds differ."""
    mean = sized(statistics.fmean(values) / MEGABYTE)
    return mean if len(set(values)) == 1 else f"{mean} ± {sized(statistics.stdev(values) / MEGABYTE)}"
