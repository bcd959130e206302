"""Laws of `fedray wandb report`: what the page at W&B is told to show, and that the numbers in it are the record's."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedray.errors import ConfigError
from fedray.report.wandb import wandb_command
from fedray.track.store import Store, read_rows

PARTS = [f"wire/{way}_{part}_bytes" for way in ("up", "down") for part in ("value", "mask", "header")]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(f"{self.prog}: {message}")


def write(
    folder: Path, *, pruner: str = "magnitude", sparsity: float = 0.5, seed: int = 0, status: str = "finished",
    wandb: dict[str, Any] | None = None, error: str | None = None,
) -> Path:  # fmt: skip
    manifest = {
        "run_id": f"{pruner}-{sparsity}-{seed}",
        "name": "grid",
        "config": {
            "name": "grid",
            "seed": seed,
            "pruner": {"_target_": f"x.{pruner}", "sparsity": sparsity},
            "tracker": {"wandb": {"project": "study", "entity": None, "group": None} | (wandb or {})},
        },
        "choices": {"pruner": pruner, "strategy": "fedavg"},
    }
    with Store.create(folder, config_yaml="", manifest=manifest) as store:
        for number in range(1, 4):
            row = {
                "round": number,
                "test/accuracy": number / 5 + sparsity / 10 + seed / 100,
                "test/loss": 1 / number,
                "model/sparsity": sparsity,
                "wire/total_bytes": number * 1_000_000,
                "wire/total_up_bytes": number * 400_000,
                "wire/total_down_bytes": number * 600_000,
                "wire/total_ratio": 2.0,
                "client/accuracy_mean": 0.5, "client/accuracy_p10": 0.2, "client/accuracy_p90": 0.8,
            }  # fmt: skip
            row |= {key: (index + 1) * 100_000 * (seed + 1) for index, key in enumerate(PARTS)}
            store.write(row, [], [])
        if status != "running":
            store.finish(status, **({} if error is None else {"error": error}))  # type: ignore[arg-type]
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep"
    for seed in (0, 1):
        write(folder / f"m5-{seed}", seed=seed)
        write(folder / f"f9-{seed}", pruner="feddst", sparsity=0.9, seed=seed)
    write(folder / "broken", pruner="feddst", sparsity=0.5, status="failed", error="ClientError: no memory")
    return folder


def report(*arguments: Any) -> None:
    wandb_command(["report", *(str(argument) for argument in arguments)], parser=Parser)


def panels(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for block in spec["blocks"]:
        if block["type"] == "panel-grid":
            yield from block["metadata"]["panelBankSectionConfig"]["panels"]


def markdown(spec: dict[str, Any]) -> str:
    return "\n".join(block["content"] for block in spec["blocks"] if block["type"] == "markdown-block")


def dry(folder: Path, *more: Any) -> dict[str, Any]:
    path = folder.parent / "out" / "spec.json"
    report(folder, "--dry-run", path, *more)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def check(spec: dict[str, Any], sweep: Path) -> None:
    """The panels that the page must have, the runs that it is about and the numbers in its tables."""
    drawn = [(panel["viewType"], panel.get("config", {})) for panel in panels(spec)]
    lines = [(one["xAxis"], tuple(one["metrics"])) for kind, one in drawn if kind == "Run History Line Plot"]
    assert lines == [
        ("round", ("test/accuracy",)),
        ("round", ("test/loss",)),
        ("wire/total_bytes", ("test/accuracy",)),
        ("round", tuple(PARTS[:3])),
        ("round", tuple(PARTS[3:])),
        ("round", ("client/accuracy_mean", "client/accuracy_p10", "client/accuracy_p90")),
    ]
    [scatter] = [one for kind, one in drawn if kind == "Scatter Plot"]
    assert (scatter["xAxis"], scatter["yAxis"]) == ("summary:model/sparsity", "summary:test/accuracy")
    assert [kind for kind, _ in drawn].count("Run Comparer") == 1
    finished = {"magnitude-0.5-0", "magnitude-0.5-1", "feddst-0.9-0", "feddst-0.9-1"}
    grids = [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]
    for grid in grids:
        [runs] = grid["runSets"]
        [chosen] = runs["filters"]["filters"]
        assert (chosen["key"], chosen["op"], set(chosen["value"])) == (
            {"section": "run", "name": "name"},
            "IN",
            finished,
        )
        assert runs["grouping"] == [{"section": "run", "name": "group"}], "seeds are averaged"
        places = [(panel["layout"]["x"], panel["layout"]["y"]) for panel in grid["panelBankSectionConfig"]["panels"]]
        assert len(set(places)) == len(places), "no panel lies on another"
    text = markdown(spec)
    for pruner in ("magnitude", "feddst"):
        runs = [read_rows(folder) for folder in sweep.iterdir() if folder.name.startswith(pruner[0])]
        accuracies = [rows[-1]["test/accuracy"] for rows in runs]
        assert f"{statistics.mean(accuracies):.4f} ± {statistics.stdev(accuracies):.4f}" in text
        megabytes = statistics.mean(sum(row["wire/up_value_bytes"] for row in rows) for rows in runs) / 1e6
        line = next(line for line in text.partition("up value MB")[2].splitlines() if line.startswith(f"| {pruner}"))
        assert f"{megabytes:.3g}" in line
    assert "broken is left out: failed: ClientError: no memory." in text


def test_the_page_has_every_panel_and_the_numbers_of_the_record(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(dry(sweep), sweep)
    assert "the specification of 'grid, 2 settings, 4 runs', 4 runs; nothing was sent" in capsys.readouterr().out


def test_the_server_gets_the_same_page_as_a_dry_run_writes(
    sweep: Path, wandb_server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="project 'study' is not at W&B; send the runs first, with fedray wandb sync"):
        report(sweep)
    wandb_server.projects.append("study")
    report(sweep, "--title", "Pruners")
    said = capsys.readouterr().out
    assert wandb_server.url in said.splitlines()[0]
    assert "not known to be at W&B: f9-0 and 3 more; fedray wandb sync" in said
    [sent] = wandb_server.reports
    assert (sent["displayName"], sent["projectName"], sent["entityName"]) == ("Pruners", "study", "lab")
    spec = json.loads(sent["spec"])
    check(spec, sweep)
    for grid in (block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"):
        assert grid["runSets"][0]["project"]["name"] == "study"

    def shape(spec: dict[str, Any]) -> str:
        """The page without its random ids and without the project that only the server knows."""

        def cleaned(node: Any) -> Any:
            if isinstance(node, dict):
                gone = ("id", "__id__", "ref", "project", "refId", "name" if "runFeed" in node else "id")
                return {key: cleaned(value) for key, value in node.items() if key not in gone}
            return [cleaned(one) for one in node] if isinstance(node, list) else node

        return json.dumps(cleaned(spec), sort_keys=True)

    assert shape(spec) == shape(dry(sweep))
    assert wandb_server.unknown == []


def test_groups_of_the_users_own_are_not_averaged(tmp_path: Path) -> None:
    for pruner in ("magnitude", "feddst"):
        write(tmp_path / "s" / pruner, pruner=pruner, wandb={"group": "mine"})
    spec = dry(tmp_path / "s")
    [runs] = next(block for block in spec["blocks"] if block["type"] == "panel-grid")["metadata"]["runSets"]
    assert runs["grouping"] == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--metric", "test/accuracyy"], r"test/accuracyy is in no run; did you mean test/accuracy"),
        (["--project", "a/b"], r"tracker\.wandb\.project is 'a/b'"),
        (["--dry-run", "/proc/nowhere/x.json"], r"--dry-run /proc/nowhere/x\.json cannot be written"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(sweep: Path, arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        report(sweep, *(arguments if "--dry-run" in arguments else [*arguments, "--dry-run", sweep / "x.json"]))


def test_runs_of_several_projects_need_to_be_told_which(sweep: Path) -> None:
    write(sweep / "other", seed=7, wandb={"project": "another"})
    with pytest.raises(ConfigError, match=r"told 2 values of tracker\.wandb\.project, another, study; give --project"):
        report(sweep, "--dry-run", sweep / "x.json")
    assert dry(sweep, "--project", "study")


def test_an_unknown_command_is_refused() -> None:
    with pytest.raises(ConfigError, match="invalid choice: 'upload'"):
        wandb_command(["upload"], parser=Parser)


def test_without_the_extra_one_sentence_names_it(sweep: Path) -> None:
    program = f"""
import sys
sys.modules["wandb_workspaces"] = None
from fedray.cli import main
sys.exit(main(["wandb", "report", {str(sweep)!r}, "--dry-run", {str(sweep / "x.json")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "fedray: fedray wandb report needs wandb-workspaces, which is not installed: pip install 'fedray[report]'"
    ]


def test_the_commands_that_read_runs_import_neither_torch_nor_ray_nor_hydra(sweep: Path) -> None:
    program = f"""
import sys
from fedray.cli import main
assert main(["wandb", "report", {str(sweep)!r}, "--dry-run", {str(sweep / "x.json")!r}]) == 0
assert main(["wandb", "sync", {str(sweep)!r}, "--mode", "offline", "--rate", "1000"]) == 0
print(sorted({{"torch", "ray", "hydra", "omegaconf"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
