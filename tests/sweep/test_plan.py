"""A plan says which cells there are, which are done, and what the others will take."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedray.errors import ConfigError
from fedray.sweep import plan as plan_room
from fedray.sweep.plan import CELL_SECONDS, START_SECONDS, Planned, Probe, forecast, planned, shape, wall_seconds

TINY = ("num_clients=4", "cohort=2", "rounds=3", "runtime=inline", "tracker.progress=none")
TINY += ("tracker.wandb.mode=disabled", "checkpoint.every=1", "trainer.epochs=1", "partition=iid")


def command(folder: Path, *overrides: str) -> Any:
    from fedray.cli import _composed_sweep

    return _composed_sweep([*TINY, *overrides, f"hydra.sweep.dir={folder}"], None)


def cells_of(folder: Path, *overrides: str) -> list[Planned]:
    found = command(folder, *overrides)
    return planned(found.requests, folder=found.folder, code_folder=None, force=found.force)


def run_one(cell: Planned, *, rounds: int | None = None) -> None:
    """Run a cell as a sweep would, in its folder; with fewer rounds it is as if it had been cut off."""
    from fedray.config import assemble
    from fedray.launch import execute

    assert cell.config is not None
    config = cell.config if rounds is None else {**cell.config, "rounds": rounds}
    execute(assemble(config, choices=cell.choices), cell.folder)


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of four cells: one done, one cut off after round 2, one failed, one not begun."""
    folder = tmp_path_factory.mktemp("sweep")
    done, cut, failed, _ = cells_of(folder, "seed=0,1,2,3")
    run_one(done)
    run_one(cut, rounds=2)
    for cell, status in ((cut, "running"), (failed, "failed")):
        if not cell.folder.is_dir():
            shutil.copytree(done.folder, cell.folder)
        path = cell.folder / "manifest.json"
        facts = json.loads(path.read_text())
        path.write_text(json.dumps({**facts, "status": status, "run_id": cell.id, "error": "it broke"}))
    return folder


def test_a_plan_knows_what_is_done_what_goes_on_and_what_is_repeated(half_done: Path) -> None:
    found = cells_of(half_done, "seed=0,1,2,3")
    assert [(cell.what, cell.left) for cell in found] == [("done", 0), ("go on", 1), ("repeat", 3), ("begin", 3)]
    assert "it broke" in found[2].why


def test_a_plan_writes_nothing(half_done: Path, tmp_path: Path) -> None:
    before = sorted((str(path), path.stat().st_mtime_ns) for path in half_done.rglob("*"))
    cells_of(half_done, "seed=0,1,2,3")
    assert sorted((str(path), path.stat().st_mtime_ns) for path in half_done.rglob("*")) == before
    cells_of(tmp_path / "new", "seed=0,1")
    assert not (tmp_path / "new").exists()


def test_the_ids_of_a_plan_are_those_of_the_runs(half_done: Path) -> None:
    done = cells_of(half_done, "seed=0,1,2,3")[0]
    assert json.loads((done.folder / "manifest.json").read_text())["run_id"] == done.id
    assert done.folder.name.endswith(done.id[:8])


def test_a_longer_sweep_goes_on_with_what_has_fewer_rounds(half_done: Path) -> None:
    (cell,) = [cell for cell in cells_of(half_done, "seed=0,1,2,3", "rounds=5") if cell.label == "seed=0"]
    assert (cell.what, cell.left) == ("go on", 2)


def test_with_force_everything_that_is_there_is_repeated_from_the_start(
    half_done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedray.cli import main

    found = cells_of(half_done, "seed=0,1,2,3", "hydra.launcher.force=true")
    assert [(cell.what, cell.left) for cell in found] == [("repeat", 3)] * 3 + [("begin", 3)]
    arguments = ["seed=0,1,2,3", f"hydra.sweep.dir={half_done}", "hydra.launcher.force=true"]
    assert main(["plan", "--no-probe", *TINY, *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 to do, 3 repeats; 12 rounds left"


def test_cells_that_are_the_same_run_are_one_however_they_are_written(tmp_path: Path) -> None:
    from fedray.cli import _composed_sweep

    (tmp_path / "sweep").mkdir()
    rows = ["{pruner: magnitude}", "{pruner: magnitude, pruner.sparsity: 0.8}", "{pruner: magnitude, rounds: 5}"]
    (tmp_path / "sweep" / "rows.yaml").write_text(f"zip: [{', '.join(rows)}]")
    tiny = [text for text in TINY if not text.startswith("rounds=")]
    found = _composed_sweep(["+sweep=rows", *tiny, f"hydra.sweep.dir={tmp_path / 's'}"], str(tmp_path))
    assert len(found.requests) == 3
    cells = planned(found.requests, folder=found.folder, code_folder=None)
    assert [(cell.rounds, cell.what) for cell in cells] == [(20, "begin"), (5, "begin")]
    assert cells[0].id == cells[1].id
    assert cells[0].folder != cells[1].folder


def test_the_command_prints_each_cell_and_how_many_are_left(
    half_done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedray.cli import main

    arguments = ["plan", "--no-probe", "-m", *TINY, "seed=0,1,2,3", f"hydra.sweep.dir={half_done}"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"4 cells in {half_done}"
    ids = [cell.id[:8] for cell in cells_of(half_done, "seed=0,1,2,3")]
    assert [line.split()[0] for line in lines[3:7]] == ids
    assert [line.split("/3")[0].split()[1:] for line in lines[3:7]] == [
        ["done", "3"],
        ["goes", "on", "2"],
        ["repeats", "0"],
        ["to", "do", "0"],
    ]
    assert lines[-1] == "1 done, 1 to do, 1 goes on, 1 repeats; 7 rounds left"


def test_a_cell_that_cannot_run_is_named_and_the_others_stay(tmp_path: Path) -> None:
    found = cells_of(tmp_path, "cohort=2,9")
    assert [cell.what for cell in found] == ["begin", "refused"]
    assert found[1].why.startswith("cohort is 9; it must be at most num_clients")


def test_what_only_the_model_or_the_data_refuse_is_refused_by_the_plan(tmp_path: Path) -> None:
    found = cells_of(tmp_path, "model=mlp,char_lstm")
    assert [cell.what for cell in found] == ["begin", "refused"]
    assert "model" in found[1].why


def test_where_every_cell_is_refused_for_one_reason_it_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cohort is 9; it must be at most num_clients"):
        cells_of(tmp_path, "cohort=9", "seed=0,1,2")


# -- what it costs ---------------------------------------------------------------------------------------------------


def test_cells_that_differ_in_the_seed_or_in_fractions_are_one_shape(tmp_path: Path) -> None:
    requests = command(tmp_path, "pruner=magnitude,random", "pruner.sparsity=0.5,0.9", "seed=0,1").requests
    shapes = [shape(request.config) for request in requests]
    assert len(set(shapes)) == 2
    assert shapes[0] == shapes[3]
    assert shapes[0] != shapes[4]


@pytest.mark.parametrize("change", ["cohort=3", "trainer.batch_size=5", "model=small_cnn", "wire=topk", "eval.every=2"])
def test_whole_numbers_and_names_make_another_shape(change: str, tmp_path: Path) -> None:
    (plain,), (other,) = command(tmp_path).requests, command(tmp_path, change).requests
    assert shape(plain.config) != shape(other.config)


def brute_wall(jobs: list[tuple[float, int]], cpus: int) -> float:
    """The same schedule by steps of time, without a queue."""
    now, waiting, running, last = 0.0, list(jobs), [], 0.0
    while waiting or running:
        while waiting and waiting[0][1] <= cpus - sum(width for _, width in running):
            seconds, width = waiting.pop(0)
            running.append((now + seconds, width))
        now = min(end for end, _ in running)
        last = max(last, now)
        running = [(end, width) for end, width in running if end > now]
    return last


def test_the_wall_time_is_that_of_cells_taken_in_order_as_they_fit() -> None:
    generator = random.Random(1)
    assert wall_seconds([], 4) == 0.0
    assert wall_seconds([(3.0, 1)] * 4, 2) == 6.0
    assert wall_seconds([(1.0, 2), (5.0, 1), (2.0, 1), (1.0, 2)], 2) == 7.0
    for _ in range(200):
        cpus = generator.randint(1, 5)
        jobs = [(float(generator.randint(1, 9)), generator.randint(1, cpus)) for _ in range(generator.randint(1, 12))]
        assert wall_seconds(jobs, cpus) == brute_wall(jobs, cpus)


def test_the_forecast_adds_the_rounds_that_are_left(half_done: Path) -> None:
    found = cells_of(half_done, "seed=0,1,2,3")
    assert found[0].config is not None
    probes = {shape(found[0].config): (Probe(seconds=2.0, cpu_s=1.5), "seed=1")}
    sum_up = forecast(found, probes, cpus=2)
    assert sum_up.cpu_s == pytest.approx((1 + 3 + 3) * 1.5 + 3 * CELL_SECONDS)
    # Two at once: the one with a round left and one with three, then the other.
    ends = wall_seconds([(rounds * 2.0 + CELL_SECONDS, 1) for rounds in (1, 3, 3)], 2)
    assert sum_up.wall_s == pytest.approx(START_SECONDS + ends)
    assert (sum_up.at_once, sum_up.probes["seed=1"][1]) == (2, 3)


def test_nothing_left_costs_nothing(half_done: Path) -> None:
    (done,) = cells_of(half_done, "seed=0")
    assert forecast([done], {}, cpus=2).wall_s == 0.0


def test_each_shape_is_measured_once_with_the_first_cell_that_has_something_left(
    half_done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def probe(assembly: Any) -> Probe:
        seen.append(assembly.spec.seed)
        return Probe(seconds=5.0, cpu_s=5.0)

    monkeypatch.setattr(plan_room, "probe", probe)
    probes = plan_room.measure(cells_of(half_done, "seed=0,1,2,3"), code_folder=None, tell=lambda _: None)
    assert (len(probes), seen) == (1, [1])


def test_a_probe_runs_one_round_of_the_run_as_it_will_be_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    from fedray.config import assemble
    from fedray.sim import drive as drive_room

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    began = []
    whole = drive_room.drive

    def watched(spec: Any, *arguments: Any, **named: Any) -> Iterator[dict[str, Any]]:
        began.append((spec.rounds, spec.config["rounds"]))
        yield from whole(spec, *arguments, **named)

    monkeypatch.setattr(drive_room, "drive", watched)
    (request,) = command(tmp_path / "s", "rounds=40", "pruner=gradual").requests
    found = plan_room.probe(assemble(request.config))
    assert began == [(1, 40)]
    assert found.seconds > 0
    assert found.cpu_s > 0
    assert list(tmp_path.iterdir()) == []


def test_evaluations_count_as_often_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from fedray.config import assemble
    from fedray.sim import drive as drive_room

    clock = itertools.count(100.0, 2.0)

    def slow(*_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        yield {"note": "training engine: eager"}
        yield {"row": {"round": 1, "time/round_s": 0.5}}
        yield {"end": "finished"}

    monkeypatch.setattr(drive_room, "drive", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    seconds = {}
    for every in (0, 1, 4):
        (request,) = command(tmp_path / "s", f"eval.every={every}").requests
        seconds[every] = plan_room.probe(assemble(request.config)).seconds
    # From the note to the row pass 2 s, of which the round itself says it was 0.5.
    assert seconds == {0: pytest.approx(0.5), 1: pytest.approx(2.0), 4: pytest.approx(0.5 + 1.5 / 4)}


def test_the_forecast_is_printed_with_what_it_was_measured_on(
    half_done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedray.cli import main

    monkeypatch.setattr(plan_room, "probe", lambda _: Probe(seconds=5.0, cpu_s=4.0))
    arguments = ["plan", *TINY, "seed=0,1,2,3", "runtime.num_cpus=2", f"hydra.sweep.dir={half_done}"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "5 s a round on one core: seed=1, and 2 cells like it"
    hours = f"{(7 * 4.0 + 3 * CELL_SECONDS) / 3600:.3g}"
    assert lines[-1].startswith(f"forecast: {hours} CPU hours, about 0:")
    assert lines[-1].endswith("on 2 CPUs with 2 cells at once")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["plan", "--probes"], "fedray plan: unrecognized arguments: --probes; see fedray plan --help"),
        (["plan", "+sweep=pruner_digits"], "sweep=pruner_digits does not exist; did you mean pruners_digits?"),
        (["plan", "rouds=3"], "rouds is not a setting; did you mean rounds?"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused_with_exit_code_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedray.cli import main

    monkeypatch.setattr(sys, "argv", ["fedray"])
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err
