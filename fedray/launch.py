"""Start an assembled run, follow it, and leave nothing behind."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedray.errors import ConfigError, RunError
from fedray.track.progress import Progress, summary_lines
from fedray.track.recording import Recording
from fedray.track.store import read_clients, read_manifest, read_rows

if TYPE_CHECKING:
    import torch

    from fedray.config import Assembly


class Interrupted(RunError):
    """Somebody pressed Ctrl-C; what was finished is on disk."""


@dataclass(frozen=True)
class Run:
    """A run on disk, from Python. folder: its run directory."""

    folder: Path

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One row a finished round."""
        return read_rows(self.folder)

    @property
    def final(self) -> dict[str, Any]:
        """The last row: test/accuracy, model/sparsity, wire/total_bytes, digest ..."""
        return self.rows[-1]

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        return read_manifest(self.folder)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The final parameters and buffers by name."""
        from fedray.sim.final import read_final

        return read_final(self.folder)[0]


def execute(assembly: Assembly, folder: Path, *, resume_round: int | None = None) -> Run:
    """Run to the end in `folder`. Raises ConfigError before anything starts, RunError after.

    resume_round: go on from the checkpoint of that round, or from the start for 0; None begins a new run.
    """
    spec = assembly.spec
    folder = folder.resolve()
    recording = Recording(
        folder=str(folder),
        run_id=spec.run_id,
        config_yaml=assembly.config_yaml,
        config=spec.config,
        manifest={**assembly.facts, "environment": environment()},
        wandb=assembly.wandb,
        resume_round=resume_round,
    )
    title = f"{spec.name}  {spec.run_id}  seed {spec.seed}"
    with Progress(assembly.progress, spec.rounds, title) as progress:
        progress.note(describe(assembly))
        for warning in assembly.facts["warnings"]:
            progress.note(f"warning: {warning}")
        stream = (
            _inline(assembly, recording)
            if assembly.runtime.kind == "inline"
            else _on_ray(assembly, recording, progress)
        )
        failure: BaseException | None = None
        status = ""
        for event in stream:
            if "note" in event:
                progress.note(event["note"])
            elif "row" in event:
                progress.row(event["row"])
            else:
                status, failure = event["end"], event.get("error")
    if failure is not None:
        raise failure
    if status == "interrupted":
        raise Interrupted(f"interrupted; {len(read_rows(folder))} finished rounds are in {folder}")
    rows = read_rows(folder)
    trained = sum("num_examples" in row for row in read_clients(folder))
    dense = 4 * num_params(assembly) * trained
    progress.summary([*summary_lines(rows, dense_bytes_up=dense, dense_bytes_down=dense), ("folder", str(folder))])
    return Run(folder)


def resume(folder: Path, assembly: Assembly) -> Run:
    """Go on with the run in `folder` from its last checkpoint, or from the start if it has none.

    Raises ConfigError where `assembly` is another run's, or where there is nothing left to do.
    """
    from fedray.sim.checkpoint import checkpoints

    manifest, rows = read_manifest(folder), read_rows(folder)
    if manifest["run_id"] != assembly.spec.run_id:
        raise ConfigError(
            f"{folder} holds run {manifest['run_id']}, and this configuration is run {assembly.spec.run_id}; only "
            "rounds, checkpoint, runtime and tracker may change"
        )
    if manifest["status"] == "finished" and rows and rows[-1]["round"] >= assembly.spec.rounds:
        done = rows[-1]["round"]
        raise ConfigError(f"{folder} has finished its {done} rounds; to lengthen it write rounds={2 * done}")
    written = {row["round"] for row in rows}
    saved = [int(path.name.removeprefix("round-")) for path in checkpoints(folder / "checkpoints")]
    return execute(assembly, folder, resume_round=max((r for r in saved if r in written), default=0))


def _inline(assembly: Assembly, recording: Recording) -> Iterator[dict[str, Any]]:
    import torch

    from fedray.sim.drive import drive
    from fedray.sim.runtime import InlineRuntime

    device = assembly.runtime.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("runtime.device is 'cuda'; torch sees no GPU here. Use runtime.device=auto or cpu")
    spec = replace(assembly.spec, device=device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in an actor: the same bits, and no threads that wait for each other
    try:
        yield from drive(spec, assembly.population, InlineRuntime(spec, assembly.population), recording)
    except KeyboardInterrupt:
        yield {"end": "interrupted"}
    finally:
        torch.set_num_threads(threads)


def _on_ray(assembly: Assembly, recording: Recording, progress: Progress) -> Iterator[dict[str, Any]]:
    import ray.cloudpickle as cloudpickle

    from fedray.sim import ray_runtime
    from fedray.sim.plan import make_plan

    runtime, spec = assembly.runtime, assembly.spec
    progress.note("joining Ray ..." if runtime.address else "starting Ray ...")
    dashboard = runtime.clients_per_actor == 1 if runtime.dashboard == "auto" else runtime.dashboard == "on"
    ray_runtime.connect(runtime.address, num_cpus=runtime.num_cpus, temp_dir=runtime.temp_dir, dashboard=dashboard)
    cluster = ray_runtime.look_at_cluster()
    device = runtime.device if runtime.device != "auto" else ("cuda" if cluster.gpus >= 1 else "cpu")
    spec = replace(spec, device=device)
    code = ray_runtime.zip_code(assembly.code_folder)
    sealed = ray_runtime.Sealed(code=code, spec=cloudpickle.dumps(spec))
    client_gpu_bytes = 0
    if device == "cuda" and cluster.gpus >= 1:
        gpu_bytes, client_gpu_bytes = ray_runtime.probe_gpu(sealed, assembly.population)
        cluster = replace(cluster, gpu_bytes=gpu_bytes)
    plan = make_plan(
        cluster,
        num_clients=spec.num_clients,
        cohort=spec.cohort,
        clients_per_actor=runtime.clients_per_actor,
        slots=runtime.slots,
        device=device,  # type: ignore[arg-type]
        client_gpu_bytes=client_gpu_bytes,
    )
    progress.note(plan.forecast)
    interrupted = True
    group = ray_runtime.reserve(plan, progress.note)
    driver = stream = None
    try:
        driver, stream = ray_runtime.start_driver(
            sealed, assembly.population, plan, group, seed=spec.seed, recording=recording
        )
        yield from ray_runtime.events(stream)
        interrupted = False
    except KeyboardInterrupt:
        yield {"end": "interrupted"}
    finally:
        ray_runtime.finish(driver, stream, group, interrupted=interrupted)


def num_params(assembly: Assembly) -> int:
    """Elements of parameters and floating-point buffers."""
    from fedray.models.task import buffers_of, params_of

    module = assembly.spec.task.module(assembly.spec.key.fold("model"))
    return params_of(module).layout.size + buffers_of(module).layout.size


def describe(assembly: Assembly) -> str:
    """One line: data, partition, model, what is prunable, who prunes."""
    from fedray.models.task import params_of, prunable_names

    spec = assembly.spec
    module = spec.task.module(spec.key.fold("model"))
    layout = params_of(module).layout
    prunable = layout.select(prunable_names(module, spec.task.scope)).size
    names = [type(policy).__name__ for _, policy in spec.policies]
    return (
        f"{assembly.facts['data']['name']}, {spec.num_clients} clients, {spec.cohort} per round, "
        f"{type(module).__name__} with {layout.size:,} parameters ({prunable:,} prunable), {' + '.join(names)}"
    )


def environment() -> dict[str, Any]:
    """Versions and processor: what may explain a difference between two runs."""
    packages = {}
    for name in ("fedray", "torch", "ray", "numpy", "hydra-core", "wandb"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "python": platform.python_version(),
        "packages": packages,
        "processor": _processor(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "command": sys.argv,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
