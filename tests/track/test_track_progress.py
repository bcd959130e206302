"""Laws of the display."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable
from typing import Any

import pytest
from rich.console import Console

from fedray.errors import ConfigError
from fedray.track.progress import Progress, format_seconds, headline_metric, summary_lines


def rows_to(last: int, first: int = 1) -> list[dict[str, Any]]:
    """Rounds of one second; every second one is evaluated."""
    rows = []
    for number in range(first, last + 1):
        row = {
            "round": number,
            "train/loss": 2.3 / number,
            "model/sparsity": 0.875,
            "wire/up_params": 1000,
            "wire/down_params": 2000,
            "wire/up_bytes": 1_500_000,
            "wire/down_bytes": 3_000_000,
            "time/round_s": 1.0,
        }
        if number % 2 == 0:
            row |= {"test/accuracy": 0.9, "test/loss": 0.4}
        rows.append(row)
    return rows


def shown(
    mode: str, rows: Iterable[dict[str, Any]], *, rounds: int = 100, terminal: bool = False, height: int = 24
) -> str:
    """The text that a console of width 80 holds at the end, without the codes of a terminal."""
    file = io.StringIO()
    console = Console(file=file, width=80, height=height, force_terminal=terminal, color_system=None)
    with Progress(mode, rounds, "a title [with brackets]", console) as progress:  # type: ignore[arg-type]
        for row in rows:
            progress.row(row)
    # In a terminal the last frame is what comes after the last move of the cursor to the first line.
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue().split("\x1b[2K")[-1])


def test_plain_prints_one_aligned_line_per_round() -> None:
    lines = shown("plain", rows_to(3)).splitlines()
    assert lines[0] == "a title [with brackets]"
    assert re.split(r"  +", lines[1].strip()) == "round,accuracy,train loss,sparsity,MB up,MB down,s/round,ETA".split(
        ","
    )
    assert lines[2].split() == ["1/100", "-", "2.3000", "0.8750", "1.500", "3.000", "1.00", "1:39"]
    assert lines[3].split() == ["2/100", "0.9000", "1.1500", "0.8750", "1.500", "3.000", "1.00", "1:38"]
    assert len(lines) == 5
    assert len({len(line) for line in lines[1:]}) == 1, "all lines are equally wide"


def test_plain_repeats_its_header_every_20_rows() -> None:
    lines = shown("plain", rows_to(45)).splitlines()[1:]
    assert [index for index, line in enumerate(lines) if "accuracy" in line] == [0, 21, 42]


@pytest.mark.parametrize("rounds", [5, 100, 10_000])
@pytest.mark.parametrize("mode", ["plain", "live"])
def test_nothing_is_cut_off_at_80_columns(mode: str, rounds: int) -> None:
    row = {
        **rows_to(2)[1],
        "round": rounds,
        "train/loss": 12.5,
        "wire/up_bytes": 123_456_789_012,
        "wire/down_bytes": 99_999_000,
        "time/round_s": 1234.5,
    }
    text = shown(mode, [row], rounds=rounds, terminal=mode == "live")
    assert max(map(len, text.splitlines())) <= 80
    for value in ("ETA", f"{rounds}/{rounds}", "0.9000", "12.5000", "0.8750", "123457", "99.999", "1234.50", "0:00"):
        assert value in text
    assert "…" not in text


def test_plain_writes_no_terminal_codes_and_flushes_every_line() -> None:
    class Pipe(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    pipe = Pipe()
    with Progress("plain", 10, "title", Console(file=pipe, force_terminal=True)) as progress:
        progress.note("[bold]note[/bold] :warning: 17")
        for row in rows_to(3):
            progress.row(row)
            assert pipe.flushed.splitlines()[-1].strip().startswith(f"{row['round']}/10")
    assert "\x1b" not in pipe.getvalue()
    assert "[bold]note[/bold] :warning: 17\n" in pipe.getvalue()


def test_auto_is_live_in_a_terminal_and_plain_elsewhere() -> None:
    def mode(**settings: Any) -> str:
        return Progress("auto", 1, "", Console(file=io.StringIO(), **settings)).mode

    assert mode(force_terminal=True, _environ={"TERM": "xterm"}) == "live"
    assert mode(force_terminal=True, _environ={"TERM": "dumb"}) == "plain"
    assert mode(force_terminal=False) == "plain"


def test_none_prints_nothing() -> None:
    file = io.StringIO()
    with Progress("none", 10, "title", Console(file=file, force_terminal=True)) as progress:
        progress.note("note")
        progress.row(rows_to(1)[0])
        progress.summary([("a", "b")])
    assert file.getvalue() == ""


def test_an_unknown_mode_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"tracker\.progress='loud'.*auto, live, plain, none"):
        Progress("loud", 1, "")  # type: ignore[arg-type]


def test_live_keeps_the_first_row_and_the_last_ones() -> None:
    text = shown("live", rows_to(40), terminal=True)
    assert re.findall(r"(\d+)/100", text) == ["1", *(str(number) for number in range(26, 41))]
    assert "⋮" in text
    assert "40 of 100 rounds" in text


def test_live_fits_a_low_terminal() -> None:
    text = shown("live", rows_to(40), terminal=True, height=14)
    assert re.findall(r"(\d+)/100", text) == ["1", "36", "37", "38", "39", "40"]
    assert len(text.splitlines()) < 14


def test_live_does_not_redraw_for_every_row_of_a_fast_run() -> None:
    file = io.StringIO()
    with Progress("live", 500, "title", Console(file=file, width=80, height=24, force_terminal=True)) as progress:
        for row in rows_to(500):
            progress.row(row)
    assert file.getvalue().count("title") < 100
    assert "500/500" in file.getvalue().split("\x1b[2K")[-1], "the last row is shown in the end all the same"


def test_an_error_in_the_block_gives_the_cursor_back() -> None:
    file = io.StringIO()
    with (
        pytest.raises(KeyboardInterrupt),
        Progress("live", 5, "title", Console(file=file, force_terminal=True)),
    ):
        raise KeyboardInterrupt
    assert file.getvalue().rstrip().endswith("\x1b[?25h")


def test_the_accuracy_column_shows_the_metric_that_the_task_has() -> None:
    assert (
        headline_metric({"test/loss": 1.0, "test/accuracy_after_prune": 0.4, "test/perplexity": 7.0})
        == "test/perplexity"
    )
    assert headline_metric({"test/mse": 1.0, "test/accuracy": 0.5}) == "test/accuracy"
    assert headline_metric({"test/loss": 1.0, "train/loss": 0.5}) is None
    text = shown("plain", [{"round": 1}, {"round": 2, "test/loss": 2.0, "test/perplexity": 123.456}])
    assert text.splitlines()[-2].split()[1] == "perplexity"
    assert text.splitlines()[-1].split()[1] == "123.5"


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_value_that_is_not_finite_or_absent_shows_a_dash(value: float | None) -> None:
    row = {"round": 1, "test/accuracy": value, "wire/up_bytes": value, "time/round_s": value}
    assert shown("plain", [row]).splitlines()[-1].split() == ["1/100", *"-------"]


def test_the_remaining_time_follows_recent_rounds() -> None:
    slow_then_fast = [{**row, "time/round_s": 100.0 if row["round"] <= 10 else 2.0} for row in rows_to(20)]
    assert shown("plain", slow_then_fast, rounds=50).splitlines()[-1].split()[-1] == "1:00"
    # A resumed run begins in the middle, and its first row already knows what is left.
    assert shown("plain", rows_to(91, first=91)).splitlines()[-1].split()[-1] == "0:09"


def test_seconds_are_shown_as_clocks() -> None:
    assert [format_seconds(value) for value in (0.2, 59.6, 3599, 3600, 90_061)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "25:01:01",
    ]


def test_the_summary_sets_what_was_sent_beside_the_dense_equivalent() -> None:
    lines = dict(summary_lines(rows_to(5), dense_bytes_up=75_000_000, dense_bytes_down=15_000_000))
    assert lines["rounds"] == "5"
    assert lines["final accuracy"] == "0.9000 (round 4)", "the last evaluation is named where it is not the last round"
    assert lines["final sparsity"] == "0.8750"
    assert lines["parameters up"] == "5,000"
    assert lines["parameters down"] == "10,000"
    assert lines["MB up"] == "7.50 of 75.00 dense, 10.00 times less"
    assert lines["MB down"] == "15.00 of 15.00 dense"
    assert lines["MB both ways"] == "22.50 of 90.00 dense, 4.00 times less"
    assert lines["time"] == "0:05 (1.00 s per round)"
    more = dict(summary_lines(rows_to(5), dense_bytes_up=3_750_000, dense_bytes_down=0))
    assert more["MB up"] == "7.50 of 3.75 dense, 2.00 times more"
    assert more["MB down"] == "15.00 of 0.0000 dense"


def test_the_summary_leaves_out_what_was_not_measured_and_names_what_is_not_finite() -> None:
    assert summary_lines([], dense_bytes_up=0, dense_bytes_down=0) == []
    assert summary_lines([{"round": 3, "test/accuracy": None}], dense_bytes_up=0, dense_bytes_down=0) == [
        ("rounds", "3"),
        ("final accuracy", "not finite"),
    ]


def test_the_summary_is_printed_below_the_last_frame() -> None:
    file = io.StringIO()
    with Progress("live", 3, "title", Console(file=file, width=80, force_terminal=True)) as progress:
        for row in rows_to(3):
            progress.row(row)
        progress.summary([("MB up", "1"), ("accuracy", "0.9")])
    assert file.getvalue().endswith("\nMB up     1\naccuracy  0.9\n")
