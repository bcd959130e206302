"""Laws of the run directory."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedray.errors import ConfigError, RunError
from fedray.track import store as store_module
from fedray.track.store import (
    Store,
    finished_rounds,
    read_clients,
    read_manifest,
    read_rows,
    read_transfers,
    recorded,
)


def row_of(number: int) -> dict[str, Any]:
    return {"round": number, "test/accuracy": 0.1 * number, "digest": "ab"}


def clients_of(number: int) -> list[dict[str, Any]]:
    return [{"round": number, "client": client, "accuracy": 0.5 + client} for client in range(3)]


def transfers_of(number: int, count: int = 4) -> list[dict[str, Any]]:
    return [
        {
            "round": number,
            "client": client,
            "direction": "up",
            "part": "update",
            "params": 199_210,
            "value_bytes": 796_840,
            "mask_bytes": 24_902,
            "header_bytes": 17,
        }
        for client in range(count)
    ]


def create(folder: Path) -> Store:
    return Store.create(folder, config_yaml="seed: 1\n", manifest={"run_id": "abc"})


def write_rounds(store: Store, first: int, last: int) -> None:
    for number in range(first, last + 1):
        store.write(row_of(number), clients_of(number), transfers_of(number))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    with create(tmp_path / "a" / "run") as store:
        write_rounds(store, 1, 2)
        store.write(row_of(3), [], [])
        store.finish("finished", seconds=1.5)
    folder = tmp_path / "a" / "run"
    assert read_rows(folder) == [row_of(1), row_of(2), row_of(3)]
    assert read_clients(folder) == clients_of(1) + clients_of(2)
    assert read_transfers(folder) == transfers_of(1) + transfers_of(2)
    assert finished_rounds(folder) == [1, 2, 3]
    assert (folder / "config.yaml").read_text() == "seed: 1\n"
    assert not list(folder.glob(".*")), "temporary files must not stay behind"


def test_the_manifest_says_how_the_run_stands(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        before = read_manifest(tmp_path)
        assert (before["run_id"], before["status"]) == ("abc", "running")
        assert "ended" not in before
        store.finish("finished", final_sparsity=0.9)
    after = read_manifest(tmp_path)
    assert after["status"] == "finished"
    assert after["final_sparsity"] == 0.9
    assert after["started"] == before["started"] <= after["ended"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("bad"), "failed"), (KeyboardInterrupt(), "interrupted"), (SystemExit(1), "interrupted")],
)
def test_an_exception_in_the_block_ends_in_the_manifest(tmp_path: Path, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), create(tmp_path):
        raise error
    manifest = read_manifest(tmp_path)
    assert manifest["status"] == status
    assert type(error).__name__ in manifest["error"]


def test_an_exception_after_finish_leaves_the_status(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="late"), create(tmp_path) as store:  # noqa: PT012
        store.finish("finished")
        raise ValueError("late")
    assert read_manifest(tmp_path)["status"] == "finished"


def test_nan_and_infinity_are_written_as_null_in_valid_json(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        store.write(
            {"round": 1, "test/loss": math.nan, "list": [1.0, -math.inf], "fine": 0.1 + 0.2},
            [{"round": 1, "client": 0, "loss": math.inf}],
            [],
        )
        store.finish("failed", loss=math.nan)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for name in ("rounds.jsonl", "clients.jsonl", "manifest.json"):
        json.loads((tmp_path / name).read_text(), parse_constant=refuse)
    assert read_rows(tmp_path) == [{"round": 1, "test/loss": None, "list": [1.0, None], "fine": 0.1 + 0.2}]
    assert read_clients(tmp_path)[0]["loss"] is None
    assert read_manifest(tmp_path)["loss"] is None
    assert recorded({"a": (math.nan, 2)}) == {"a": [None, 2]}


KILLED = """
import os, signal, sys
from pathlib import Path
from fedray.track import store as module

whole = module._write_all
calls = 0

def write_until_killed(descriptor, data):
    global calls
    calls += 1
    if calls > 3 * int(sys.argv[2]) + int(sys.argv[3]):
        whole(descriptor, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    whole(descriptor, data)

store = module.Store.create(Path(sys.argv[1]), config_yaml="seed: 1", manifest={})
module._write_all = write_until_killed
for number in range(1, 100):
    lines = [{"round": number, "client": client} for client in range(3)]
    store.write({"round": number, "test/accuracy": 0.5}, lines, lines)
"""


@pytest.mark.parametrize("files_written", [0, 1, 2], ids=["in_transfers", "in_clients", "in_row"])
def test_kill_9_in_the_middle_of_a_round_loses_no_finished_round(tmp_path: Path, files_written: int) -> None:
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "7", str(files_written)],
        env={**os.environ, "PYTHONPATH": str(Path(store_module.__file__).parents[2])},
        check=False,
    )
    assert child.returncode == -signal.SIGKILL
    assert finished_rounds(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    lines = [{"round": number, "client": client} for number in range(1, 8) for client in range(3)]
    assert read_transfers(tmp_path) == lines, "lines of the round that was cut off must not be read"
    assert read_clients(tmp_path) == lines
    assert read_manifest(tmp_path)["status"] == "running"
    # And the run can go on in the same folder.
    with Store.resume(tmp_path, last_round=7, config_yaml="seed: 1", manifest={}) as store:
        write_rounds(store, 8, 9)
    assert finished_rounds(tmp_path) == list(range(1, 10))
    assert read_transfers(tmp_path) == lines + transfers_of(8) + transfers_of(9)


def test_the_row_is_written_after_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int]] = []

    def counts() -> tuple[int, int, int]:
        names = ("transfers.jsonl", "clients.jsonl", "rounds.jsonl")
        return tuple((tmp_path / name).read_bytes().count(b"\n") for name in names)  # type: ignore[return-value]

    whole = store_module._write_all
    with create(tmp_path) as store:

        def write_and_count(descriptor: int, data: bytes) -> None:
            whole(descriptor, data)
            seen.append(counts())

        monkeypatch.setattr(store_module, "_write_all", write_and_count)
        store.write(row_of(1), clients_of(1), transfers_of(1))
        assert counts() == (4, 3, 1), "all lines are in the files when write returns"
        monkeypatch.undo()
    assert seen == [(4, 0, 0), (4, 3, 0), (4, 3, 1)]


def test_a_finished_row_is_synced_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    with create(tmp_path) as store:
        monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(os.readlink(f"/proc/self/fd/{file}")).name))
        store.write(row_of(1), [], [])
        assert synced == ["rounds.jsonl"]
        monkeypatch.undo()


@pytest.mark.parametrize("tail", [b'{"round":3,"test/acc', b"\x00\x00\x00\n", b'{"round', b"7"])
def test_a_torn_last_line_is_no_row(tmp_path: Path, tail: bytes) -> None:
    with create(tmp_path) as store:
        write_rounds(store, 1, 2)
    with (tmp_path / "rounds.jsonl").open("ab") as file:
        file.write(tail)
    assert finished_rounds(tmp_path) == [1, 2]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        write_rounds(store, 1, 3)
    path = tmp_path / "rounds.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:10], lines[2]]) + "\n")
    with pytest.raises(RunError, match=r"Line 2 of .*rounds\.jsonl"):
        read_rows(tmp_path)


def test_resume_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        write_rounds(store, 1, 5)
        store.finish("interrupted", error="KeyboardInterrupt")
    started = read_manifest(tmp_path)["started"]
    with Store.resume(tmp_path, last_round=3, config_yaml="rounds: 9\n", manifest={"run_id": "abc"}) as store:
        assert finished_rounds(tmp_path) == [1, 2, 3]
        manifest = read_manifest(tmp_path)
        assert (manifest["status"], manifest["started"]) == ("running", started)
        assert "error" not in manifest
        write_rounds(store, 4, 6)
        store.finish("finished")
    assert (tmp_path / "config.yaml").read_text() == "rounds: 9\n"
    whole = tmp_path / "whole"
    with create(whole) as store:
        write_rounds(store, 1, 6)
    for name in ("rounds.jsonl", "clients.jsonl", "transfers.jsonl"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_resume_from_a_round_without_a_row_is_refused(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        write_rounds(store, 1, 2)
    with pytest.raises(ConfigError, match="no row for round 3"):
        Store.resume(tmp_path, last_round=3, config_yaml="", manifest={})
    with pytest.raises(ConfigError, match="no run directory"):
        Store.resume(tmp_path / "elsewhere", last_round=0, config_yaml="", manifest={})
    assert finished_rounds(tmp_path) == [1, 2], "a refusal must not touch the folder"


def test_a_new_run_does_not_overwrite_finished_rounds(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        write_rounds(store, 1, 1)
    with pytest.raises(ConfigError, match="1 finished rounds"):
        create(tmp_path)
    assert finished_rounds(tmp_path) == [1]


def test_a_new_run_clears_what_an_unfinished_round_left(tmp_path: Path) -> None:
    create(tmp_path).close()
    (tmp_path / "transfers.jsonl").write_text(json.dumps({"round": 1, "client": 0}) + "\n")
    (tmp_path / "rounds.jsonl").write_text('{"rou')
    with create(tmp_path) as store:
        write_rounds(store, 1, 1)
    assert read_rows(tmp_path) == [row_of(1)]
    assert read_transfers(tmp_path) == transfers_of(1)


def test_rounds_are_recorded_once_and_in_order(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        write_rounds(store, 0, 2)
        with pytest.raises(RunError, match="once and in order"):
            store.write(row_of(2), [], [])
    with (
        Store.resume(tmp_path, last_round=2, config_yaml="", manifest={}) as store,
        pytest.raises(RunError, match="once and in order"),
    ):
        store.write(row_of(1), [], [])
    assert finished_rounds(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize(
    ("row", "lines", "message"),
    [
        ({"test/accuracy": 1.0}, [], "must be an integer"),
        ({"round": 1.0}, [], "must be an integer"),
        ({"round": 1}, [{"round": 2, "client": 0}], "has round 2"),
        ({"round": 1}, [{"client": 0}], "has round None"),
        ({"round": 1, "metric": object()}, [], "cannot be recorded"),
        ({"round": 1, "loss": math.nan, "metric": object()}, [], "cannot be recorded"),
    ],
)
def test_a_bad_line_is_refused_and_leaves_no_trace(
    tmp_path: Path, row: dict[str, Any], lines: list[dict[str, Any]], message: str
) -> None:
    with create(tmp_path) as store:
        with pytest.raises(RunError, match=message):
            store.write(row, [], lines)
        with pytest.raises(RunError, match=message):
            store.write(row, lines, [])
        assert (tmp_path / "transfers.jsonl").read_bytes() == b""
        store.write(row_of(1), [], [])


def test_a_full_disk_is_an_error_and_ends_the_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: bytes) -> None:
        os.write(descriptor, data[:5])
        raise OSError(28, "No space left on device")

    with create(tmp_path) as store:
        write_rounds(store, 1, 1)
        monkeypatch.setattr(store_module, "_write_all", full)
        with pytest.raises(RunError, match="No space left"):
            store.write(row_of(2), [], [])
        monkeypatch.undo()
        with pytest.raises(RunError, match="closed"):
            store.write(row_of(2), [], [])
    assert finished_rounds(tmp_path) == [1]


def test_a_manifest_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(descriptor: int, data: bytes) -> None:
        os.write(descriptor, data[:5])
        raise KeyboardInterrupt

    store = create(tmp_path)
    before = read_manifest(tmp_path)
    monkeypatch.setattr(store_module, "_write_all", cut_off)
    with pytest.raises(KeyboardInterrupt):
        store.finish("finished")
    assert read_manifest(tmp_path) == before
    monkeypatch.undo()
    with (tmp_path / "manifest.json").open() as reader:
        store.finish("finished")
        assert json.load(reader) == before, "who has it open goes on reading the old one"
    assert read_manifest(tmp_path)["status"] == "finished"


def test_a_round_of_500_transfers_is_recorded_in_milliseconds(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        durations_s = []
        for number in range(1, 11):
            transfers = transfers_of(number, count=500)
            start = time.process_time()
            store.write(row_of(number), [], transfers)
            durations_s.append(time.process_time() - start)
    # 2 to 4 ms on one core; the bound has room for a busy machine and still catches a sync or an open per line.
    assert min(durations_s) < 0.02
    assert len(read_transfers(tmp_path)) == 5000
