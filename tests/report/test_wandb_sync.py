"""Laws of `fedray wandb sync`: what W&B gets is what the store has, once, whatever was cut off before."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedray.errors import ConfigError, RunError
from fedray.report.wandb_sync import Pace, sync_command
from fedray.track.store import Store, read_rows

HERE = platform.node()


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(f"{self.prog}: {message}")


def row_of(number: int) -> dict[str, Any]:
    return {
        "round": number,
        "test/accuracy": math.nan if number == 2 else number / 10,
        "model/layer_sparsity/fc.weight": 0.5,
        "digest": f"{number:032x}",
    }


def write(folder: Path, rounds: int = 4, *, status: str = "finished", seed: int = 0, log: str | None = None) -> Path:
    manifest = {
        "run_id": f"id{seed}",
        "name": "grid",
        "config": {
            "name": "grid",
            "seed": seed,
            "pruner": {"sparsity": 0.5},
            "tracker": {"progress": "none", "wandb": {"mode": "disabled", "project": "told", "histograms_every": 2}},
        },
        "choices": {"pruner": "magnitude", "strategy": "fedavg"},
    }
    with Store.create(folder, config_yaml="", manifest=manifest) as store:
        for number in range(1, rounds + 1):
            clients = [{"round": number, "client": c, "num_steps": 1, "test/accuracy": c / 4} for c in range(3)]
            store.write(row_of(number), clients, [])
        if status != "running":
            store.finish(status)  # type: ignore[arg-type]
    if log is not None:
        (folder / "log.txt").write_text(log)
    return folder


def lengthen(folder: Path, to: int) -> None:
    rows = read_rows(folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    with Store.resume(folder, last_round=rows[-1]["round"], config_yaml="", manifest=manifest) as store:
        for number in range(rows[-1]["round"] + 1, to + 1):
            store.write(row_of(number), [], [])
        store.finish("finished")


@pytest.fixture
def sync(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: Any) -> list[str]:
        try:
            sync_command([str(argument) for argument in arguments], parser=Parser)
        finally:
            run.said = capsys.readouterr().out.splitlines()  # type: ignore[attr-defined]
        return list(run.said)  # type: ignore[attr-defined]

    return run


def leet(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any], int | None]:
    """History, summary and exit code of an offline run, by W&B's own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect"]
    text = subprocess.run([*command, "--json", str(folder)], capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in text.splitlines()]
    text = subprocess.run([*command, "--summary", "--json", str(folder)], capture_output=True, text=True, check=True)
    codes = [record["exit"]["exit_code"] for record in records if record["type"] == "exit"]
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    return history, json.loads(text.stdout)["summary"], codes[0] if codes else None


def bare(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what W&B adds, and without histograms."""
    return [{key: row[key] for key in row if not key.startswith("_") and "_hist" not in key} for row in history]


def test_a_rebuilt_offline_run_is_the_store_row_by_row(sync: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    assert sync(folder, "--mode", "offline") == [f"{folder}: rounds 1 to 4, 4 rows, to offline run"]
    history, summary, code = leet(folder / "wandb")
    assert bare(history) == read_rows(folder)
    assert summary["test/accuracy"] == 0.4
    assert summary["run/status"] == "finished"
    assert code == 0
    counts = {
        row["round"]: sum(row["client/accuracy_hist.values"]) for row in history if "client/accuracy_hist.bins" in row
    }
    assert counts == {2: 3, 4: 3}, "the clients' accuracies come from their lines"
    assert sync(folder, "--mode", "offline") == [f"{folder}: nothing new, its offline run has all 4 rounds"]
    [offline] = folder.glob("wandb/offline-run-*")
    shutil.rmtree(offline)
    assert sync(folder, "--mode", "offline") == [f"{folder}: rounds 1 to 4, 4 rows, to offline run"]


def test_the_server_gets_every_row_once_and_later_only_what_is_new(
    sync: Any, tmp_path: Path, wandb_server: Any
) -> None:
    folder = write(tmp_path / "run")
    said = sync(folder, "--project", "study")
    assert said == [f"{folder}: rounds 1 to 4, 4 rows, to study"]
    run = wandb_server.runs["study/id0"]
    assert run.rows == read_rows(folder)
    assert run.fields["displayName"] == "magnitude 0.5 seed=0"
    before = wandb_server.requests
    assert sync(folder, "--project", "study") == [f"{folder}: nothing new, W&B has all 4 rounds"]
    assert wandb_server.requests == before, "nothing is asked where the mark says that all is there"
    lengthen(folder, 6)
    assert sync(folder, "--project", "study") == [f"{folder}: rounds 5 to 6, 2 rows, to study"]
    assert run.rows == read_rows(folder)
    assert len(run.rows) == 6
    # Without the mark, as from another machine, W&B is asked.
    (folder / "wandb" / "sent.json").unlink()
    assert sync(folder, "--project", "study") == [f"{folder}: no new row, to study"]
    assert len(run.rows) == 6
    assert sync(folder) == [f"{folder}: rounds 1 to 6, 6 rows, to told"], "another project has its own mark"


def test_a_sync_that_was_cut_short_goes_on_where_it_stopped(sync: Any, tmp_path: Path, wandb_server: Any) -> None:
    for seed in range(3):
        write(tmp_path / str(seed), seed=seed)
    runs = [tmp_path / str(seed) for seed in range(3)]
    sync(runs[0])
    wandb_server.down = True
    manifest = runs[1] / "manifest.json"
    changed = json.loads(manifest.read_bytes())
    changed["config"]["tracker"]["wandb"]["timeout_s"] = 1.0
    manifest.write_text(json.dumps(changed))
    with pytest.raises(RunError, match=r"1: W&B could not start .*; 2 of 3 runs are not sent: repeat the command"):
        sync(tmp_path)
    wandb_server.down = False
    assert [line.partition(",")[0] for line in sync(tmp_path)] == [
        "0: nothing new",
        "1: rounds 1 to 4",
        "2: rounds 1 to 4",
        "3 runs",
    ]
    assert all(wandb_server.runs[f"told/id{seed}"].rows == read_rows(runs[seed]) for seed in range(3))


def test_rows_that_the_server_refuses_are_not_marked_as_sent(sync: Any, tmp_path: Path, wandb_server: Any) -> None:
    folder = write(tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["config"]["tracker"]["wandb"]["timeout_s"] = 2.0
    (folder / "manifest.json").write_text(json.dumps(manifest))
    wandb_server.refuses_rows = True
    with pytest.raises(RunError, match="it has 0 of 4 rows"):
        sync(folder)
    wandb_server.refuses_rows = False
    assert sync(folder) == [f"{folder}: rounds 1 to 4, 4 rows, to told"]
    assert wandb_server.runs["told/id0"].rows == read_rows(folder)


def test_runs_that_cannot_be_sent_are_named_and_the_others_go(sync: Any, tmp_path: Path) -> None:
    alive = f"2026-01-01T00:00:00+00:00 run id1 starts; driver process {{}} on {HERE}\n"
    write(tmp_path / "a")
    (tmp_path / "a" / "rounds.jsonl").write_bytes(b"nonsense\n" + (tmp_path / "a" / "rounds.jsonl").read_bytes())
    write(tmp_path / "b", rounds=0, status="failed")
    now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    write(tmp_path / "c", status="running", log=alive.format(os.getpid()).replace("2026-01-01T00:00:00+00:00", now))
    write(tmp_path / "d", status="running", log=alive.format(1).replace(HERE, "elsewhere"))
    write(tmp_path / "e", status="running")
    write(tmp_path / "f", status="interrupted", seed=5)
    with pytest.raises(RunError, match="1 of 6 runs could not be sent"):
        sync(tmp_path, "--mode", "offline")
    said = dict(line.split(": ", 1) for line in sync.said if ": " in line)
    assert said["a"].startswith("left out: Line 1 of")
    assert said["b"] == "skipped: it has no finished round"
    assert said["c"] == f"skipped: it is running, process {os.getpid()} here; sync it when it has ended"
    assert said["d"] == "skipped: it says it is running on elsewhere; add --cut-off if it is dead"
    assert said["e"] == "skipped: it says it is running somewhere; add --cut-off if it is dead"
    assert said["f"] == "rounds 1 to 4, 4 rows, to offline run, marked interrupted"
    assert sync.said[-1] == "6 runs, 4 rows sent"
    shutil.rmtree(tmp_path / "a")
    sync(tmp_path, "--mode", "offline", "--cut-off")
    said = dict(line.split(": ", 1) for line in sync.said if ": " in line)
    assert said["c"].startswith("skipped: it is running"), "a process that can be seen is alive"
    assert said["d"] == "rounds 1 to 4, 4 rows, to offline run, marked cut off"


def test_a_run_whose_process_is_gone_is_sent_though_its_manifest_says_running(sync: Any, tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    stamp = "2026-01-01T00:00:00+00:00"
    start = f"{stamp} run id0 starts; driver process {{}} on {HERE}\n"
    write(tmp_path / "gone", status="running", log=start.format(child.pid))
    # The number belongs to another process by now: ours, which began long after that start.
    write(tmp_path / "reused", status="running", log=start.format(os.getpid()), seed=1)
    assert [line.rpartition(", ")[2] for line in sync(tmp_path, "--mode", "offline")][:2] == ["marked cut off"] * 2
    assert leet(tmp_path / "gone" / "wandb")[2] == 1


def test_a_run_killed_half_way_is_rebuilt_in_full(sync: Any, tmp_path: Path) -> None:
    """The offline run that it leaves is cut short; what W&B's reader finds after the sync is the store."""
    folder = tmp_path / "run"
    command = [
        sys.executable, "-c",
        "import sys, fedray; fedray.run(sys.argv[2:], folder=sys.argv[1])", str(folder),
        "+experiment=quickstart", "rounds=2000", "eval.every=50", "runtime=inline", "tracker.progress=none",
        "tracker.wandb.mode=offline",
    ]  # fmt: skip
    # wandb lets children share the helper process of their parent, and this one shall die with its run.
    alone = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    with subprocess.Popen(command, env=alone) as process:
        until = time.monotonic() + 120
        rows = folder / "rounds.jsonl"
        while time.monotonic() < until and process.poll() is None:
            if rows.exists() and rows.read_bytes().count(b"\n") >= 20:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    stored = read_rows(folder)
    assert 20 <= len(stored) < 2000
    cut_short = len(leet(folder / "wandb")[0])
    assert cut_short < len(stored), "W&B alone would have lost rows"
    [line] = sync(folder, "--mode", "offline", "--rate", "100000")
    assert line == f"{folder}: rounds 1 to {len(stored)}, {len(stored)} rows, to offline run, marked cut off"
    history, summary, code = leet(folder / "wandb")
    assert bare(history) == stored
    assert summary["round"] == len(stored)
    assert code == 1
    assert list(folder.glob("wandb/replaced/offline-run-*")), "what was there is kept"


def test_no_more_rows_a_second_than_asked_for(sync: Any, tmp_path: Path) -> None:
    now, slept = 100.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    pace = Pace(4.0, clock=lambda: now, sleep=sleep)
    pace()
    assert slept == []
    pace()
    pace()
    assert slept == [0.25, 0.25]
    now += 60.0
    pace()
    assert len(slept) == 2, "after a pause nobody waits"
    pace()
    assert slept == [0.25] * 3, "and a pause is not made up for"
    for bad in ("0", "-1", "nan", "inf"):
        with pytest.raises(ConfigError, match=r"--rate is .*; it must be a number of rows a second above 0"):
            sync(write(tmp_path / bad), "--rate", bad)


def test_every_row_of_every_run_waits_its_turn(sync: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    monkeypatch.setattr(Pace, "__call__", lambda self: calls.append(self.rate))
    for seed in range(2):
        write(tmp_path / str(seed), seed=seed)
    sync(tmp_path, "--mode", "offline", "--rate", "7")
    assert calls == [7.0] * 8


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere",), r"'nowhere' holds no run directory"),
        ((), r"the following arguments are required: runs"),
        (("nowhere", "--mode", "cloud"), r"invalid choice: 'cloud'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(sync: Any, arguments: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        sync(*arguments)


def test_without_a_key_nothing_is_sent_and_the_remedy_is_named(
    sync: Any, tmp_path: Path, wandb_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    folders = [write(tmp_path / str(seed), seed=seed) for seed in range(2)]
    with pytest.raises(ConfigError, match="needs an API key and none is configured: run `wandb login`"):
        sync(tmp_path)
    assert sync.said == []
    assert not any((folder / "wandb" / "sent.json").exists() for folder in folders)
