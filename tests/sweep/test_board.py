"""The board shows what it is told, in a terminal and out of one."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedray.errors import ConfigError
from fedray.track.board import Board, Cell, Point, front, lower_is_better

HERE = Path("/nowhere")


def cells(count: int, rounds: int = 10) -> list[Cell]:
    return [Cell(id=f"id{n}", label=f"cell [{n}]", folder=HERE / f"cell-{n}", rounds=rounds) for n in range(count)]


def row(round: int, accuracy: float = 0.5, megabytes: float = 1.0) -> dict[str, Any]:
    return {
        "round": round,
        "test/accuracy": accuracy,
        "model/sparsity": 0.875,
        "wire/total_bytes": megabytes * 1e6,
    }


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(width: int = 200) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=width, force_terminal=False), file


def live_text(board: Board, width: int = 100, height: int = 30) -> str:
    """The board as it stands in a terminal of this size."""
    file = io.StringIO()
    console = Console(file=file, width=width, height=height, force_terminal=True, color_system=None)
    board._console = console
    console.print(board._render())
    return file.getvalue()


def test_plain_prints_one_line_for_each_start_and_each_end() -> None:
    console, file = plain()
    clock = Clock()
    one, two, three = cells(3)
    with Board("plain", [one, two, three], "a sweep", console=console, clock=clock) as board:
        for cell, status in ((one, "done"), (two, "failed"), (three, "done")):
            board.started(cell)
            clock.now += 5
            board.row(cell, row(10, 0.75, 2.5))
            board.ended(cell, status, "it broke\nin two" if status == "failed" else None)  # type: ignore[arg-type]
    lines = file.getvalue().split("\n\n")[0].splitlines()
    assert lines[0] == "a sweep: 3 cells"
    assert [re.split(r"  +", line.strip())[:3] for line in lines[1:]] == [
        ["0/3", "started", "cell [0]"],
        ["1/3", "done", "cell [0]"],
        ["1/3", "started", "cell [1]"],
        ["2/3", "failed", f"cell [1]: it broke in two ({HERE}/cell-1)"],
        ["2/3", "started", "cell [2]"],
        ["3/3", "done", "cell [2]"],
    ]
    assert "accuracy 0.7500, 2.500 MB, 0:05" in lines[2]


def test_the_summary_counts_every_cell_and_shows_the_front() -> None:
    console, file = plain()
    all_cells = cells(6)
    with Board("plain", all_cells, console=console) as board:
        for cell, accuracy, megabytes in zip(all_cells, (0.6, 0.8, 0.7), (1.0, 2.0, 3.0), strict=False):
            board.started(cell)
            board.row(cell, row(10, accuracy, megabytes))
            board.ended(cell, "done")
        board.started(all_cells[3])
        board.ended(all_cells[4], "failed", "no")
    said = file.getvalue()
    assert "6 cells: 3 done, 1 failed, 1 running, 1 waiting" in said
    assert [line.split() for line in said.splitlines()[-2:]] == [
        ["cell", "[0]", "0.6000", "1.000", "MB"],
        ["cell", "[1]", "0.8000", "2.000", "MB"],
    ]


def test_cells_that_were_finished_before_are_one_line_and_on_the_front(tmp_path: Path) -> None:
    found = [Cell(id=str(n), label=f"cell {n}", folder=tmp_path / str(n), rounds=10) for n in range(300)]
    for cell in found[:2]:
        cell.folder.mkdir()
        lines = [row(9, 0.1), row(10, 0.9 - 0.1 * int(cell.id), 3.0 - int(cell.id))]
        torn = '{"round": 11, "test/acc'
        (cell.folder / "rounds.jsonl").write_text("\n".join([*map(json.dumps, lines), torn]))
    console, file = plain()
    with Board("plain", found, console=console) as board:
        for cell in found[:-1]:
            board.ended(cell, "skipped")
        board.started(found[-1])
        assert [(point.label, point.value) for point in board.front()] == [("cell 1", 0.8), ("cell 0", 0.9)]
    assert file.getvalue().splitlines()[1] == "299 cells finished before"
    assert file.getvalue().splitlines()[2].split() == ["299/300", "started", "cell", "299"]


def brute_front(points: list[Point]) -> set[tuple[float, float]]:
    """By the definition: nobody is at least as good in both and better in one."""
    return {
        (p.value, p.total_bytes)
        for p in points
        if not any(
            q.value >= p.value
            and q.total_bytes <= p.total_bytes
            and (q.value, q.total_bytes) != (p.value, p.total_bytes)
            for q in points
        )
    }


def test_the_front_is_what_its_definition_says() -> None:
    import random

    generator = random.Random(5)
    for _ in range(300):
        points = [
            Point(
                label=str(n),
                metric="test/accuracy",
                value=generator.randint(0, 6) / 10,
                total_bytes=float(generator.randint(1, 6)),
            )
            for n in range(generator.randint(0, 14))
        ]
        found = front(points)
        assert {(p.value, p.total_bytes) for p in found} == brute_front(points)
        assert [p.total_bytes for p in found] == sorted(p.total_bytes for p in found)


def test_equal_points_are_all_on_the_front() -> None:
    points = [Point(label=name, metric="test/accuracy", value=0.5, total_bytes=1.0) for name in "ab"]
    assert [point.label for point in front(points)] == ["a", "b"]


def test_of_losses_the_smaller_is_better_and_what_is_not_finite_is_on_no_front() -> None:
    values = {"low": 0.1, "high": 0.9, "nan": float("nan")}
    points = [Point(label=name, metric="test/mse", value=value, total_bytes=1.0) for name, value in values.items()]
    assert [point.label for point in front(points)] == ["low"]
    assert lower_is_better("test/perplexity")
    assert not lower_is_better("client/accuracy_mean")


def test_the_remaining_time_follows_from_rounds_per_second_and_is_rough_until_a_cell_has_ended() -> None:
    clock = Clock()
    one, two = cells(2)
    board = Board("none", [one, two], clock=clock)
    assert board.forecast() == "ETA: after the first round"
    clock.now = 100.0
    board.started(one)
    for number in range(1, 6):
        clock.now += 2.0
        board.row(one, row(number))
    # 5 of 20 rounds in 10 s since the first start: 15 rounds are left.
    assert board.remaining_s() == pytest.approx(30.0)
    assert board.forecast() == "ETA 0:30 (rough: no cell has ended yet)"
    for number in range(6, 11):
        clock.now += 2.0
        board.row(one, row(number))
    board.ended(one, "done")
    assert board.forecast() == "ETA 0:20"


def test_rounds_that_were_there_before_do_not_make_a_sweep_look_fast() -> None:
    clock = Clock()
    (one,) = cells(1, rounds=100)
    board = Board("none", [one], clock=clock)
    board.started(one)
    clock.now = 4.0
    board.row(one, row(91))
    clock.now = 8.0
    board.row(one, row(92))
    assert board.remaining_s() == pytest.approx(8 * 4.0)


def test_cells_that_stopped_early_or_failed_have_nothing_left() -> None:
    clock = Clock()
    found = cells(3)
    board = Board("none", found, clock=clock)
    for cell, status in zip(found, ("done", "failed", "interrupted"), strict=True):
        board.started(cell)
        clock.now += 1.0
        board.row(cell, row(3))
        board.ended(cell, status)  # type: ignore[arg-type]
    assert board.remaining_s() == 0.0


def test_a_cell_that_is_tried_again_is_no_failure_any_more() -> None:
    (one,) = cells(1)
    board = Board("none", [one])
    board.started(one)
    board.ended(one, "failed", "no")
    board.started(one)
    assert board.counts()["failed"] == 0
    assert board.counts()["running"] == 1


@pytest.fixture
def busy() -> Board:
    """A sweep of 540 cells in the middle: 200 ended, 12 failed, 20 running."""
    found = cells(540)
    board = Board("none", found)
    for n, cell in enumerate(found[:232]):
        board.started(cell)
        board.row(cell, row(5, 0.5 + n / 1000, 1.0 + n / 100))
        if n < 200:
            board.ended(cell, "done")
        elif n < 212:
            board.ended(cell, "failed", f"sentence {n} " + "that goes on and on " * 20)
    return board


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 30), (200, 60), (40, 12)])
def test_the_live_board_fits_its_terminal_and_says_what_it_leaves_out(busy: Board, width: int, height: int) -> None:
    lines = live_text(busy, width, height).rstrip("\n").splitlines()
    assert max(map(len, lines)) <= width
    if height >= 24:
        assert len(lines) < height
        text = "\n".join(lines)
        assert "more running" in text or height == 60
        assert "failed" in text
        assert "front of accuracy against MB" in text
    if width >= 80:
        assert "200 done, 20 running, 12 failed, 308 waiting" in lines[0]


def test_the_live_board_names_running_and_failed_cells_as_they_are_written() -> None:
    one, two = cells(2)
    board = Board("none", [one, two], "sweep")
    board.started(one)
    board.row(one, row(3, 0.5, 1.5))
    board.started(two)
    board.ended(two, "failed", "model.width is -1; it must be at least 1")
    text = live_text(board)
    assert re.search(r"cell \[0\] +3/10 +0\.5000 +0\.8750 +1\.500", text)
    assert "cell [1]: model.width is -1; it must be at least 1" in text


def test_none_prints_nothing_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = cells(1)
    with Board("none", [one]) as board:
        board.started(one)
        board.note("a note")
        board.ended(one, "failed", "no")
    assert capsys.readouterr() == ("", "")


def test_out_of_a_terminal_auto_is_plain_and_in_one_it_is_live() -> None:
    console, _ = plain()
    assert Board("auto", [], console=console).kind == "plain"
    terminal = Console(file=io.StringIO(), force_terminal=True)
    assert Board("auto", [], console=terminal).kind == "live"


def test_live_draws_over_itself_and_leaves_the_summary() -> None:
    file = io.StringIO()
    console = Console(file=file, width=90, height=30, force_terminal=True, color_system=None)
    (one,) = cells(1)
    with Board("live", [one], "s", console=console) as board:
        board.started(one)
        board.row(one, row(10))
        board.ended(one, "done")
        board.note("a [note] in between")
    said = file.getvalue()
    assert "a [note] in between" in said
    assert "1 cell: 1 done" in said
    assert "\x1b[" in said


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tracker\.progress='loud' is unknown"):
        Board("loud", [])  # type: ignore[arg-type]
