"""The display of a run: a live table in a terminal, plain lines elsewhere. Runs in the main process.

It only shows the rows it is handed; what it shows is rounded, and the exact values are in the run directory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from fedray.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

Mode = Literal["auto", "live", "plain", "none"]

ROWS_PER_HEADER = 20
"""Plain lines between two headers."""

RECENT_ROWS = 15
"""Rows at the end of the live table; the first row of the run stays above them."""

LIVE_REFRESHES_PER_SECOND = 2.0

ROUNDS_PER_ESTIMATE = 10
"""The remaining time is worked out from the mean of so many recent rounds."""

_LINES_AROUND_ROWS = 9
"""Lines of the live table that are no recent rows: title, header, rule, first row, gap, bar, spaces, prompt."""

_ABSENT = "-"


class Progress:
    """Shows rows one at a time, as a context manager.

    mode:    "live" is a table that updates itself, "plain" one line per round, "none" prints nothing at all (notes
             and summary included); "auto" is "live" in a terminal and "plain" elsewhere.
    rounds:  how many rounds the run has; they are numbered from 1.
    title:   one line that names the run.
    console: where to print; None is standard output.
    """

    def __init__(self, mode: Mode, rounds: int, title: str, console: Console | None = None) -> None:
        """Raises ConfigError if `mode` is none of the four."""
        if mode not in get_args(Mode):
            raise ConfigError(f"tracker.progress={mode!r} is unknown: use one of {', '.join(get_args(Mode))}.")
        self._columns = _Columns(rounds)
        self._rounds = rounds
        self._title = title
        self._started = time.monotonic()
        self._refreshed = -math.inf
        self._live: Live | None = None
        self._rows_since_header = 0
        self._header = ""
        # rich is imported only where something is shown: the driver needs no display.
        if mode != "none" and console is None:
            from rich.console import Console

            console = Console()
        if mode == "auto" and console is not None:
            mode = "live" if console.is_terminal and not console.is_dumb_terminal else "plain"
        self.mode = mode
        self._console = console if mode != "none" else None

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self._console is not None and self.mode == "live":
            from rich.live import Live

            self._live = Live(
                console=self._console,
                get_renderable=self._table,
                refresh_per_second=LIVE_REFRESHES_PER_SECOND,
                vertical_overflow="crop",
            )
            self._live.start()
        elif self.mode == "plain":
            self._print(self._title)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def row(self, row: Mapping[str, Any]) -> None:
        """Show the row of a round; keys are metric names, and all but `round` may be absent."""
        self._columns.add(row)
        if self._live is not None:
            # Rounds can be faster than the eye: what is not shown now is shown by the next refresh, or at the end.
            if time.monotonic() - self._refreshed > 1 / (5 * LIVE_REFRESHES_PER_SECOND):
                self._live.refresh()
                self._refreshed = time.monotonic()
        elif self.mode == "plain":
            header = self._columns.line(self._columns.titles())
            if header != self._header or self._rows_since_header == ROWS_PER_HEADER:
                self._print(header)
                self._header, self._rows_since_header = header, 0
            self._print(self._columns.line(self._columns.cells(*self._columns.rows[-1])))
            self._rows_since_header += 1

    def note(self, text: str) -> None:
        """Print a line of text; it stays above the live table."""
        self._print(text)

    def summary(self, lines: Sequence[tuple[str, str]]) -> None:
        """Print the names and values that `summary_lines` returns, as two columns below the rows."""
        self._stop()
        width = max((len(name) for name, _ in lines), default=0)
        self._print("")
        for name, value in lines:
            self._print(f"{name:<{width}}  {value}")

    def _stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _print(self, text: str) -> None:
        if self._console is not None:
            # No markup and no colours of rich's own: brackets in a title are text, and a log file stays plain. rich
            # flushes after every print, so that the lines do not wait in the buffer of a pipe.
            self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _table(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        assert self._console is not None
        columns = self._columns
        rows = columns.rows[:]  # Also called by the thread that refreshes the display, while rows are added.
        room = max(1, min(RECENT_ROWS, self._console.height - _LINES_AROUND_ROWS))
        gap, rule = ("...", "-") if self._console.options.ascii_only else ("⋮", "─")
        header = columns.line(columns.titles())
        lines = [(self._title, "bold"), ("", ""), (header, "bold"), (rule * len(header), "dim")]
        if len(rows) > room + 1:
            lines += [(columns.line(columns.cells(*rows[0])), "dim"), (gap.rjust(columns.widths()[0]), "dim")]
            rows = rows[-room:]
        lines += [(columns.line(columns.cells(*row)), "") for row in rows[:-1]]
        lines += [(columns.line(columns.cells(*row)), "bold") for row in rows[-1:]]

        done = rows[-1][0]["round"] if rows else 0
        elapsed = format_seconds(time.monotonic() - self._started)
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=max(self._rounds, 1), completed=done, width=30),
            Text(f"{done} of {self._rounds} rounds, {elapsed} elapsed", no_wrap=True),
        )
        texts = [Text(line, style=style, no_wrap=True, overflow="ellipsis") for line, style in lines]
        return Group(*texts, Text(""), bar)


class _Columns:
    """The columns of the display, and the rows they were filled from."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.rows: list[tuple[Mapping[str, Any], float | None]] = []  # with the remaining time in seconds
        self._metric: str | None = None
        self._loss: str | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        # Once shown, a column keeps its meaning, except that accuracy and the training loss win: they come first
        # in the second row where the first one is that of the model before training.
        if self._metric != "test/accuracy":
            self._metric = headline_metric(row) or self._metric
        if self._loss != "train/loss":
            self._loss = next((key for key in ("train/loss", "test/loss") if key in row), self._loss)
        recent = [*(shown for shown, _ in self.rows[1 - ROUNDS_PER_ESTIMATE :]), row]
        seconds = [value for value in (_number(shown, "time/round_s") for shown in recent) if value is not None]
        self.rows.append((row, fmean(seconds) * max(self.rounds - row["round"], 0) if seconds else None))

    def titles(self) -> list[str]:
        metric = _title(self._metric or "test/accuracy")
        loss = (self._loss or "train/loss").replace("/", " ")
        return ["round", metric, loss, "sparsity", "MB up", "MB down", "s/round", "ETA"]

    def widths(self) -> list[int]:
        """Characters; with a gap of two between columns the line has at most 79 unless the metric's name is long."""
        metric = max(8, len(self.titles()[1]))
        return [max(5, 2 * len(str(self.rounds)) + 1), metric, 10, 8, 7, 7, 7, 7]

    def cells(self, row: Mapping[str, Any], remaining_s: float | None) -> list[str]:
        return [
            f"{row['round']}/{self.rounds}",
            _metric_text(_number(row, self._metric)),
            _metric_text(_number(row, self._loss)),
            _text(_number(row, "model/sparsity"), "{:.4f}"),
            _megabytes_text(_number(row, "wire/up_bytes")),
            _megabytes_text(_number(row, "wire/down_bytes")),
            _text(_number(row, "time/round_s"), "{:.2f}"),
            _ABSENT if remaining_s is None else format_seconds(remaining_s),
        ]

    def line(self, cells: Sequence[str]) -> str:
        return "  ".join(cell.rjust(width) for cell, width in zip(cells, self.widths(), strict=True))


def summary_lines(
    rows: Sequence[Mapping[str, Any]], *, dense_bytes_up: float, dense_bytes_down: float
) -> list[tuple[str, str]]:
    """Names and values that sum up a run: final metric, sparsity, and what was sent beside the dense equivalent.

    rows: all rows of the run, as `read_rows` returns them; what no row has is left out.
    dense_bytes_up, dense_bytes_down: bytes that the same transfers would have cost with every parameter as float32,
    over the whole run.
    """
    lines = []
    if rows:
        lines.append(("rounds", str(rows[-1]["round"])))
    metric = next((key for key in map(headline_metric, reversed(rows)) if key is not None), None)
    for key, name in ((metric, None), ("test/loss", None), ("model/sparsity", "sparsity")):
        last = next((row for row in reversed(rows) if key is not None and key in row), None)
        if key is None or last is None:
            continue
        value = _number(last, key)
        text = "not finite" if value is None else f"{value:.4f}" if name else _metric_text(value)
        if last["round"] != rows[-1]["round"]:
            text += f" (round {last['round']})"
        lines.append((f"final {name or key.removeprefix('test/')}", text))
    for way, dense_bytes in (("up", dense_bytes_up), ("down", dense_bytes_down)):
        params, sent_bytes = _total(rows, f"wire/{way}_params"), _total(rows, f"wire/{way}_bytes")
        if params is not None:
            lines.append((f"parameters {way}", f"{params:,.0f}"))
        if sent_bytes is not None:
            lines.append((f"MB {way}", _against_dense(sent_bytes, dense_bytes)))
    up, down = _total(rows, "wire/up_bytes"), _total(rows, "wire/down_bytes")
    if up is not None and down is not None:
        lines.append(("MB both ways", _against_dense(up + down, dense_bytes_up + dense_bytes_down)))
    for key in rows[-1] if rows else ():
        if key.startswith("target/") and key.endswith("/rounds"):
            at = key.removesuffix("rounds")
            sent = f"{_number(rows[-1], f'{at}bytes') or 0:,.0f} bytes, {_number(rows[-1], f'{at}seconds') or 0:.1f} s"
            lines.append((f"reached {at.split('/')[1]}", f"after {rows[-1][key]} rounds, {sent}"))
    seconds = _total(rows, "time/round_s")
    if seconds is not None:
        count = sum(_number(row, "time/round_s") is not None for row in rows)
        lines.append(("time", f"{format_seconds(seconds)} ({seconds / count:.2f} s per round)"))
    return lines


def headline_metric(row: Mapping[str, Any]) -> str | None:
    """The key of the row's main metric: test/accuracy, else the first test/* that is no loss and no accuracy, else the
    mean over the clients' own models."""
    if "test/accuracy" in row:
        return "test/accuracy"
    others = (key for key in row if key.startswith("test/"))
    found = next((key for key in others if key != "test/loss" and not key.startswith("test/accuracy_")), None)
    clients = (key for key in row if key.startswith("client/") and key.endswith("_mean"))
    return found or next((key for key in clients if not key.startswith(("client/global_", "client/sparsity"))), None)


def _title(key: str) -> str:
    """A metric as a column shows it: `client/accuracy_mean` as "clients' mean"."""
    return "clients' mean" if key.startswith("client/") else key.removeprefix("test/")


def format_seconds(seconds: float) -> str:
    """Seconds as m:ss, or as h:mm:ss from an hour on."""
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"


def _number(row: Mapping[str, Any], key: str | None) -> float | None:
    """The finite value under `key`; None if it is absent or not finite."""
    value = row[key] if key is not None and key in row else None
    return value if value is not None and math.isfinite(value) else None


def _total(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [value for value in (_number(row, key) for row in rows) if value is not None]
    return sum(values) if values else None


def _text(value: float | None, template: str) -> str:
    return _ABSENT if value is None else template.format(value)


def _metric_text(value: float | None) -> str:
    if value is None:
        return _ABSENT
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}" if abs(value) < 1e6 else f"{value:.2e}"


def _megabytes_text(count_bytes: float | None) -> str:
    """Bytes as megabytes of 1e6 bytes, in at most 7 characters below 10 TB."""
    if count_bytes is None:
        return _ABSENT
    megabytes = count_bytes / 1e6
    return f"{megabytes:.3f}" if megabytes < 100 else f"{megabytes:.1f}" if megabytes < 10_000 else f"{megabytes:.0f}"


def _against_dense(sent_bytes: float, dense_bytes: float) -> str:
    text = f"{_megabytes_sum(sent_bytes)} of {_megabytes_sum(dense_bytes)} dense"
    # A frame's few bytes are no news: "1.00 times more" would say nothing.
    if sent_bytes <= 0 or dense_bytes <= 0 or round(sent_bytes / dense_bytes, 2) == 1.0:
        return text
    if sent_bytes < dense_bytes:
        return f"{text}, {dense_bytes / sent_bytes:.2f} times less"
    return f"{text}, {sent_bytes / dense_bytes:.2f} times more"


def _megabytes_sum(count_bytes: float) -> str:
    megabytes = count_bytes / 1e6
    return f"{megabytes:,.2f}" if megabytes >= 1 else f"{megabytes:.4f}"
