"""The sweeps that W&B's agents work off: their files are sound, and an agent's command is a run of the sweep."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedray.track.store import read_manifest, read_rows

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "conf" / "wandb_sweeps").glob("*.yaml"))


def corners(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Each parameter at each of its values, or ends, the others at their first."""
    ends = {name: one["values"] if "values" in one else [one["min"], one["max"]] for name, one in parameters.items()}
    first = {name: values[0] for name, values in ends.items()}
    return [{**first, name: value} for name, values in ends.items() for value in values]


def command(sweep: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """What W&B's agent starts for these values, by the agent's own code."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    filled = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    words: list[str] = []
    for word in sweep["command"]:
        known = {"${env}": ["/usr/bin/env"], "${interpreter}": ["python"]}
        words += known.get(word, filled.get(word[2:-1], [word]) if word.startswith("${") else [word])
    return words


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_command_of_a_sweep_composes_to_what_it_says(path: Path) -> None:
    from fedray.cli import _compose
    from fedray.config import assemble

    sweep = yaml.safe_load(path.read_text())
    assert sweep["metric"] == {"name": "test/accuracy", "goal": "maximize"}
    assert sweep["project"] == "fedray"
    for values in corners(sweep["parameters"]):
        words = command(sweep, values)
        assert words[:4] == ["/usr/bin/env", "python", "-m", "fedray"]
        cfg, choices = _compose(words[4:], None)
        for name, value in values.items():
            at: Any = choices if name in choices else cfg
            for part in [name] if name in choices else name.split("."):
                at = at[part]
            assert at == value, name
        assert cfg.tracker.wandb.mode == "online", "an agent's runs are W&B's"
    assemble(cfg, choices=choices)  # and it is a run


@pytest.mark.full
def test_an_agent_of_wandb_runs_the_command_under_the_id_that_the_sweep_gave_it(
    wandb_server: Any, tmp_path: Path
) -> None:
    sweep = yaml.safe_load((ROOT / "conf" / "wandb_sweeps" / "pruners_digits.yaml").read_text())
    sweep["command"][-1:-1] = ["rounds=2", "num_clients=4", "cohort=2", f"hydra.run.dir={tmp_path / 'run'}"]
    wandb_server.sweep = yaml.safe_dump(sweep)
    values = {"pruner": "random", "pruner.sparsity": 0.8, "seed": 1}
    wandb_server.commands = [
        {
            "id": "c1", "type": "run", "run_id": "fromsweep", "program": "fedray",
            "args": {name: {"value": value} for name, value in values.items()},
        }
    ]  # fmt: skip
    # The agent says `python`: the one of these tests.
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    environment.pop("WANDB_SERVICE", None)
    agent = [sys.executable, "-m", "wandb", "agent", "--count", "1", "lab/fedray/sweep1"]
    done = subprocess.run(agent, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert read_manifest(tmp_path / "run")["status"] == "finished", done.stderr[-2000:]
    rows = read_rows(tmp_path / "run")
    assert [row["round"] for row in rows] == [1, 2]
    run = wandb_server.runs["fedray/fromsweep"]
    assert run.rows == rows
    assert run.fields["sweep"] == "sweep1"
    assert run.fields["displayName"] == "random 0.8 alpha=0.3 seed=1"
    assert run.config["pruner"]["value"] == "random", "what is swept goes by the sweep's names"
    assert run.config["settings"]["value"]["pruner"]["sparsity"] == 0.8
