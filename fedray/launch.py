"""Start an assembled run, follow it, and leave nothing behind."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedray.errors import ConfigError, RunError
from fedray.track.progress import Progress, summary_lines
from fedray.track.recording import Recording
from fedray.track.store import read_clients, read_manifest, read_rows

if TYPE_CHECKING:
    import torch

    from fedray.config import Assembly, RuntimeConfig
    from fedray.sim.plan import Cluster
    from fedray.sim.ray_runtime import Sealed
    from fedray.sim.warm import Lender


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
    manifest, rows = read_manifest(folder), read_rows(folder)
    if manifest["run_id"] != assembly.spec.run_id:
        raise ConfigError(
            f"{folder} holds run {manifest['run_id']}, and this configuration is run {assembly.spec.run_id}; only "
            "rounds, checkpoint, runtime and tracker may change"
        )
    if manifest["status"] == "finished" and rows and rows[-1]["round"] >= assembly.spec.rounds:
        done = rows[-1]["round"]
        raise ConfigError(f"{folder} has finished its {done} rounds; to lengthen it write rounds={2 * done}")
    return execute(assembly, folder, resume_round=last_resumable(folder))


def last_resumable(folder: Path) -> int:
    """The round of the last checkpoint whose row is written too; 0 where there is none."""
    written = {row["round"] for row in read_rows(folder)}
    saved = [int(path.name.removeprefix("round-")) for path in (folder / "checkpoints").glob("round-*")]
    return max((round for round in saved if round in written), default=0)


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
    runtime, spec = assembly.runtime, assembly.spec
    lender = join(runtime, progress.note)
    from fedray.sim import ray_runtime
    from fedray.sim.hosts import start_team
    from fedray.sim.plan import make_plan

    cluster = ray_runtime.look_at_cluster()
    sealed, device = seal(assembly, cluster)
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
        device=device,
        client_gpu_bytes=client_gpu_bytes,
        warm=0 if lender is None or device != "cpu" else lender.free()[1],
    )
    progress.note(plan.forecast)
    status = "interrupted"
    group = ray_runtime.reserve(plan, progress.note)
    team = stream = None
    try:
        team = start_team(plan, group, lender)
        population = ray_runtime.store(assembly.population, {})
        order = ray_runtime.Order(sealed=sealed, population=[population], seed=spec.seed, recording=recording)
        stream = team.begin(order)
        for event in ray_runtime.events(stream):
            status = event.get("end", status)
            yield event
    except KeyboardInterrupt:
        yield {"end": "interrupted"}
    except BaseException:
        status = "failed"
        raise
    finally:
        if status == "interrupted" and team is not None and stream is not None:
            ray_runtime.wind_down(team.driver, stream)
        if team is None:
            ray_runtime.give_up(group)
        elif status == "finished":
            team.release()
        else:
            team.end()


def join(runtime: RuntimeConfig, note: Callable[[str], None]) -> Lender | None:
    """Join the cluster that a run is to have, or start it; the one who lends warm processes there, if any.

    A run that says nothing of a cluster takes the one that `fedray up` started. note: is told which it is.
    """
    from fedray.sim import warm

    up, why = None, None
    if not (runtime.address or os.environ.get("RAY_ADDRESS")):
        wanted = {"num_cpus": runtime.num_cpus, "temp_dir": runtime.temp_dir, "dashboard": runtime.dashboard}
        asked = [f"runtime.{key}" for key, value in wanted.items() if value not in (None, "auto", "off")]
        up, why = warm.look_for_cluster()
        if up is not None and asked:
            up, why = None, f"the cluster that is up is left alone: {asked[0]} asks for one of its own"
    if why is not None:
        note(why)
    if up is not None:
        warm.admit(up)
    from fedray.sim import ray_runtime

    dashboard = runtime.clients_per_actor == 1 if runtime.dashboard == "auto" else runtime.dashboard == "on"
    local: dict[str, Any] = {"num_cpus": runtime.num_cpus, "temp_dir": runtime.temp_dir, "dashboard": dashboard}
    if up is not None:
        note(f"joining the cluster that is up at {up.address} ...")
        try:
            ray_runtime.connect(up.address, **local)
            return warm.Lender.here()
        except ConfigError as error:
            note(f"the cluster that is up does not let us in and is ignored ({error})")
    note("joining Ray ..." if runtime.address and runtime.address != "local" else "starting Ray ...")
    ray_runtime.connect(runtime.address, **local)
    return None


def seal(assembly: Assembly, cluster: Cluster) -> tuple[Sealed, Literal["cpu", "cuda"]]:
    """A run as its processes get it, and where it trains on this cluster. Raises RunError for what cannot be sent."""
    import ray.cloudpickle as cloudpickle

    from fedray.sim.ray_runtime import Sealed, zip_code

    runtime = assembly.runtime
    device = runtime.device if runtime.device != "auto" else ("cuda" if cluster.gpus >= 1 else "cpu")
    assert device in ("cpu", "cuda")
    memory_bytes = None if runtime.memory_gb in (None, "auto") else int(runtime.memory_gb * 1e9)
    spec = cloudpickle.dumps(replace(assembly.spec, device=device))
    path = tuple(str(Path(entry).resolve()) for entry in sys.path)
    code = zip_code(assembly.code_folder)
    sealed = Sealed(code=code, spec=spec, memory_bytes=memory_bytes, path=path, folder=os.getcwd())
    return sealed, device  # type: ignore[return-value]


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
