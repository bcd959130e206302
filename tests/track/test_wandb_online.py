"""Laws of the W&B view online: the real client against a server on the loopback, and what happens when it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from fedray.errors import ConfigError
from fedray.track.recording import Recording
from fedray.track.store import Store, read_manifest, read_rows
from fedray.track.wandb import WandbConfig, WandbTracker, sent_of, wandb_environment

MANIFEST = {
    "config": {"name": "grid", "seed": 2, "pruner": {"sparsity": 0.8}, "partition": {"alpha": 0.5}},
    "choices": {"pruner": "magnitude", "strategy": "fedavg", "correction": "fedprox", "personal": "none"},
    "data": {"name": "digits", "digest": "d1"},
}
ONLINE = WandbConfig(mode="online", project="study", tags=("mine",), timeout_s=20.0)


def row_of(number: int) -> dict[str, Any]:
    return {
        "round": number,
        "test/accuracy": number / 10,
        "wire/total_bytes": 1000 * number,
        "digest": f"{number:032x}",
    }


def tracker_of(folder: Path, config: WandbConfig = ONLINE) -> WandbTracker:
    return WandbTracker(config, run_dir=folder, run_id="run1", manifest=MANIFEST)


def recording_of(folder: Path, config: WandbConfig = ONLINE, resume_round: int | None = None) -> Recording:
    return Recording(
        folder=str(folder),
        run_id="run1",
        config_yaml="seed: 2\n",
        config=MANIFEST["config"],
        manifest=MANIFEST,
        wandb=config,
        resume_round=resume_round,
    )


def test_the_server_gets_the_start_the_history_the_summary_and_the_end(wandb_server: Any, tmp_path: Path) -> None:
    recorder = recording_of(tmp_path / "run").open()
    for number in range(1, 6):
        recorder.write(row_of(number), [], [], None)
    recorder.finish("finished")
    assert recorder.take_notes() == []
    run = wandb_server.runs["study/run1"]
    assert run.rows == read_rows(tmp_path / "run") == [row_of(number) for number in range(1, 6)]
    assert {key: run.summary[key] for key in row_of(5)} == row_of(5)
    assert run.exit_code == 0
    assert run.fields["project"] == "study"
    assert run.fields["displayName"] == "magnitude+fedprox 0.8 alpha=0.5 seed=2"
    assert run.fields["groupName"].startswith("grid-")
    assert run.fields["jobType"] == "train"
    assert run.fields["tags"] == ["magnitude", "fedavg", "digits", "fedprox", "mine"]
    assert run.config["pruner"]["value"] == {"sparsity": 0.8}, "nested"
    assert wandb_server.unknown == []


def test_rows_that_the_server_has_are_not_sent_again_and_those_that_it_lost_are(
    wandb_server: Any, tmp_path: Path
) -> None:
    recorder = recording_of(tmp_path).open()
    for number in (1, 2, 3, 4):
        recorder.write(row_of(number), [], [], None)
    recorder.finish("interrupted")
    run = wandb_server.runs["study/run1"]
    assert run.exit_code == 130
    # The server has rounds 1 to 2 of the 4 on the disk, though its summary, which travels faster, is of the fourth; and
    # the run goes on after its checkpoint of round 3.
    del run.lines[2], run.lines[3]
    recorder = recording_of(tmp_path, resume_round=3).open()
    for number in (4, 5):
        recorder.write(row_of(number), [], [], None)
    recorder.finish("finished")
    assert run.rows == [row_of(number) for number in range(1, 6)]


def test_another_runs_rows_under_the_same_id_are_not_mixed_with_ours(wandb_server: Any, tmp_path: Path) -> None:
    recorder = recording_of(tmp_path / "old").open()
    for number in (1, 2):
        recorder.write(row_of(number), [], [], None)
    recorder.finish("finished")
    recorder = recording_of(tmp_path / "new").open()
    for number in (1, 2, 3):
        recorder.write({**row_of(number), "digest": "other"}, [], [], None)
    recorder.finish("finished")
    assert wandb_server.runs["study/run1"].rows == [row_of(1), row_of(2)]
    [note] = recorder.take_notes()
    assert "has other results for run run1" in note
    assert "set tracker.wandb.project" in note
    assert len(read_rows(tmp_path / "new")) == 3


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        ("refuses_key", r"W&B refuses the API key: run `wandb login --relogin`"),
        ("refuses_project", r"project is 'study'"),
    ],
)
def test_a_refusal_ends_a_run_before_its_first_round_and_marks_it(
    wandb_server: Any, tmp_path: Path, refusal: str, sentence: str
) -> None:
    setattr(wandb_server, refusal, True)
    with pytest.raises(ConfigError, match=sentence):
        recording_of(tmp_path).open()
    manifest = read_manifest(tmp_path)
    assert manifest["status"] == "failed"
    assert "tracker.wandb." in manifest["error"]


@pytest.mark.parametrize("when", ["before the start", "in the middle", "at the end"])
def test_an_outage_of_wandb_never_ends_a_run(wandb_server: Any, tmp_path: Path, when: str) -> None:
    config = WandbConfig(mode="online", project="study", timeout_s=2.0, tables="none")
    wandb_server.down = when == "before the start"
    recorder = recording_of(tmp_path, config).open()
    for number in range(1, 4):
        if number == 2 and when == "in the middle":
            wandb_server.down = True
        recorder.write(row_of(number), [], [], None)
    if when == "at the end":
        wandb_server.refuses_rows = True  # the client does not even tell
    recorder.finish("finished")
    assert read_manifest(tmp_path)["status"] == "finished"
    assert read_rows(tmp_path) == [row_of(number) for number in range(1, 4)]
    [note] = recorder.take_notes()
    assert f"fedray wandb sync {tmp_path} sends it later" in note
    assert note in (tmp_path / "log.txt").read_text()
    assert sent_of(tmp_path) == {}, "what was not taken is not noted as sent"


def test_a_dead_helper_of_wandb_ends_neither_this_run_nor_the_next(wandb_server: Any, tmp_path: Path) -> None:
    recorder = recording_of(tmp_path / "one").open()
    recorder.write(row_of(1), [], [], None)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    if not children.exists():
        pytest.skip("needs /proc to find the helper")
    helpers = [
        int(pid)
        for pid in children.read_text().split()
        if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"_", b"-")
    ]
    assert helpers
    for pid in helpers:
        os.kill(pid, signal.SIGKILL)
    for number in (2, 3, 4):
        recorder.write(row_of(number), [], [], None)
    recorder.finish("finished")
    assert len(recorder.take_notes()) == 1
    assert len(read_rows(tmp_path / "one")) == 4
    tracker = tracker_of(tmp_path / "one")
    tracker.catch_up()
    tracker.finish(row_of(4), "finished")
    assert tracker.failure is None
    assert wandb_server.runs["study/run1"].rows == [row_of(number) for number in range(1, 5)]


def test_tables_of_layers_and_clients_and_artifacts_arrive_when_asked_for(wandb_server: Any, tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    def write(folder: Path, config: WandbConfig) -> None:
        with Store.create(folder, config_yaml="seed: 2\n", manifest=MANIFEST) as store:
            (folder / "final").mkdir()
            save_file(
                {"fc.weight": np.ones((2, 5), np.float32), "fc.bias": np.ones(2, np.float32)},
                folder / "final" / "model.safetensors",
            )
            kept = np.arange(10).reshape(2, 5) < 3
            save_file({"fc.weight": kept, "fc.bias": np.ones(2, bool)}, folder / "final" / "mask.safetensors")
            clients = [
                {"round": 1, "client": c, "num_examples": 7, "num_steps": 2, "test/accuracy": c / 10} for c in (4, 1)
            ]
            sent = {"round": 1, "part": "params", "value_bytes": 40, "mask_bytes": 2, "header_bytes": 1}
            transfers = [{**sent, "client": c, "direction": way} for c in (4, 1) for way in ("up", "down", "up")]
            store.write(row_of(1), clients, transfers)
            tracker = tracker_of(folder, config)
            tracker.catch_up()
            tracker.finish(row_of(1), "finished")
            assert tracker.failure is None

    def table(name: str) -> dict[str, Any]:
        [path] = [path for path in wandb_server.uploads if path.startswith(f"artifact/table/{name}")]
        found: dict[str, Any] = json.loads(wandb_server.uploads[path])
        return found

    write(tmp_path / "one", WandbConfig(mode="online", project="study", timeout_s=20.0, artifacts="final"))
    assert table("layers")["columns"] == ["layer", "shape", "params", "kept", "sparsity"]
    assert sorted(table("layers")["data"]) == [["fc.bias", "2", 2, 2, 0.0], ["fc.weight", "2x5", 10, 3, 0.7]]
    clients = [dict(zip(table("clients")["columns"], line, strict=True)) for line in table("clients")["data"]]
    assert [line["client"] for line in clients] == [1, 4]
    assert [line["test/accuracy"] for line in clients] == [0.1, 0.4]
    assert {(line["up_bytes"], line["down_bytes"], line["rounds"]) for line in clients} == {(86, 43, 1)}
    kinds = {one["artifactTypeName"] for one in wandb_server.artifacts}
    assert kinds == {"run_table", "mask", "model"}
    for name in ("model.safetensors", "mask.safetensors"):
        assert wandb_server.uploads[f"artifact/{name}"] == (tmp_path / "one" / "final" / name).read_bytes()
    assert [row["round"] for row in wandb_server.runs["study/run1"].rows] == [1], "a table is no row of the history"

    wandb_server.artifacts.clear()
    wandb_server.runs.clear()
    write(tmp_path / "two", WandbConfig(mode="online", project="study", timeout_s=20.0, tables="none"))
    assert wandb_server.artifacts == []


def test_a_driver_in_an_older_process_gets_the_variables_of_the_command_but_no_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    carried = wandb_environment()
    assert carried["WANDB_SWEEP_ID"] == "s1"
    assert "WANDB_API_KEY" not in carried
    program = """
    import os
    from fedray.track.wandb import _adopt

    os.environ |= {"WANDB_SWEEP_ID": "of another command", "WANDB_API_KEY": "its own"}
    _adopt({"WANDB_PROJECT": "p"})
    print(os.environ.get("WANDB_SWEEP_ID"), os.environ["WANDB_PROJECT"], os.environ["WANDB_API_KEY"])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "p", "its", "own"]
