"""What the README shows works: its pruner runs as printed, and its commands compose."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fedray
from fedray import wire
from fedray.config import conf_folder, register
from fedray.errors import ConfigError
from fedray.report.conventions import CONVENTIONS
from fedray.track.store import read_transfers
from fedray.wire.masks import CODER_NAMES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WIRE = (ROOT / "docs" / "wire.md").read_text(encoding="utf-8")
SETTINGS = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`(mine/\S+)`\n\n```(?:python|yaml)\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
SHELL = "\n".join(re.findall(r"^```bash\n(.*?)^```", README + WIRE + SETTINGS, re.MULTILINE | re.DOTALL)).replace(
    "\\\n", " "
)
COMMANDS = [shlex.split(line, comments=True) for line in SHELL.splitlines() if re.match(r"\s*python -m fedray ", line)]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """The folder that the README describes, outside the repository."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "mine"


def test_the_pruner_of_the_readme_runs_from_its_own_folder(mine: Path) -> None:
    (command,) = [words for words in COMMANDS if "--config-dir" in words]
    assert sorted(FILES) == ["mine/pruner/rows.yaml", "mine/rows.py"]
    extra = ["rounds=3", "runtime=inline", "tracker.wandb.mode=disabled", "hydra.run.dir=run"]
    done = subprocess.run(
        [sys.executable, *command[1:], *extra], cwd=mine.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    run = fedray.Run(mine.parent / "run")
    # 64 x 200 + 200 x 200 weights are prunable without the last layer; 0.3 of each tensor is a whole number.
    assert [row["model/sparsity"] for row in run.rows if row["round"] >= 1] == [0.0, 0.7, 0.7]
    weight = run.state_dict()["layers.1.weight"]
    dead = (weight == 0).all(dim=1)
    assert int(dead.sum()) == 140  # 0.7 of 200 neurons, as a whole


def test_the_pruner_of_the_readme_refuses_what_it_says(mine: Path) -> None:
    with pytest.raises(ConfigError, match=r"pruner\.sparsity is 1\.5; it is the fraction removed, in \[0, 1\)"):
        fedray.run(["pruner=rows", "pruner.sparsity=1.5", "runtime=inline"], config_dir=mine, folder=mine / "run")


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[3:]))
def test_the_commands_of_the_readme_compose(words: list[str], mine: Path) -> None:
    from hydra import compose, initialize_config_dir

    register()
    overrides = [word for word in words[3:] if "=" in word and not word.startswith(("hydra.", "--"))]
    saved = [word.partition("=")[2] for word in words if word.startswith("+sweep=")]
    if saved:  # its cells are composed by the tests of saved sweeps
        assert [name for name in saved if not (Path(conf_folder()) / "sweep" / f"{name}.yaml").is_file()] == []
        return
    whole = "-m" not in words
    overrides = [one.replace("glob(*)", "random") for one in overrides]  # composing alone does not expand it
    sweep = [one if whole or "[" in one or "{" in one else one.split(",")[0] for one in overrides]
    with initialize_config_dir(conf_folder(), version_base="1.3"):
        cfg = compose("config", overrides=[*sweep, f"hydra.searchpath=[file://{mine}]"])
    assert cfg.rounds >= 1


def test_the_python_of_the_readme_is_valid_and_its_names_exist() -> None:
    for block in re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        compile(block, "README.md", "exec")
    for name in ("final", "folder", "rows", "state_dict"):
        assert hasattr(fedray.Run, name) or name in fedray.Run.__annotations__


def test_the_kubernetes_example_has_the_shape_of_a_ray_job() -> None:
    (text,) = re.findall(r"^```yaml\n(apiVersion.*?)^```", README, re.MULTILINE | re.DOTALL)
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = [container["image"] for group in groups for container in group["template"]["spec"]["containers"]]
    assert {image.rsplit(":", 1)[1] for image in images} == {cluster["rayVersion"]}


def test_every_file_that_the_documents_link_to_exists() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "docs/wire.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("https://") or (ROOT / target).is_file(), (document, target)


def test_every_metric_of_the_readme_is_in_a_row(tmp_path: Path) -> None:
    run = fedray.run(
        [
            "+experiment=quickstart",
            "personal=ditto",
            "rounds=40",
            "pruner.finish=40",
            "stop.targets=[0.1]",
            "runtime=inline",
            "tracker.progress=none",
            "tracker.wandb.mode=disabled",
        ],
        folder=tmp_path / "run",
    )
    table = README.split("| metric in `rounds.jsonl`")[1].split("\n\n")[0]
    names = [name for name in re.findall(r"`([a-z]+/[a-z_/<>]+|digest)`", table) if "<" not in name]
    assert len(names) >= 15
    assert {"target/0.1/rounds", "target/0.1/bytes", "target/0.1/seconds"} <= set(run.final)
    names = [name for name in names if name not in ("test/mse", "test/perplexity")]  # of other kinds of data
    assert [name for name in names if name not in run.final] == []


def test_the_transfer_of_the_wire_page_is_what_a_run_records(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in re.findall(r"^{.*}$", WIRE, re.MULTILINE)]
    run = fedray.run(
        [
            "+experiment=quickstart",
            "wire=topk_int8",
            "rounds=2",
            "pruner.start=1",
            "pruner.finish=2",
            "runtime=inline",
            "tracker.progress=none",
            "tracker.wandb.mode=disabled",
        ],
        folder=tmp_path / "run",
    )
    recorded = [
        row for row in read_transfers(run.folder) if (row["round"], row["client"], row["direction"]) == (1, 3, "up")
    ]
    counts = ("size", "params", "weights", "bits", "chain", "value_bytes", "header_bytes")
    assert [[row[name] for name in counts] for row in recorded] == [[line[name] for name in counts] for line in lines]
    # Which values are largest, and so how far apart, may differ with the processor's arithmetic.
    assert recorded[1]["mask_bytes"] == pytest.approx(lines[1]["mask_bytes"], rel=0.02)


def test_every_wire_is_in_the_readme_and_every_stage_and_convention_on_the_wire_page() -> None:
    wires = {path.stem for path in (ROOT / "conf" / "wire").glob("*.yaml")}
    (listed,) = re.findall(r"^`wire=([a-z0-9_|]+)`", README, re.MULTILINE)
    assert set(listed.split("|")) | {"float32"} == wires
    for name in wire.__all__:
        if isinstance(getattr(wire, name), type) and hasattr(getattr(wire, name), "changes_only") and name != "Chain":
            assert f"`{name}" in WIRE, name
    assert [name for name in CONVENTIONS if f"`{name}`" not in WIRE] == []
    assert [name for name in CODER_NAMES if name not in ("none", "known") and f"`{name}`" not in WIRE] == []


def test_docs_pruners_has_every_pruner() -> None:
    text = (ROOT / "docs" / "pruners.md").read_text(encoding="utf-8")
    for path in (Path(conf_folder()) / "pruner").glob("*.yaml"):
        assert f"`{path.stem}`" in text, path.stem


@pytest.mark.parametrize(
    "group", ["strategy", "correction", "personal", "sampling", "availability", "partition", "data"]
)
def test_docs_settings_names_every_choice_of_a_group(group: str) -> None:
    for path in sorted((Path(conf_folder()) / group).glob("*.yaml")):
        # Data sets of a file are named in one list, without the generic ones that commands show.
        assert re.search(rf"\b{path.stem}\b", SETTINGS) or path.stem == "none", f"{group}={path.stem}"
