"""The smallest experiment runs every pruner of conf/pruner, each as its yaml has it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from fedray.config import assemble, conf_folder, register

PRUNERS = sorted(path.stem for path in (Path(conf_folder()) / "pruner").glob("*.yaml"))


def test_every_pruner_is_accepted_by_the_smallest_experiment():
    register()
    with initialize_config_dir(conf_folder(), version_base="1.3"):
        for pruner in PRUNERS:
            made = assemble(compose("config", overrides=["+experiment=zoo_smoke", f"pruner={pruner}"]))
            assert made.spec.rounds == 10
            assert made.spec.validation > 0
            assert made.population.public() is not None


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_one_sweep_runs_every_pruner_for_ten_rounds(tmp_path):
    command = [sys.executable, "-m", "fedray", "-m", "+experiment=zoo_smoke", "pruner=glob(*)"]
    done = subprocess.run(
        [*command, f"hydra.sweep.dir={tmp_path}"], cwd=tmp_path, capture_output=True, text=True, timeout=1100
    )
    assert done.returncode == 0, done.stderr
    manifests = [json.loads(path.read_text()) for path in tmp_path.glob("*/manifest.json")]
    assert sorted(found["choices"]["pruner"] for found in manifests) == PRUNERS
    for found in manifests:
        assert (found["status"], found["rounds"]) == ("finished", 10), found["choices"]["pruner"]
