"""Laws of sweep.json and of claims: nothing is lost, and no cell has two launchers."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fedray.errors import RunError
from fedray.sweep import record
from fedray.sweep.record import Claims, read_sweep, write_sweep


def row(folder: str, status: str, **more: Any) -> dict[str, Any]:
    plain = {"id": folder[-2:], "overrides": [folder], "error": None, "seconds": 0.0, "tries": 1}
    return {**plain, "folder": folder, "status": status, **more}


def test_rows_of_other_launchers_and_commands_stay(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"started": "then", "digests": {"a": "1"}}, [row("x-aa", "done", seconds=5.0)])
    write_sweep(tmp_path, {"digests": {"b": "2"}}, [row("x-aa", "skipped"), row("y-bb", "running")])
    write_sweep(tmp_path, {}, [row("y-bb", "waiting"), row("z-cc", "waiting")])
    found = read_sweep(tmp_path)
    assert found["started"] == "then"
    assert found["digests"] == {"a": "1", "b": "2"}
    assert {(r["folder"], r["status"], r["seconds"]) for r in found["cells"]} == {
        ("x-aa", "done", 5.0), ("y-bb", "running", 0.0), ("z-cc", "waiting", 0.0),
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.json"]


def test_a_refused_cell_that_was_mended_has_one_row(tmp_path: Path) -> None:
    write_sweep(tmp_path, {}, [row("run-00", "failed", overrides=["pruner=mine"], error="no")])
    write_sweep(tmp_path, {}, [row("run-11", "done", overrides=["pruner=mine"])])
    assert [(r["folder"], r["status"]) for r in read_sweep(tmp_path)["cells"]] == [("run-11", "done")]


def test_writers_at_the_same_time_lose_no_row(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for turn in range(10):
            write_sweep(tmp_path, {}, [row(f"{number}-{turn}", "done")])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_sweep(tmp_path)["cells"]) == 40


def test_a_lock_that_a_crash_left_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "LOCK_SECONDS", 0.2)
    (tmp_path / ".sweep.json.lock").touch()
    write_sweep(tmp_path, {}, [row("x-aa", "done")])
    assert len(read_sweep(tmp_path)["cells"]) == 1


def test_a_sweep_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(RunError, match=r"sweep\.json' is not valid JSON .*delete it"):
        read_sweep(tmp_path)


def _take_all(root: str, names: list[str], barrier: Any, queue: Any) -> None:
    with Claims(Path(root)) as claims:
        barrier.wait()
        queue.put([name for name in names if claims.take(name) is None])
        barrier.wait()


def test_of_many_launchers_one_gets_each_cell(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    names, count = [f"cell-{number}" for number in range(50)], 4
    barrier, queue = context.Barrier(count), context.Queue()
    processes = [context.Process(target=_take_all, args=(str(tmp_path), names, barrier, queue)) for _ in range(count)]
    for process in processes:
        process.start()
    taken = [name for _ in processes for name in queue.get(timeout=30)]
    for process in processes:
        process.join()
    assert sorted(taken) == sorted(names)
    assert not (tmp_path / record.CLAIMS).exists()


def test_a_held_claim_names_its_holder_and_is_free_when_released(tmp_path: Path) -> None:
    with Claims(tmp_path) as first:
        assert first.take("cell") is None
        with Claims(tmp_path) as second:
            assert second.take("cell") == f"process {os.getpid()} on {platform.node()}"
            first.release("cell")
            assert second.take("cell") is None


def test_the_claim_of_a_launcher_that_was_killed_is_taken_over_at_once(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from fedray.sweep.record import Claims\n"
        "claims = Claims(Path(sys.argv[1])); claims.take('cell'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    assert (tmp_path / record.CLAIMS / "cell").is_file()
    with Claims(tmp_path) as claims:
        assert claims.take("cell") is None


def test_a_number_that_another_process_has_now_is_no_holder(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        reused = {"host": platform.node(), "pid": os.getpid(), "began": "1"}
        (claims.folder / "cell").write_text(json.dumps(reused))
        assert claims.take("cell") is None


def test_a_claim_of_another_machine_is_respected_while_it_is_renewed(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        path = claims.folder / "cell"
        path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "began": "1"}))
        assert claims.take("cell") == "process 1 on elsewhere"
        old = time.time() - record.STALE_SECONDS - 5
        os.utime(path, (old, old))
        assert claims.take("cell") is None


def test_a_claim_is_renewed_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "BEAT_SECONDS", 0.05)
    with Claims(tmp_path) as claims:
        claims.take("cell")
        os.utime(claims.folder / "cell", (1, 1))
        deadline = time.monotonic() + 10
        while (claims.folder / "cell").stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (claims.folder / "cell").stat().st_mtime > 2


def test_a_launcher_that_is_stopped_keeps_its_claim(tmp_path: Path) -> None:
    """After Ctrl-Z nothing renews the claim, and the run goes on."""
    code = (
        "import sys, time; from pathlib import Path; from fedray.sweep.record import Claims\n"
        "claims = Claims(Path(sys.argv[1])); claims.take('cell'); print('held', flush=True); time.sleep(300)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with Claims(tmp_path) as claims:
            os.utime(claims.folder / "cell", (1, 1))
            assert claims.take("cell") == f"process {holder.pid} on {platform.node()}"
            claims.release("cell")  # of a launcher that does not have it
            assert (claims.folder / "cell").is_file()
    finally:
        holder.kill()
        holder.communicate()


def test_process_numbers_of_another_container_say_nothing(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        far = {"host": platform.node(), "space": "another", "pid": 2**22 + 1, "began": "1"}
        (claims.folder / "cell").write_text(json.dumps(far))
        assert claims.take("cell") is not None


def test_a_claim_is_taken_although_another_launcher_has_just_removed_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, removed = record._take, []

    def removing(path: Path, text: str) -> bool:
        if not removed:
            removed.append(path.parent)
            path.parent.rmdir()
        return take(path, text)

    with Claims(tmp_path) as claims:
        monkeypatch.setattr(record, "_take", removing)
        assert claims.take("cell") is None
    assert removed


def test_a_lock_is_broken_if_it_was_left_behind_and_not_because_many_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "LOCK_SECONDS", 0.3)
    inside, most = [0], [0]
    guard = threading.Lock()

    def hold() -> None:
        with record._locked(tmp_path / "lock"):
            with guard:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.1)
            with guard:
                inside[0] -= 1

    (tmp_path / "lock").write_text("left behind")
    waiting = [threading.Thread(target=hold) for _ in range(8)]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join()
    assert most[0] == 1
    assert list(tmp_path.iterdir()) == []
