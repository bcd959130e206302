"""Laws of reading a folder of runs: nothing is lost, whatever became of it, and a group is what differs in its seed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from fedray.errors import ConfigError
from fedray.report.results import grouped, labels, read_results, rises, sparsities
from fedray.sim.goals import Goals, Progress

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(report, tmp_path):
    """Write a run below the folder: pruner, sparsity, seed and its accuracies by round."""

    def make(
        name, pruner="magnitude", sparsity=0.5, seed=0, accuracy=(0.1, 0.5), status="finished", rows=None, **config
    ):
        rows = rows or [{"test/accuracy": value} for value in accuracy]
        node = {"_target_": "fedray.pruners.Any", **({} if sparsity is None else {"sparsity": sparsity})}
        return report.write(
            tmp_path / name, down=[], up=[], rounds=len(rows), rows=rows, status=status,
            config={"seed": seed, "pruner": {} if pruner == "none" else node, **config}, choices={"pruner": pruner},
            run_id=f"id-{name}", rounds_planned=len(rows),
        )  # fmt: skip

    return make


def sweep(folder, cells):
    folder.mkdir(exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps({"started": "", "command": [], "cells": cells}))


def by_name(folder):
    return {result.name: result for result in read_results(folder)}


def test_every_run_is_there_whatever_became_of_it(write, tmp_path):
    for status in ("finished", "failed", "interrupted", "running"):
        write(f"deep/{status}/10", status=status)
    found = by_name(tmp_path)
    assert {name: result.status for name, result in found.items()} == {
        f"deep/{status}/10": status for status in ("failed", "finished", "interrupted", "running")
    }
    assert [row["test/accuracy"] for row in found["deep/failed/10"].rows] == [0.1, 0.5]
    assert found["deep/failed/10"].run_id == "id-deep/failed/10"


def test_cells_are_in_natural_order(write, tmp_path):
    for name in ("10", "9", "100"):
        write(name)
    assert [result.name for result in read_results(tmp_path)] == ["9", "10", "100"]


def changed(run, **facts):
    manifest = run / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | facts))


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda run: (run / "manifest.json").write_text("{"), "is not valid JSON"),
        (lambda run: (run / "manifest.json").write_text("[]"), "holds list, not an object"),
        (lambda run: (run / "manifest.json").write_text("{}"), "does not say what ran"),
        (lambda run: changed(run, choices=None), "has choices or data as no run writes them"),
        (lambda run: changed(run, data={}), "has choices or data as no run writes them"),
        (lambda run: changed(run, rounds=5), "finished 5 rounds and its rounds.jsonl has 2"),
        (lambda run: (run / "manifest.json").unlink(), "has no manifest.json"),
        (lambda run: (run / "rounds.jsonl").unlink(), "has no rounds.jsonl"),
        (lambda run: (run / "rounds.jsonl").write_text("x\n" + (run / "rounds.jsonl").read_text()), "Line 1"),
    ],
)
def test_a_run_that_cannot_be_read_says_why_and_hides_no_other(break_it, says, write, tmp_path):
    write("good")
    break_it(write("bad"))
    found = by_name(tmp_path)
    assert (found["good"].status, found["bad"].status) == ("finished", "unreadable")
    assert says in found["bad"].error
    assert found["bad"].rows == []
    groups, notes = grouped(list(found.values()))
    assert [result.name for result in groups[0].results] == ["good"]
    assert len(notes) == 1
    assert notes[0].startswith("bad is left out: ")


def test_a_torn_last_line_is_no_damage(write, tmp_path):
    run = write("run")
    (run / "rounds.jsonl").write_text((run / "rounds.jsonl").read_text() + '{"round":3,"test/acc')
    assert len(by_name(tmp_path)["run"].rows) == 2


def test_a_cell_of_a_sweep_that_never_became_a_run_is_a_result(write, tmp_path):
    write("a")
    cell = {"id": "1", "overrides": ["pruner=feddst", "+pruner.sparsity=0.9", "seed=3"], "seconds": 1.0, "tries": 1}
    sweep(
        tmp_path,
        [
            {**cell, "folder": "a", "status": "done", "error": None},
            {**cell, "folder": "b", "status": "failed", "error": "pruner.sparsity is 2; it must be below 1"},
            {**cell, "folder": "c", "status": "waiting", "error": None},
            {**cell, "folder": "d", "status": "done", "error": None},
        ],
    )
    found = by_name(tmp_path)
    assert {name: one.status for name, one in found.items()} == {
        "a": "finished", "b": "failed", "c": "waiting", "d": "unreadable",
    }  # fmt: skip
    assert (found["b"].seed, found["b"].settings) == (3, {"pruner": "feddst", "pruner.sparsity": 0.9})
    assert found["b"].error == "pruner.sparsity is 2; it must be below 1"
    assert "holds no run directory" in found["d"].error
    assert found["a"].overrides == tuple(cell["overrides"])
    assert found["a"].settings["pruner"] == "magnitude", "a run's own settings count"


def test_a_sweep_without_a_single_run_can_be_read(tmp_path):
    sweep(tmp_path, [{"folder": "b", "status": "failed", "error": "no", "overrides": []}])
    assert [result.status for result in read_results(tmp_path)] == ["failed"]


def test_who_was_killed_is_failed_if_the_sweep_says_so(write, tmp_path):
    write("killed", status="running")
    write("alive", status="running")
    cells = [("killed", "failed", "its process was killed (signal 9)"), ("alive", "running", None)]
    sweep(tmp_path, [{"folder": name, "status": status, "error": error} for name, status, error in cells])
    found = by_name(tmp_path)
    assert (found["killed"].status, found["killed"].error) == ("failed", "its process was killed (signal 9)")
    assert found["alive"].status == "running"


def test_a_sweep_that_was_moved_finds_its_runs(write, tmp_path):
    write("moved/a")
    sweep(tmp_path / "moved", [{"folder": "/was/elsewhere/a", "status": "done", "error": None, "overrides": ["x=1"]}])
    (found,) = read_results(tmp_path)
    assert (found.name, found.status, found.overrides) == ("moved/a", "finished", ("x=1",))


@pytest.mark.parametrize("text", ["{", "[]", '{"cells": [{"folder": "a"}]}', '{"cells": 3}'])
def test_a_damaged_sweep_file_is_named_and_hides_no_run(text, write, tmp_path):
    write("a")
    (tmp_path / "sweep.json").write_text(text)
    found = by_name(tmp_path)
    assert found["a"].status == "finished"
    assert found["sweep.json"].status == "unreadable"


def test_a_missing_folder_and_an_empty_one_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist; give the folder"):
        read_results(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no run directory"):
        read_results(tmp_path)


def test_a_group_is_what_differs_only_in_its_seed(write, tmp_path):
    for sparsity in (0.9, 0.5):
        for seed in (10, 2):
            write(f"{sparsity}-{seed}", sparsity=sparsity, seed=seed, runtime={"slots": seed}, tracker={"x": seed})
    groups, notes = grouped(read_results(tmp_path))
    assert [(group.settings["pruner.sparsity"], group.seeds) for group in groups] == [(0.5, [2, 10]), (0.9, [2, 10])]
    assert notes == []


def test_of_two_runs_with_one_seed_the_newer_counts(write, tmp_path):
    for name, started in (("a", "2026-01-02T00:00:00+00:00"), ("b", "2026-01-01T00:00:00+00:00")):
        path = write(name) / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "started": started}))
    ((group,), notes) = grouped(read_results(tmp_path))
    assert [result.name for result in group.results] == ["a"]
    assert notes == ["b is left out: a repeats it with the same seed."]


def test_waiting_cells_are_one_sentence(tmp_path):
    sweep(tmp_path, [{"folder": f"c{at}", "status": "waiting", "error": None} for at in range(300)])
    _, notes = grouped(read_results(tmp_path))
    assert notes == ["c0, c1, c2 and 297 more are left out: waiting to be run."]


def test_labels_name_what_differs_and_no_more(write, tmp_path):
    write("a", "feddst", 0.9, partition={"_target_": "d.Dirichlet", "alpha": 0.3})
    write("b", "magnitude", 0.5, partition={"_target_": "d.Dirichlet", "alpha": 0.3})
    write("c", "none", None, partition={"_target_": "d.Dirichlet", "alpha": 0.3})
    groups, _ = grouped(read_results(tmp_path))
    assert labels(groups) == ["feddst 0.9", "magnitude 0.5", "no pruner"]
    write("d", "magnitude", 0.5, partition={"_target_": "d.Dirichlet", "alpha": 0.1})
    groups, _ = grouped(read_results(tmp_path))
    assert labels(groups) == ["feddst 0.9, alpha 0.3", "magnitude 0.5, alpha 0.1", "magnitude 0.5, alpha 0.3",
                              "no pruner, alpha 0.3"]  # fmt: skip


def test_a_label_says_no_more_than_it_takes(write, tmp_path):
    """Whoever is told apart by its method has no list of its settings, and nothing is said of what is not there."""
    write("a", "feddst", 0.9, trainer={"epochs": 1}, strategy={"weight": "examples"})
    write("b", "subfedavg", 0.9, trainer={"epochs": 2}, strategy={"weight": "uniform"})
    write("c", "none", None, trainer={"epochs": 1}, strategy={"weight": "examples"})
    assert labels(grouped(read_results(tmp_path))[0]) == ["feddst", "no pruner", "subfedavg"]
    for name, correction in (("a", "none"), ("b", "fedprox"), ("c", "fedprox")):
        path = tmp_path / name / "manifest.json"
        facts = json.loads(path.read_text())
        facts["choices"]["correction"] = correction
        path.write_text(json.dumps(facts))
    assert labels(grouped(read_results(tmp_path))[0]) == ["feddst", "no pruner, fedprox", "subfedavg, fedprox"]


def test_no_two_labels_are_alike(write, tmp_path):
    """`size 1` of two components, and values that look alike."""
    count = 0
    for first in (1, 2):
        for second in (1, 2):
            count += 1
            write(f"{count}", x={"size": first}, y={"size": second})
    write("other", x={"size": 1}, y={"size": 1}, z="1")
    groups, _ = grouped(read_results(tmp_path))
    found = labels(groups)
    assert len(found) == len(set(found)) == 5


def test_a_group_alone_has_the_name_of_its_pruner(write, tmp_path):
    write("a", "feddst", 0.9)
    assert labels(grouped(read_results(tmp_path))[0]) == ["feddst 0.9"]


def test_the_sparsity_of_a_method_is_found_under_its_own_name(write, tmp_path):
    write("a", "feddst", 0.9)
    write("b", "prunefl", None)
    for name, target in (("c", 0.8), ("d", 0.95)):
        run = write(name, "prunefl", None) / "manifest.json"
        facts = json.loads(run.read_text())
        facts["config"]["pruner"]["target_sparsity"] = target
        run.write_text(json.dumps(facts))
    groups, _ = grouped(read_results(tmp_path))
    assert dict(zip(labels(groups), sparsities(groups), strict=True)) == {
        "feddst 0.9": 0.9, "prunefl": None, "prunefl 0.8": 0.8, "prunefl 0.95": 0.95,
    }  # fmt: skip


def test_nan_never_wins(write, tmp_path):
    nan = float("nan")
    rows = [{"test/accuracy": value, "test/loss": value} for value in (nan, 0.4, 0.9, 0.2, nan)]
    write("a", rows=rows)
    (found,) = read_results(tmp_path)
    assert (found.at("test/accuracy", "best"), found.at("test/loss", "best")) == (0.9, 0.2)
    assert found.at("test/accuracy") is None, "the last value that was recorded is not finite"
    assert found.at("test/accuracy", "best", False) == 0.2
    assert found.at("no/such", "best") is None


def test_what_other_programs_wrote_as_nan_or_infinity_never_wins_either(write, tmp_path):
    path = write("a") / "rounds.jsonl"
    texts = ("NaN", "0.4", "Infinity", "-Infinity")
    lines = [f'{{"round":{at},"test/accuracy":{text},"test/loss":{text}}}' for at, text in enumerate(texts, 1)]
    path.write_text("\n".join(lines) + "\n")
    (found,) = read_results(tmp_path)
    assert (found.at("test/accuracy", "best"), found.at("test/loss", "best")) == (0.4, 0.4)
    assert found.at("test/accuracy") is None
    assert found.at("test/accuracy", "target", target=0.3) == 2
    assert found.series("round", "test/accuracy") == [(2, 0.4)]


def test_the_last_recorded_value_is_the_final_one(write, tmp_path):
    write("a", rows=[{"test/accuracy": 0.3}, {"train/loss": 1.0}])
    assert read_results(tmp_path)[0].at("test/accuracy") == 0.3


@pytest.mark.parametrize("metric", ["test/accuracy", "test/loss"])
@pytest.mark.parametrize("target", [0.3, 0.65, 0.99])
def test_what_a_target_cost_is_what_the_run_itself_reports(metric, target, write, tmp_path):
    values = [0.7, 0.2, math.nan, 0.66, 0.9, 0.1]
    rows = [
        {metric: value, "wire/total_bytes": 1000 * at, "time/total_s": 2.5 * at} for at, value in enumerate(values, 1)
    ]
    write("a", rows=rows, stop={"metric": metric, "targets": [target]})
    (found,) = read_results(tmp_path)
    goals = Progress(Goals(metric=metric, targets=(target,)))
    for at, row in enumerate(rows, 1):
        goals.enter({"round": at, **row})
    told = goals.metrics()
    for cost in ("rounds", "bytes", "seconds"):
        assert found.at(metric, "target", cost=cost) == told.get(f"target/{target:g}/{cost}")
        assert found.at(metric, "target", target=target, cost=cost) == told.get(f"target/{target:g}/{cost}")


@pytest.mark.parametrize(
    ("stop", "says"),
    [
        ({}, "has no stop.targets; give one, as in --target 0.9"),
        ({"metric": "test/loss", "targets": [0.1]}, "are of test/loss, not of test/accuracy; give --target"),
        ({"metric": "test/accuracy", "targets": [0.5, 0.9]}, "has the targets 0.5, 0.9; choose one with --target"),
    ],
)
def test_a_target_that_nobody_set_is_refused(stop, says, write, tmp_path):
    write("a", stop=stop)
    with pytest.raises(ConfigError, match=says):
        read_results(tmp_path)[0].at("test/accuracy", "target")


def test_more_is_better_but_for_losses_and_what_is_spent():
    better = [
        "test/accuracy",
        "client/accuracy_p10",
        "model/sparsity",
        "wire/total_ratio",
        "client/global_accuracy_mean",
    ]
    worse = ["test/top5_error", "test/cross_entropy", "test/val_loss", "prune/dead_filters",
             "test/loss", "test/perplexity", "test/mse", "client/mse_mean", "train/loss", "wire/total_bytes",
             "wire/up_params", "time/round_s", "model/flops", "energy/simulated_j", "target/0.9/rounds"]  # fmt: skip
    assert [metric for metric in better if not rises(metric)] == []
    assert [metric for metric in worse if rises(metric)] == []
    # As the run itself sees the metrics that it can be told to watch.
    for metric in ("test/accuracy", "test/loss", "test/perplexity", "test/mse", "client/mse_mean", "test/top5_error",
                   "client/global_loss_mean", "test/nll"):  # fmt: skip
        assert rises(metric) == Goals(metric=metric).rising


def test_reading_and_tabling_load_neither_torch_nor_ray(write, tmp_path):
    write("a")
    code = (
        "import sys; from fedray.cli import main\n"
        f"for command in ('runs', 'table'): assert main([command, {str(tmp_path)!r}]) == 0\n"
        "print(sorted({'torch', 'ray', 'wandb', 'hydra', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
