"""A cluster that stays: `fedray up` starts it, runs find it and borrow its processes, `fedray down` ends it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from fedray.errors import ConfigError
from fedray.sim.warm import Process, Up, code_digest, look_for_cluster, state_file

ROOT = Path(__file__).parents[2]
RUN = ("num_clients=4", "cohort=2", "rounds=2", "trainer.epochs=1", "tracker.wandb.mode=disabled", "checkpoint.every=0")


def me() -> Process:
    found = Process.of(os.getpid())
    assert found is not None
    return found


def an_up(**changes: Any) -> Up:
    """What the file of a cluster of this process would say."""
    import getpass

    plain = Up(
        address="127.0.0.1:1",
        head=me(),
        processes=(),
        cpus=2,
        hosts=2,
        folder="/tmp/fedray-up-none",
        token_path=None,
        machine=platform.node(),
        user=getpass.getuser(),
        python=sys.executable,
        ray=version("ray"),
        code=code_digest(),
        started="2026-01-01T00:00:00+00:00",
    )
    return replace(plain, **changes)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cluster.json"
    monkeypatch.setenv("FEDRAY_CLUSTER", str(path))
    return path


def write(path: Path, up: Up) -> None:
    path.write_text(json.dumps(asdict(up)))


# -- the file --------------------------------------------------------------------------------------------------------


def test_without_a_file_there_is_no_cluster_and_nothing_to_say(state: Path) -> None:
    assert look_for_cluster() == (None, None)


def test_a_cluster_of_this_user_machine_python_ray_and_code_is_found(state: Path) -> None:
    write(state, an_up())
    assert look_for_cluster() == (an_up(), None)


def dead() -> Process:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    found = Process.of(child.pid)
    child.wait()
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (lambda: {"head": dead()}, "is gone and is ignored; fedray up starts another"),
        (lambda: {"head": replace(me(), began="1")}, "is gone and is ignored"),
        (lambda: {"machine": "elsewhere"}, "on elsewhere and is ignored"),
        (lambda: {"user": "somebody"}, "is somebody's"),
        (lambda: {"python": "/usr/bin/other"}, "has Python /usr/bin/other, not"),
        (lambda: {"ray": "2.0.0"}, "has Ray 2.0.0, not"),
        (lambda: {"code": "0"}, "has loaded other code of fedray and is ignored; fedray down, then up"),
    ],
)
def test_a_dead_or_foreign_cluster_is_ignored_with_a_sentence(
    changes: Callable[[], dict[str, Any]], sentence: str, state: Path
) -> None:
    write(state, an_up(**changes()))
    found, why = look_for_cluster()
    assert found is None
    assert why is not None
    assert sentence in why
    assert "\n" not in why


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"address": "x"}'])
def test_a_damaged_file_is_ignored_with_a_sentence(text: str, state: Path) -> None:
    state.write_text(text)
    found, why = look_for_cluster()
    assert found is None
    assert str(state) in (why or "")
    assert "is ignored" in (why or "")


def test_the_code_counts_as_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedray.sim import warm

    module = tmp_path / "fedray" / "sim" / "warm.py"
    module.parent.mkdir(parents=True)
    module.write_text("a = 1\n")
    monkeypatch.setattr(warm, "__file__", str(module))
    before = code_digest()
    assert code_digest() == before
    module.write_text("a = 2 + 3\n")
    after = code_digest()
    assert after != before
    (tmp_path / "fedray" / "new.py").write_text("")
    assert code_digest() != after


def test_a_process_is_known_by_its_number_and_its_start() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    found = Process.of(child.pid)
    assert found is not None
    assert found.lives
    replace(found, began="1").send(signal.SIGKILL)  # another process had this number: nothing happens
    time.sleep(0.1)
    assert child.poll() is None
    found.send(signal.SIGKILL)
    child.wait(10)
    assert not found.lives
    found.send(signal.SIGKILL)


def test_the_file_lies_where_the_variable_says(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert state_file() == state
    monkeypatch.delenv("FEDRAY_CLUSTER")
    monkeypatch.setenv("HOME", "/nowhere")
    assert state_file() == Path(f"/nowhere/.cache/fedray/cluster-{platform.node()}.json")


def environment(state: Path, *, token: bool = False) -> dict[str, str]:
    """Of a process that looks for a cluster there. token: as in a user's shell, where Ray's tokens are not off."""
    left_out = {"RAY_AUTH_MODE"} if token else set()
    return {**{name: value for name, value in os.environ.items() if name not in left_out}, "FEDRAY_CLUSTER": str(state)}


def fedray(*arguments: str, state: Path, token: bool = False) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedray", *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=ROOT,
        env=environment(state, token=token),
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["up", "--cpus", "0"], "--cpus is 0; it must be at least 1"),
        (["up", "--hosts", "-1"], "--hosts is -1; it must be at least 1"),
        (["up", "--cpus", "many"], "fedray up: argument --cpus"),
        (["down", "now"], "fedray down: unrecognized arguments: now"),
    ],
)
def test_wrong_arguments_are_refused_with_exit_code_2(
    arguments: list[str], sentence: str, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedray.cli import main

    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err
    assert not state.exists()


def test_down_where_nothing_is_up_says_so(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fedray.cli import main

    assert main(["down"]) == 0
    assert capsys.readouterr().out == "nothing is up\n"


def test_down_leaves_a_cluster_of_somebody_else(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fedray.cli import main

    write(state, an_up(user="somebody"))
    assert main(["down"]) == 2
    assert "is somebody's" in capsys.readouterr().err
    assert state.exists()


def test_up_with_another_size_than_what_is_up_is_refused(state: Path) -> None:
    from fedray.cli import _Parser
    from fedray.sim.warm import up_command

    write(state, an_up())
    with pytest.raises(ConfigError, match="--cpus is 7; the cluster that is up has 2: give fedray down first"):
        up_command(["--cpus", "7"], parser=_Parser)


def test_a_cluster_of_other_code_that_still_runs_is_not_replaced_in_silence(state: Path) -> None:
    from fedray.cli import _Parser
    from fedray.sim.warm import up_command

    write(state, an_up(code="0"))
    with pytest.raises(ConfigError, match="other code of fedray"):
        up_command([], parser=_Parser)


# -- a cluster -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cluster of two CPUs with two warm hosts, with a token as by default; its file."""
    path = tmp_path_factory.mktemp("up") / "cluster.json"
    done = fedray("up", "--cpus", "2", "--hosts", "2", state=path, token=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("up after")
    yield path
    fedray("down", state=path)


def run(folder: Path, *overrides: str, state: Path) -> subprocess.CompletedProcess[str]:
    return fedray(*RUN, *overrides, f"hydra.run.dir={folder}", state=state, token=True)


def digests(folder: Path) -> list[str]:
    return [json.loads(line)["digest"] for line in (folder / "rounds.jsonl").read_text().splitlines()]


def free(state: Path) -> tuple[int, int]:
    """Drivers and clients of the pool that nobody has."""
    code = (
        "from fedray.sim import warm\nup = warm.find_cluster()\nassert up\nwarm.admit(up)\n"
        "from fedray.sim import ray_runtime\n"
        "ray_runtime.connect(up.address, num_cpus=None, temp_dir=None, dashboard=False)\n"
        "print(*warm.Lender.here().free())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(state),
    )
    assert done.returncode == 0, done.stderr
    drivers, clients = map(int, done.stdout.split())
    return drivers, clients


def wait_for(what: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def drivers_of(folder: Path) -> list[int]:
    """The process ids that the log of a run names."""
    return [int(line.split("driver process ")[1].split()[0]) for line in log_lines(folder) if "driver process" in line]


def log_lines(folder: Path) -> list[str]:
    return (folder / "log.txt").read_text().splitlines()


@pytest.mark.ray
def test_up_writes_down_what_lives_and_a_second_up_changes_nothing(up: Path) -> None:
    written = up.read_text()
    found = Up.read(written)
    assert found.head.lives
    assert all(process.lives for process in found.processes)
    # Ray's own, the pool, and two drivers with two clients.
    assert len(found.processes) >= 2 + 1 + 4
    assert found.token_path is not None
    assert Path(found.token_path).stat().st_mode & 0o077 == 0
    again = fedray("up", state=up, token=True)
    assert (again.returncode, again.stdout.split(":")[0]) == (0, "up already")
    assert up.read_text() == written


@pytest.mark.ray
def test_a_run_finds_the_cluster_borrows_its_processes_and_gives_the_bits_of_a_run_of_its_own(
    up: Path, tmp_path: Path
) -> None:
    found = Up.read(up.read_text())
    done = run(tmp_path / "warm", state=up)
    assert done.returncode == 0, done.stderr
    assert f"joining the cluster that is up at {found.address}" in done.stdout
    assert "each slot borrows a warm process" in done.stdout
    assert drivers_of(tmp_path / "warm")[0] in {process.pid for process in found.processes}
    alone = run(tmp_path / "inline", "runtime=inline", state=up)
    assert alone.returncode == 0, alone.stderr
    assert digests(tmp_path / "warm") == digests(tmp_path / "inline")
    assert free(up) == (2, 2)


@pytest.mark.ray
def test_what_comes_back_from_a_run_that_failed_or_was_killed_is_replaced(up: Path, tmp_path: Path) -> None:
    code = tmp_path / "own"
    (code / "pruner").mkdir(parents=True)
    (code / "pruner" / "breaks.yaml").write_text("_target_: breaking.Breaks\n")
    (code / "breaking.py").write_text(
        "import dataclasses\nfrom fedray.errors import RunError\nfrom fedray.round import Policy\n"
        "@dataclasses.dataclass(frozen=True, kw_only=True)\nclass Breaks(Policy):\n"
        "    def settle(self, server, sums, memory, ctx):\n        raise RunError('as it was asked to')\n"
    )
    failed = fedray(
        "--config-dir", str(code), *RUN, "pruner=breaks", f"hydra.run.dir={tmp_path / 'failed'}", state=up,
        token=True,
    )  # fmt: skip
    assert failed.returncode == 1
    assert "as it was asked to" in failed.stderr
    (first,) = drivers_of(tmp_path / "failed")
    wait_for(lambda: Process.of(first) is None)
    wait_for(lambda: free(up) == (2, 2))

    child = subprocess.Popen(
        [sys.executable, "-m", "fedray", *RUN, "rounds=500", f"hydra.run.dir={tmp_path / 'killed'}"],
        cwd=ROOT,
        env=environment(up, token=True),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    rows = tmp_path / "killed" / "rounds.jsonl"
    wait_for(lambda: rows.is_file() and rows.stat().st_size > 0)
    child.kill()
    child.wait(10)
    (second,) = drivers_of(tmp_path / "killed")
    assert second != first
    wait_for(lambda: Process.of(second) is None)
    wait_for(lambda: free(up) == (2, 2))
    after = run(tmp_path / "after", state=up)
    assert after.returncode == 0, after.stderr


@pytest.mark.ray
def test_runs_that_borrow_one_after_another_leave_nothing_of_their_code_behind(up: Path, tmp_path: Path) -> None:
    found = []
    for version_of_it in (1, 2):
        code = tmp_path / "own"
        (code / "pruner").mkdir(parents=True, exist_ok=True)
        (code / "pruner" / "mine.yaml").write_text("_target_: mine.Mine\n")
        (code / "mine.py").write_text(
            "import dataclasses, pathlib\nfrom fedray.round import Policy\n"
            "@dataclasses.dataclass(frozen=True, kw_only=True)\nclass Mine(Policy):\n"
            "    def settle(self, server, sums, memory, ctx):\n"
            f"        pathlib.Path({str(tmp_path / 'said')!r}).write_text('version {version_of_it}')\n"
            "        return server, sums, memory\n"
        )
        done = fedray(
            "--config-dir", str(code), *RUN, "pruner=mine", f"hydra.run.dir={tmp_path / str(version_of_it)}", state=up,
            token=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append((tmp_path / "said").read_text())
    assert found == ["version 1", "version 2"]


@pytest.mark.ray
def test_a_sweep_borrows_as_well_and_gives_back(up: Path, tmp_path: Path) -> None:
    done = fedray("-m", *RUN, "seed=0,1,2", f"hydra.sweep.dir={tmp_path / 'sweep'}", state=up, token=True)
    assert done.returncode == 0, done.stdout + done.stderr
    members = {process.pid for process in Up.read(up.read_text()).processes}
    drivers = [pid for log in (tmp_path / "sweep").glob("*/log.txt") for pid in drivers_of(log.parent)]
    assert len(drivers) == 3
    # The failed and the killed run of before have cost some of the first ones.
    assert free(up) == (2, 2)
    assert len(set(drivers)) <= 2
    assert members


@pytest.mark.ray
def test_a_run_that_asks_for_a_cluster_of_its_own_gets_it(up: Path, tmp_path: Path) -> None:
    done = fedray(*RUN, "runtime.num_cpus=1", f"hydra.run.dir={tmp_path / 'own'}", state=up)
    assert done.returncode == 0, done.stderr
    assert "runtime.num_cpus asks for one of its own" in done.stdout
    assert "starting Ray ..." in done.stdout


@pytest.mark.ray
def test_a_warm_process_that_died_while_nobody_used_it_harms_no_run(up: Path, tmp_path: Path) -> None:
    ours = Path(Up.read(up.read_text()).folder).name
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            raylet = line.parent.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            if (
                line.read_bytes().startswith(b"ray::DriverActor")
                and ours in Path(f"/proc/{raylet}/cmdline").read_text()
            ):
                os.kill(int(line.parent.name), signal.SIGKILL)
    done = fedray(*RUN, f"hydra.run.dir={tmp_path / 'run'}", state=up, token=True)
    assert done.returncode == 0, done.stderr
    wait_for(lambda: free(up) == (2, 2))


@pytest.mark.ray
def test_down_ends_what_up_started_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    try:
        assert fedray("up", "--cpus", "1", "--hosts", "1", state=path).returncode == 0
        found = Up.read(path.read_text())
        assert found.token_path is None  # this environment has tokens switched off
        done = fedray("down", state=path)
        assert (done.returncode, done.stdout) == (0, f"down: {found.address}\n"), done.stderr
        assert not any(process.lives for process in (found.head, *found.processes))
        assert not path.exists()
        assert not Path(found.folder).exists()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
