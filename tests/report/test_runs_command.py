"""`fedray runs`: every run is on a line, and nothing of what it says about itself is lost."""

from __future__ import annotations

import csv
import io
import json

import pytest

from fedray.errors import ConfigError
from fedray.report.listing import runs_command

LONG = "client 8 in round 1 sent nan in part 'delta', tensor 'features.0.weight'; lower trainer.lr or set clip_norm."


@pytest.fixture
def runs(report, tmp_path, capsys):
    """Four runs of four ends, and what the command prints of them."""
    for name, status, pruner, rounds in (
        ("a", "finished", "feddst", 3),
        ("b", "failed", "feddst", 1),
        ("c", "running", "magnitude", 2),
    ):
        rows = [
            {"test/accuracy": at / 7, "model/sparsity": 0.5, "wire/total_bytes": 1_234_567 * at, "time/total_s": at / 3}
            for at in range(1, rounds + 1)
        ]
        run = report.write(
            tmp_path / name, down=[], up=[], rounds=rounds, rows=rows, status=status,
            config={"seed": 4, "pruner": {"_target_": "p.P"}}, choices={"pruner": pruner}, run_id=f"id-{name}",
        )  # fmt: skip
        manifest = run / "manifest.json"
        facts = {**json.loads(manifest.read_text()), "rounds": 3}
        manifest.write_text(json.dumps(facts | ({"error": LONG} if status == "failed" else {})))
    bad = tmp_path / "d"
    bad.mkdir()
    for name in ("manifest.json", "rounds.jsonl"):
        (bad / name).write_text("{")

    def run_it(*arguments):
        capsys.readouterr()
        runs_command([str(tmp_path), *arguments], parser=report.parser)
        return capsys.readouterr().out

    return run_it


def test_every_run_is_on_a_line_whatever_became_of_it(runs, report):
    text = runs()
    (lines,) = report.tables(text)
    assert [(line["run"], line["status"], line["pruner"], line["seed"], line["rounds"]) for line in lines] == [
        ("a", "finished", "feddst", "4", "3/3"),
        ("b", "failed", "feddst", "4", "1/3"),
        ("c", "running", "magnitude", "4", "2/3"),
        ("d", "unreadable", "-", "-", "0"),
    ]
    assert (lines[0]["test/accuracy"], lines[0]["sparsity"], lines[0]["MB"], lines[0]["seconds"]) == (
        "0.4286", "0.5000", "3.70", "1.0",
    )  # fmt: skip
    assert "4 runs: 1 finished, 1 failed, 1 running, 1 unreadable." in text


def test_a_long_error_is_cut_in_its_line_and_whole_below(runs, report):
    text = runs()
    (lines,) = report.tables(text)
    assert lines[1]["error"].endswith("…")
    assert f"- b: {LONG}" in text


def test_csv_and_json_have_every_digit(runs):
    (first, *_), found = csv.DictReader(io.StringIO(runs("--format", "csv"))), json.loads(runs("--format", "json"))
    assert (float(first["test/accuracy"]), int(first["wire/total_bytes"])) == (3 / 7, 3 * 1_234_567)
    assert (found[0]["test/accuracy"], found[0]["wire/total_bytes"], found[0]["time/total_s"]) == (3 / 7, 3703701, 1.0)
    assert [(one["run_id"], one["error"]) for one in found[:2]] == [("id-a", None), ("id-b", LONG)]
    assert found[0]["settings"]["pruner"] == "feddst"
    assert [one["status"] for one in found] == ["finished", "failed", "running", "unreadable"]


def test_a_status_and_settings_choose(runs, report):
    assert [line["run"] for line in report.tables(runs("--status", "failed,running"))[0]] == ["b", "c"]
    assert [line["run"] for line in report.tables(runs("--only", "pruner=magnitude"))[0]] == ["c", "d"]
    assert "1 run: 1 running." in runs("--status", "running")


def test_a_cell_that_never_ran_is_listed_by_its_overrides(runs, report, tmp_path):
    cell = {"folder": "x", "status": "failed", "error": "no", "overrides": ["pruner=snip", "seed=3"]}
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": [cell]}))
    line = report.tables(runs())[0][-1]
    assert (line["run"], line["status"], line["pruner"], line["seed"], line["error"]) == (
        "x",
        "failed",
        "snip",
        "3",
        "no",
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--metric", "test/acuracy"], "did you mean test/accuracy"),
        (["--status", "done"], "--status done is that of none of these runs; there are finished, failed, running"),
        (["--only", "prunner=x"], "did you mean pruner"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(arguments, says, runs):
    with pytest.raises(ConfigError, match=says):
        runs(*arguments)
