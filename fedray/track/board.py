"""The display of a sweep: a live board in a terminal, one line per cell that starts or ends elsewhere.

It shows what it is told and keeps nothing: runs are in their folders, and the state of the sweep is in its own file.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from fedray.errors import ConfigError
from fedray.track.progress import Mode, format_seconds, headline_metric
from fedray.track.store import ROUNDS_FILE

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

Status = Literal["waiting", "running", "done", "failed", "skipped", "interrupted"]
"""skipped: finished before this command. interrupted: stopped by whoever stopped the sweep."""

ENDED: tuple[Status, ...] = ("done", "failed", "skipped", "interrupted")

REFRESHES_PER_SECOND = 2.0

LABEL_WIDTH = 44
"""Characters of a label that the live board shows at most; a line of plain text has all of it."""

FRONT_LINES = 8
FAILED_LINES = 6
"""Cells of the front and failed cells on the live board; the summary names all."""

_LINES_AROUND = 13
"""Lines of the live board that are no cells: title, bar, prompt, and for each of running, front and failed a gap, a
header and how many more there are."""
_NUMBER_WIDTH = 9

TAIL_BYTES = 1 << 16
_ABSENT = "-"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a sweep: a run that is to be.

    id: the run's id, or what stands for it. label: what the cell differs in, for people. folder: its run directory.
    rounds: how many it will have, by its configuration.
    """

    id: str
    label: str
    folder: Path
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where a finished cell ended. metric: the name of `value`. total_bytes: sent both ways over the whole run."""

    label: str
    metric: str
    value: float
    total_bytes: float


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is more: losses, errors, perplexity and everything that costs."""
    words = metric.replace("/", "_").split("_")
    return not any(word in ("accuracy", "f1", "recall", "precision", "auc") for word in words)


def front(points: Iterable[Point]) -> list[Point]:
    """Those that no other beats: none sends as little or less and scores as well or better, one of both strictly.

    Of equal points all stay. By bytes, least first. Points of another metric than the first one's are left out.
    """
    candidates = [point for point in points if math.isfinite(point.value) and math.isfinite(point.total_bytes)]
    if not candidates:
        return []
    metric = candidates[0].metric
    sign = -1.0 if lower_is_better(metric) else 1.0
    ordered = sorted(
        (point for point in candidates if point.metric == metric),
        key=lambda point: (point.total_bytes, -sign * point.value),
    )
    kept: list[Point] = []
    for point in ordered:
        last = kept[-1] if kept else None
        if last is None or sign * point.value > sign * last.value or _same(point, last):
            kept.append(point)
    return kept


def _same(one: Point, other: Point) -> bool:
    return (one.value, one.total_bytes) == (other.value, other.total_bytes)


@dataclass
class _State:
    """What is known of a cell. before: rounds that it had when this command first heard of it."""

    cell: Cell
    status: Status = "waiting"
    error: str | None = None
    round: int = 0
    before: int | None = None
    metric: str | None = None
    value: float | None = None
    sparsity: float | None = None
    total_bytes: float | None = None
    started: float = math.nan
    seconds: float = 0.0


class Board:
    """Shows the cells of a sweep, as a context manager.

    kind: as `tracker.progress`: "live" is a board that updates itself, "plain" one line per start and end with a
    summary, "none" prints nothing at all; "auto" is "live" in a terminal and "plain" elsewhere.
    title: one line that names the sweep. console: where to print; None is standard output.
    clock: seconds that only grow.
    """

    def __init__(
        self,
        kind: Mode,
        cells: Sequence[Cell],
        title: str = "",
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ConfigError if `kind` is none of the four."""
        if kind not in get_args(Mode):
            raise ConfigError(f"tracker.progress={kind!r} is unknown: use one of {', '.join(get_args(Mode))}.")
        if kind != "none" and console is None:
            from rich.console import Console

            console = Console()
        if kind == "auto" and console is not None:
            kind = "live" if console.is_terminal and not console.is_dumb_terminal else "plain"
        self.kind = kind
        self._console = console if kind != "none" else None
        self._clock = clock
        self._states = {cell.id: _State(cell) for cell in cells}
        self._title = title or "sweep"
        self._began = clock()
        self._first_start: float | None = None
        self._skips_said = 0
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._began = self._clock()
        if self._console is not None and self.kind == "live":
            from rich.live import Live

            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=REFRESHES_PER_SECOND,
                vertical_overflow="crop",
            )
            self._live.start()
        else:
            self._print(f"{self._title}: {_count(len(self._states), 'cell')}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()
        self._say_skips()
        self._print("")
        for line in self.summary():
            self._print(line)

    # -- what happens ----------------------------------------------------------------------------------------------

    def started(self, cell: Cell) -> None:
        """A cell starts, or starts again after it failed."""
        state, now = self._of(cell), self._clock()
        state.status, state.error, state.started = "running", None, now
        if self._first_start is None:
            self._first_start = now
        self._say_skips()
        if self.kind == "plain":
            self._print(f"{self._ended():>4}/{len(self._states)}  started  {cell.label}")

    def row(self, cell: Cell, row: Mapping[str, Any]) -> None:
        """A cell finished a round; keys are metric names, and all but `round` may be absent."""
        state = self._of(cell)
        if state.before is None:
            state.before = max(row["round"] - 1, 0)
        self._take(state, row)

    def ended(self, cell: Cell, status: Status, error: str | None = None) -> None:
        """A cell is over. error: the sentence of one that failed."""
        if status not in ENDED:
            raise ValueError(f"a cell ends {', '.join(ENDED)}, and not {status!r}")
        state = self._of(cell)
        state.status, state.error = status, error
        if not math.isnan(state.started):
            state.seconds += self._clock() - state.started
            state.started = math.nan
        if status in ("done", "skipped") and state.total_bytes is None:
            # Finished before, or by a process that told nothing: its folder knows.
            last = _last_row(Path(cell.folder))
            if last is not None:
                state.before = last["round"]
                self._take(state, last)
        if status == "skipped":
            return
        self._say_skips()
        if self.kind == "plain":
            text = f"{self._ended():>4}/{len(self._states)}  {status:<7}  {cell.label}"
            told = [f"{_short(state.metric)} {_metric_text(state.value)}"] if state.value is not None else []
            told += [f"{state.total_bytes / 1e6:,.3f} MB"] if state.total_bytes is not None else []
            told += [f"{format_seconds(state.seconds)}"]
            if status == "done":
                text += f"  ({', '.join(told)})"
            if error:
                text += f": {_one_line(error)} ({cell.folder})"
            self._print(text + f"  {self.forecast()}")

    def note(self, text: str) -> None:
        """Print a line of text; it stays above the live board."""
        self._print(text)

    # -- what is known ---------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Cells by status; every status is there."""
        found = Counter(state.status for state in list(self._states.values()))
        return {status: found[status] for status in get_args(Status)}

    def front(self) -> list[Point]:
        """The finished cells of accuracy against megabytes that no other beats."""
        return front(
            Point(label=state.cell.label, metric=state.metric, value=state.value, total_bytes=state.total_bytes)
            for state in list(self._states.values())
            if state.status in ("done", "skipped")
            and state.metric is not None
            and state.value is not None
            and state.total_bytes is not None
        )

    def remaining_s(self) -> float | None:
        """Seconds that are left if rounds go on being finished as fast as since the first cell started; None before
        the first round. Starting and ending runs is in it, because it was in the time that has passed."""
        states = list(self._states.values())
        done = sum(state.round - (state.before or 0) for state in states if state.before is not None)
        left = sum(
            max(state.cell.rounds - state.round, 0) for state in states if state.status in ("waiting", "running")
        )
        if not left:
            return 0.0
        if self._first_start is None or done <= 0:
            return None
        return left * (self._clock() - self._first_start) / done

    def forecast(self) -> str:
        """The remaining time as text; says so while no cell has come to its end."""
        seconds = self.remaining_s()
        if seconds is None:
            return "ETA: after the first round"
        if self.counts()["done"] or not seconds:
            return f"ETA {format_seconds(seconds)}"
        return f"ETA {format_seconds(seconds)} (rough: no cell has ended yet)"

    def summary(self) -> list[str]:
        """What the sweep came to, as lines: counts and the front. What failed was said when it did."""
        counts = self.counts()
        parts = [
            f"{counts[name]} {name}" for name in ("done", "skipped", "failed", "interrupted", "running", "waiting")
        ]
        shown = [part for part in parts if not part.startswith("0 ")] or ["nothing to do"]
        took = format_seconds(self._clock() - self._began)
        lines = [f"{_count(len(self._states), 'cell')}: {', '.join(shown)}; {took}"]
        points = self.front()
        if points:
            lines.append(f"front of {_short(points[0].metric)} against MB:")
            width = max(len(point.label) for point in points)
            lines += [
                f"  {point.label:<{width}}  {_metric_text(point.value)}  {point.total_bytes / 1e6:,.3f} MB"
                for point in points
            ]
        return lines

    # -- inside ----------------------------------------------------------------------------------------------------

    def _of(self, cell: Cell) -> _State:
        if cell.id not in self._states:
            raise ValueError(f"the board has no cell {cell.id!r}")
        return self._states[cell.id]

    def _take(self, state: _State, row: Mapping[str, Any]) -> None:
        state.round = row["round"]
        metric = headline_metric(row)
        if metric is not None and row[metric] is not None:
            state.metric, state.value = metric, row[metric]
        for key, name in (("model/sparsity", "sparsity"), ("wire/total_bytes", "total_bytes")):
            if row.get(key) is not None:
                setattr(state, name, row[key])

    def _ended(self) -> int:
        return sum(state.status in ENDED for state in list(self._states.values()))

    def _say_skips(self) -> None:
        """One line for all that were skipped since the last one: a repeated command skips hundreds."""
        skipped = self.counts()["skipped"]
        if self.kind == "plain" and skipped > self._skips_said:
            self._print(f"{_count(skipped - self._skips_said, 'cell')} finished before")
            self._skips_said = skipped

    def _print(self, text: str) -> None:
        if self._console is not None:
            # No markup: brackets in a label are text, and a log file stays plain.
            self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        assert self._console is not None
        states = list(self._states.values())  # also called by the thread that refreshes the display
        running = [state for state in states if state.status == "running"]
        failed = [state for state in states if state.status == "failed"]
        points = self.front()
        counts = self.counts()
        elapsed = format_seconds(self._clock() - self._began)
        finished = counts["done"] + counts["skipped"]
        told = f"{finished} done, {counts['running']} running, {counts['failed']} failed, {counts['waiting']} waiting"
        if counts["interrupted"]:
            told += f", {counts['interrupted']} interrupted"
        share = [min(s.round / max(s.cell.rounds, 1), 1.0) if s.status not in ENDED else 1.0 for s in states]

        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=max(len(states), 1), completed=sum(share), width=30),
            Text(f"{elapsed} elapsed, {self.forecast()}", no_wrap=True, overflow="ellipsis"),
        )
        room = max(self._console.height - _LINES_AROUND, 3)
        width = min(max(self._console.width - 4 * (_NUMBER_WIDTH + 1) - 1, 12), LABEL_WIDTH)
        failed_room = min(len(failed), FAILED_LINES, max(room // 4, 1))
        front_room = min(len(points), FRONT_LINES, max(room // 3, 1))
        running_room = max(room - failed_room - front_room, 1)

        parts: list[RenderableType] = [Text(f"{self._title}: {told}", "bold", no_wrap=True, overflow="ellipsis"), bar]
        if running:
            shown = running[-running_room:]
            metric = next((_short(state.metric) for state in shown if state.metric), "metric")
            table = _plain_table(("running", "round", metric, "sparsity", "MB"), width)
            for state in shown:
                table.add_row(
                    _cut(state.cell.label, width),
                    f"{state.round}/{state.cell.rounds}",
                    _metric_text(state.value),
                    _ABSENT if state.sparsity is None else f"{state.sparsity:.4f}",
                    _ABSENT if state.total_bytes is None else f"{state.total_bytes / 1e6:,.3f}",
                )
            parts += [Text(""), table, *_more(len(running) - len(shown), "running")]
        if points:
            best = points[-front_room:]
            metric = _short(points[0].metric)
            table = _plain_table((f"front of {metric} against MB", "", metric, "", "MB"), width)
            for point in best:
                sent = f"{point.total_bytes / 1e6:,.3f}"
                table.add_row(_cut(point.label, width), "", _metric_text(point.value), "", sent)
            parts += [Text(""), table, *_more(len(points) - len(best), "with fewer MB")]
        if failed:
            parts += [Text(""), Text("failed", "bold red")]
            for state in failed[-failed_room:]:
                text = f"{_cut(state.cell.label, width)}: {_one_line(state.error)}"
                parts.append(Text(text, no_wrap=True, overflow="ellipsis"))
            parts += _more(len(failed) - failed_room, "failed")
        return Group(*parts)


def _plain_table(titles: Sequence[str], label_width: int) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, title in enumerate(titles):
        first = index == 0
        table.add_column(
            Text(title, no_wrap=True, overflow="ellipsis"),
            justify="left" if first else "right",
            no_wrap=True,
            overflow="ellipsis",
            width=label_width if first else _NUMBER_WIDTH,
        )
    return table


def _more(count: int, what: str) -> list[Any]:
    from rich.text import Text

    return [Text(f"and {count} more {what}", "dim")] if count > 0 else []


def _last_row(folder: Path) -> dict[str, Any] | None:
    """The last finished row of a run; None where there is none. Hundreds of cells are looked at: only the end is
    read."""
    try:
        with (folder / ROUNDS_FILE).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - TAIL_BYTES, 0))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # torn, or cut by where the reading began
        if isinstance(row, dict) and type(row.get("round")) is int:
            return row
    return None


def _short(metric: str | None) -> str:
    return (metric or "metric").removeprefix("test/").replace("client/", "clients' ")


def _metric_text(value: float | None) -> str:
    if value is None:
        return _ABSENT
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}"


def _cut(label: str, width: int) -> str:
    return label if len(label) <= width else label[: width - 3] + "..."


def _one_line(text: str | None) -> str:
    return " ".join((text or "no reason given").split())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
