"""What docs/write_a_pruner.md shows works: its files are written as printed, its pruner is checked and tested by the
commands that it prints, and run with the settings of its first run for fewer rounds, on a smaller model."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fedray
from fedray.cli import main
from fedray.errors import ConfigError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "write_a_pruner.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`(mine/\S+)`\n\n```(?:python|yaml)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
QUIET = ["runtime=inline", "tracker.progress=none", "tracker.wandb.mode=disabled"]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "mine"
    sys.modules.pop("swap", None)


def test_a_new_pruner_is_one_file_and_one_yaml(mine):
    assert sorted(FILES) == ["mine/pruner/swap.yaml", "mine/swap.py", "mine/test_swap.py"]
    assert len(FILES["mine/swap.py"].splitlines()) < 100
    settings = yaml.safe_load(FILES["mine/pruner/swap.yaml"])
    for name in settings:
        # A comment of one line stands above every setting.
        assert re.search(rf"^# \S.*\n{name}: ", FILES["mine/pruner/swap.yaml"], re.MULTILINE)


def test_the_pruner_of_the_page_is_checked_as_the_page_shows(mine, capsys):
    (command,) = [words for words in COMMANDS if words[:2] == ["fedray", "check"]]
    assert main([*command[1:], "--only", "runs,cuts_what_it_says,budget_met,zeros_stay_zero"]) == 0
    (shown,) = re.findall(r"^```\n(mine/pruner/swap.yaml: .*?)  \.\.\.\n```", PAGE, re.MULTILINE | re.DOTALL)
    assert capsys.readouterr().out == shown


@pytest.mark.full
def test_the_pruner_of_the_page_keeps_every_law(mine, capsys):
    (command,) = [words for words in COMMANDS if words[:2] == ["fedray", "check"]]
    assert main(command[1:]) == 0, capsys.readouterr().out


@pytest.mark.full
def test_the_test_file_of_the_page_has_a_test_for_each_law(mine):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_swap.py"],
        cwd=mine,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert "15 passed, 1 skipped" in done.stdout


def test_the_pruner_of_the_page_runs_and_swaps_when_it_says(mine):
    command = next(words for words in COMMANDS if words[:3] == ["python", "-m", "fedray"] and "-m" not in words[3:])
    assert command[3:5] == ["--config-dir", "mine"]
    overrides = [word for word in command[5:] if not word.startswith("rounds=")]
    run = fedray.run([*overrides, "rounds=7", "model.hidden=[20]", *QUIET], config_dir=mine, folder=mine / "run")
    assert [row["round"] for row in run.rows if row["prune/churn"] > 0] == [3, 6]
    # 0.2 of 64 * 20 + 20 * 10 weights, in each layer a whole number: 256 + 40.
    assert {row["model/sparsity"] for row in run.rows} == {0.8}
    with pytest.raises(ConfigError, match=r"pruner\.ratio is 2\.0; it is the fraction of kept weights swapped, 0 to 1"):
        fedray.run(["pruner=swap", "pruner.ratio=2.0", *QUIET], config_dir=mine, folder=mine / "none")
