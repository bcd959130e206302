"""Laws of the W&B view, offline and against its own reader."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedray.track
from fedray.errors import ConfigError
from fedray.track.store import Store, read_rows, recorded
from fedray.track.wandb import WandbConfig, WandbTracker

ROOT = Path(__file__).parents[2]
ROUNDS = 12
FINAL = {"round": ROUNDS, "test/accuracy": 0.75, "wire/total_bytes": 17, "digest": "ff", "test/loss": math.nan}
MANIFEST = {
    "config": {
        "name": "grid",
        "seed": 1,
        "pruner": {"_target_": "fedray.pruners.FedDST", "sparsity": 0.9, "nan": math.nan},
        "partition": {"alpha": 0.3},
    },
    "choices": {"pruner": "feddst", "strategy": "fedavg", "correction": "none", "personal": "none"},
    "data": {"name": "mnist", "digest": "d1"},
}


@dataclass(frozen=True)
class Logged:
    """A run read back with `wandb leet inspect`."""

    folder: Path
    run: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    exit_code: int


def row_of(number: int) -> dict[str, Any]:
    row = {
        "round": number,
        "train/loss": math.nan if number == 3 else 2.3 / number,
        "model/sparsity": 0.1 + 0.2,
        "model/layer_sparsity/conv1.weight": 0.25,
        "model/layer_sparsity/fc.weight": 0.75,
        "wire/total_bytes": 12_345_678_901_234 * number,
        "time/round_s": math.inf if number == 4 else 0.5,
        "digest": f"{number:016x}",
    }
    if number % 2 == 0:
        row["test/accuracy"] = number / 7
    return row


def inspect(path: Path, *options: str) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *options, "--json", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Logged:
    folder = tmp_path_factory.mktemp("run")
    config = WandbConfig(tags=("mine", "mnist"), group="study", histograms_every=5)
    tracker = WandbTracker(config, run_dir=folder, run_id="abc123", manifest=MANIFEST)
    with Store.create(folder, config_yaml="", manifest={}) as store:
        for number in range(1, ROUNDS + 1):
            store.write(row_of(number), [], [])
            tracker.log(row_of(number), [0.5, math.nan, 0.9] if number != 10 else None)
        store.finish("finished")
    tracker.finish(FINAL, "failed", "RunError: the disk is full")
    records = [json.loads(line) for line in inspect(folder / "wandb").splitlines()]
    return Logged(
        folder=folder,
        run=next(record["run"] for record in records if record["type"] == "run"),
        history=[record["history"]["item"] for record in records if record["type"] == "history"],
        summary=json.loads(inspect(folder / "wandb", "--summary"))["summary"],
        metrics=[record["metric"] for record in records if record["type"] == "metric"],
        exit_code=next(record["exit"]["exit_code"] for record in records if record["type"] == "exit"),
    )


def test_the_logged_values_are_exactly_those_of_the_store(logged: Logged) -> None:
    extra = ("_", "client/accuracy_hist.", "model/layer_sparsity_hist.")
    rows = [{key: item[key] for key in item if not key.startswith(extra)} for item in logged.history]
    assert len(rows) == ROUNDS
    assert rows == read_rows(logged.folder)
    assert rows[2]["train/loss"] is None, "a NaN is null in both"


def test_histograms_come_every_so_many_rounds_without_values_that_are_not_finite(logged: Logged) -> None:
    def counts(name: str) -> dict[int, int]:
        key = f"{name}.values"
        return {item["round"]: sum(item[key]) for item in logged.history if key in item}

    assert counts("client/accuracy_hist") == {5: 2}
    assert counts("model/layer_sparsity_hist") == {5: 2, 10: 2}


def test_the_step_axis_of_every_metric_is_the_round(logged: Logged) -> None:
    assert any(metric.get("name") == "round" for metric in logged.metrics)
    assert any(metric.get("glob_name") == "*" and metric["step_metric"] == "round" for metric in logged.metrics)


def test_the_summary_is_the_final_row(logged: Logged) -> None:
    expected = {key: value for key, value in FINAL.items() if key != "test/loss"}
    assert {key: logged.summary[key] for key in expected} == expected
    assert "test/loss" not in logged.summary, "what is not finite has no place in a summary"


def test_the_run_carries_its_identity_labels_and_nested_config(logged: Logged) -> None:
    config = {key: value for key, value in logged.run["config"]["update"].items() if not key.startswith("_")}
    assert config == recorded({**MANIFEST["config"], "choices": MANIFEST["choices"]})
    assert config["pruner"]["nan"] is None
    assert logged.run["run_id"] == "abc123"
    assert logged.run["display_name"] == "feddst 0.9 alpha=0.3 seed=1"
    assert (logged.run["project"], logged.run["run_group"], logged.run["job_type"]) == ("fedray", "study", "train")
    assert logged.run["tags"] == ["feddst", "fedavg", "mnist", "mine"]


def test_a_failed_run_is_marked_failed(logged: Logged) -> None:
    assert logged.exit_code == 1
    assert logged.summary["run/status"] == "failed"
    assert logged.summary["run/error"] == "RunError: the disk is full"


def test_wandb_writes_only_into_its_folder_of_the_run_directory(logged: Logged) -> None:
    names = {path.name for path in logged.folder.iterdir()}
    assert names == {"config.yaml", "manifest.json", "rounds.jsonl", "clients.jsonl", "transfers.jsonl", "wandb"}


def history_of(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in inspect(folder).splitlines()]
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def plain(manifest: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"config": {"seed": 0}} if manifest is None else manifest


def test_several_runs_in_one_process_are_logged_apart(tmp_path: Path) -> None:
    first, second = (
        WandbTracker(WandbConfig(), run_dir=tmp_path / name, run_id=name, manifest=plain()) for name in ("one", "two")
    )
    first.log({"round": 1, "a": 1})
    second.log({"round": 1, "a": 2})
    first.finish(None, "finished")
    second.finish(None, "finished")
    found = [[item["a"] for item in history_of(tmp_path / name / "wandb")] for name in ("one", "two")]
    assert found == [[1], [2]]


def test_a_resumed_offline_run_holds_every_row_of_the_store_once(tmp_path: Path) -> None:
    with Store.create(tmp_path, config_yaml="", manifest={}) as store:
        tracker = WandbTracker(WandbConfig(), run_dir=tmp_path, run_id="one", manifest=plain())
        for number in range(1, 5):
            store.write({"round": number, "a": number}, [], [])
            tracker.log({"round": number, "a": number})
        tracker.finish(None, "interrupted")
    # It goes on from the checkpoint of round 3.
    with Store.resume(tmp_path, last_round=3, config_yaml="", manifest={}) as store:
        tracker = WandbTracker(WandbConfig(), run_dir=tmp_path, run_id="one", manifest=plain())
        assert tracker.catch_up() == 3
        store.write({"round": 4, "a": 40}, [], [])
        tracker.log({"round": 4, "a": 40})
        tracker.finish(None, "finished")
    assert [(item["round"], item["a"]) for item in history_of(tmp_path / "wandb")] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert len(list(tmp_path.glob("wandb/offline-run-*-one"))) == 1
    assert len(list(tmp_path.glob("wandb/replaced/offline-run-*-one"))) == 1, "nothing is deleted"


def test_online_without_a_key_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_API_KEY_FILE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"`wandb login`.*, or set tracker\.wandb\.mode=offline"):
        WandbTracker(WandbConfig(mode="online"), run_dir=tmp_path, run_id="abc", manifest=plain())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "cloud"}, r"tracker\.wandb\.mode is 'cloud'; choose one of online, offline, disabled"),
        ({"tables": "some"}, r"tracker\.wandb\.tables is 'some'; choose one of all, layers, clients, none"),
        ({"artifacts": "all"}, r"tracker\.wandb\.artifacts is 'all'; choose one of none, masks, final"),
        ({"histograms_every": -1}, r"histograms_every is -1; it counts rounds"),
        ({"timeout_s": 0.0}, r"timeout_s is 0\.0; it must be a number of seconds above 0"),
        ({"timeout_s": math.nan}, r"timeout_s is nan"),
        ({"project": "a/b"}, r"project is 'a/b'; it must have 1 to 128 characters"),
        ({"tags": ("x" * 65,)}, r"tags of 1 to 64 characters"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WandbConfig(**settings)


def test_disabled_imports_no_wandb_and_the_room_imports_nothing_heavy(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
import fedray.track.progress, fedray.track.store
from fedray.track.wandb import WandbConfig, WandbTracker
tracker = WandbTracker(WandbConfig(mode="disabled"), run_dir=Path({str(tmp_path)!r}), run_id="a", manifest={{}})
tracker.log({{"round": 10}}, [0.5])
tracker.finish({{"round": 10}}, "finished")
heavy = {{"wandb", "ray", "torch", "hydra", "omegaconf", "numpy", "rich"}} & set(sys.modules)
assert not heavy, heavy
inner = {{name for name in sys.modules if name.startswith("fedray.")}}
assert all(name == "fedray.errors" or name.startswith("fedray.track") for name in inner), inner
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    assert not list(tmp_path.iterdir())


def test_only_the_wandb_module_mentions_the_import() -> None:
    folder = Path(fedray.track.__file__).parent
    importing = {path.name for path in folder.glob("*.py") if "import wandb" in path.read_text()}
    assert importing == {"wandb.py"}


def test_the_configuration_file_has_the_defaults_of_the_dataclass_and_a_comment_for_each_key() -> None:
    path = ROOT / "conf" / "tracker" / "default.yaml"
    config = yaml.safe_load(path.read_text())
    assert config["progress"] == "auto"
    default = WandbConfig()
    expected = {item.name: getattr(default, item.name) for item in fields(WandbConfig)}
    assert config["wandb"] == {**expected, "tags": list(default.tags)}
    lines = path.read_text().splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        assert line.lstrip().startswith("#") or above.lstrip().startswith("#"), f"no comment above {line!r}"
