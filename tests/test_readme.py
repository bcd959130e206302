"""What the README shows works: its pruner runs as printed, and its commands compose."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest
import yaml

import fedray
from fedray.config import conf_folder, register
from fedray.errors import ConfigError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`(mine/\S+)`\n\n```(?:python|yaml)\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
SHELL = "\n".join(re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
COMMANDS = [
    [*takewhile(lambda word: word != "#", shlex.split(line))]
    for line in SHELL.splitlines()
    if re.match(r"\s*python -m fedray ", line)
]


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
    overrides = [word for word in words[3:] if "=" in word and not word.startswith("hydra.")]
    sweep = [override.split(",")[0] for override in overrides] if "-m" in words else overrides
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
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("https://") or (ROOT / target).is_file(), (document, target)


def test_every_metric_of_the_readme_is_in_a_row(tmp_path: Path) -> None:
    run = fedray.run(
        [
            "+experiment=quickstart",
            "rounds=40",
            "runtime=inline",
            "tracker.progress=none",
            "tracker.wandb.mode=disabled",
        ],
        folder=tmp_path / "run",
    )
    table = README.split("| metric in `rounds.jsonl`")[1].split("\n\n")[0]
    names = [name for name in re.findall(r"`([a-z]+/[a-z_/<>]+|digest)`", table) if "<" not in name]
    assert len(names) >= 15
    assert [name for name in names if name not in run.final] == []
