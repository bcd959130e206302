"""The files for clusters have the shape that those who read them expect, and start commands that fedray understands."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[1] / "scripts" / "cluster"
FILES = ("ray_job.sh", "slurm.sbatch", "kuberay_rayjob.yaml")


def comments(name: str) -> str:
    lines = [line.strip() for line in (FOLDER / name).read_text().splitlines()]
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#") and not line.startswith("#SBATCH"))


def composed(overrides: list[str], tmp_path: Path) -> int:
    """How many cells fedray makes of this command, with one pruner and one seed."""
    from fedray.cli import _composed_sweep

    command = _composed_sweep([*overrides, "pruner=feddst", "seed=0", f"hydra.sweep.dir={tmp_path}/sweep"], None)
    assert all(request.config is not None for request in command.requests)
    return len(command.requests)


def test_every_file_is_one_that_the_tests_know() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_each_file_says_how_it_authenticates_and_what_storage_must_be_shared(name: str) -> None:
    said = comments(name)
    assert "Authentication:" in said
    assert "RAY_AUTH_MODE" in said
    assert "Shared storage:" in said


@pytest.mark.parametrize("name", ["ray_job.sh", "slurm.sbatch"])
def test_the_scripts_are_valid_bash_and_stop_at_the_first_error(name: str) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run([bash, "-n", FOLDER / name], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    assert "set -euo pipefail" in (FOLDER / name).read_text()


def stand_in(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def run_script(name: str, arguments: list[str], tmp_path: Path, **variables: str) -> tuple[list[str], str]:
    """The words that the script's last command got, from stand-ins for what starts it, and standard error."""
    stand_ins = tmp_path / "bin"
    say = 'for word in "$@"; do printf "%s\\n" "$word"; done'
    stand_in(stand_ins, "ray", say)
    stand_in(stand_ins, "srun", say)
    stand_in(stand_ins, "scontrol", "printf 'node1\\nnode2\\n'")
    done = subprocess.run(
        ["bash", FOLDER / name, *arguments],
        capture_output=True,
        text=True,
        timeout=20,
        env={"PATH": f"{stand_ins}:/usr/bin:/bin", **variables},
    )
    return done.stdout.splitlines(), done.stderr


def test_the_job_that_is_given_in_is_a_sweep_that_fedray_composes(tmp_path: Path) -> None:
    words, problem = run_script(
        "ray_job.sh", ["-m", "+sweep=pruners_digits"], tmp_path, HEAD="http://head:8265", OUTPUTS="/shared/my runs"
    )
    assert problem == ""
    options, entry = words[: words.index("--")], words[words.index("--") + 1 :]
    assert options[:4] == ["job", "submit", "--address", "http://head:8265"]
    assert entry[:5] == ["python", "-m", "fedray", "-m", "+sweep=pruners_digits"]
    # `ray job submit` joins the words with quotes around them, and a shell takes them apart again.
    again = shlex.split(" ".join(map(shlex.quote, entry)))
    overrides = [word for word in again[4:] if not word.startswith("hydra.sweep.dir")]
    assert composed(overrides, tmp_path) == 3
    assert "hydra.sweep.dir='/shared/my runs/${name}/sweep'" in again


@pytest.mark.parametrize("name", ["ray_job.sh", "slurm.sbatch"])
def test_a_script_without_a_shared_folder_says_so_and_starts_nothing(name: str, tmp_path: Path) -> None:
    words, problem = run_script(name, ["-m"], tmp_path, HEAD="http://head:8265")
    assert words == []
    assert "OUTPUTS" in problem


def test_slurm_starts_ray_on_all_nodes_and_one_sweep_on_the_first(tmp_path: Path) -> None:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    slurm |= {"SLURM_CPUS_PER_TASK": "16", "OUTPUTS": str(tmp_path / "out")}
    words, problem = run_script("slurm.sbatch", ["-m", "+sweep=pruners_digits"], tmp_path, **slurm)
    assert problem == ""
    start, entry = words[: words.index("--")], words[words.index("--") + 1 :]
    assert start[1:] == "ray symmetric-run --address node1:20007 --min-nodes 2 --num-cpus 16".split()
    assert entry[:5] == ["python", "-m", "fedray", "-m", "+sweep=pruners_digits"]
    assert "runtime.address=node1:20007" in entry
    assert composed([word for word in entry[4:] if not word.startswith("hydra.sweep.dir")], tmp_path) == 3
    # The secret of the job goes with it.
    assert [path.name for path in (tmp_path / "out").iterdir()] == []


def test_ray_knows_the_options_that_the_scripts_use() -> None:
    from click.testing import CliRunner
    from ray.dashboard.modules.job.cli import submit
    from ray.scripts.symmetric_run import symmetric_run

    for command, name in ((submit, "ray_job.sh"), (symmetric_run, "slurm.sbatch")):
        said = CliRunner().invoke(command, ["--help"]).output
        line = re.search(
            r"ray (job submit|symmetric-run)((?:.*\\\n)*.*)", (FOLDER / name).read_text().split("set -euo")[1]
        )
        assert line is not None
        used = re.findall(r"(--[a-z-]+) ", line[0].split(" -- ")[0])
        assert used
        # Options of `ray start` are handed on by symmetric-run.
        assert set(used) - {"--num-cpus"} <= set(re.findall(r"--[a-z-]+", said))


def rayjob() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / "kuberay_rayjob.yaml").read_text())
    return found


def test_the_rayjob_has_the_fields_of_kuberay_and_none_that_it_does_not_have() -> None:
    job = rayjob()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    known = {
        "entrypoint", "entrypointNumCpus", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "submissionMode",
        "backoffLimit", "rayClusterSpec",
    }  # fmt: skip
    assert set(job["spec"]) == known
    cluster = job["spec"]["rayClusterSpec"]
    assert set(cluster) == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert set(cluster["headGroupSpec"]) == {"rayStartParams", "template"}
    (workers,) = cluster["workerGroupSpecs"]
    assert set(workers) == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def test_all_pods_of_the_rayjob_have_one_image_of_rays_version_and_the_shared_folder() -> None:
    cluster = rayjob()["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"].endswith(f":{cluster['rayVersion']}")
        (mount,) = container["volumeMounts"]
        (volume,) = group["template"]["spec"]["volumes"]
        assert (mount["mountPath"], mount["name"]) == ("/outputs", volume["name"])
        assert volume["persistentVolumeClaim"]["claimName"]


def test_the_entrypoint_of_the_rayjob_is_a_sweep_that_fedray_composes_into_the_shared_folder(tmp_path: Path) -> None:
    words = shlex.split(rayjob()["spec"]["entrypoint"])
    assert words[:4] == ["python", "-m", "fedray", "-m"]
    (folder,) = [word for word in words if word.startswith("hydra.sweep.dir=")]
    assert folder.startswith("hydra.sweep.dir=/outputs/")
    assert composed([word for word in words[4:] if word != folder], tmp_path) == 3
