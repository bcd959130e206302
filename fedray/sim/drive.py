"""One run from its first round to its last, in whatever process the driver lives."""

from __future__ import annotations

import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

from fedray.errors import FedrayError, RunError
from fedray.models.task import constants
from fedray.sim.checkpoint import load, save
from fedray.sim.client import Worker
from fedray.sim.driver import Driver
from fedray.sim.final import write_final
from fedray.sim.population import Population
from fedray.sim.runtime import Runtime, Stopped
from fedray.sim.spec import RunSpec


class Recorder(Protocol):
    """Where finished rounds go; see track.recording."""

    def write(
        self,
        row: Mapping[str, Any],
        clients: Sequence[Mapping[str, Any]],
        transfers: Sequence[Mapping[str, Any]],
        accuracies: Sequence[float] | None,
    ) -> None: ...

    def update(self, **facts: Any) -> None: ...

    def log(self, text: str) -> None: ...

    def take_notes(self) -> Sequence[str]: ...

    def finish(self, status: Literal["finished", "failed", "interrupted"], **facts: Any) -> None: ...


class Recording(Protocol):
    """Opens a recorder in the driver's process."""

    @property
    def folder(self) -> str: ...

    @property
    def resume_round(self) -> int | None: ...

    def open(self) -> Recorder: ...


NO_MEMORY = ("MemoryError", "can't allocate memory", "Unable to allocate", "bad_alloc")
"""What an allocation that fails looks like: in Python, torch, NumPy and C++."""


def drive(
    spec: RunSpec,
    population: Population,
    runtime: Runtime,
    recording: Recording,
    *,
    memory_bytes: int | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Events as they happen: one {"note": text} when clients are ready, {"row": row} a round, then {"end": status}.

    memory_bytes: the ceiling of this run's processes, named where it was the reason of an error; None without one.
    An error ends the stream with {"end": "failed", "error": the exception}; what was finished is recorded.
    """
    recorder = recording.open()
    try:
        # The driver trains nobody: its worker gives layouts and decodes, so a plain engine on the CPU will do.
        plain = replace(spec, device="cpu", trainer=replace(spec.trainer, engine="eager"))
        state, saved = None, Path(recording.folder) / "checkpoints"
        if recording.resume_round:
            state = load(saved / f"round-{recording.resume_round:06d}")
        driver = Driver(spec, population, runtime, Worker(plain, population), state)
        engine, reason = runtime.wait_ready()
        recorder.update(engine=engine, engine_reason=reason)
        yield {"note": f"training engine: {engine} ({reason})"}
        yield from _notes(recorder)
        for record in driver.rounds():
            recorder.write(record.row, record.clients, record.transfers, record.accuracies)
            if record.state is not None:
                save(saved, record.state())
            for loss in runtime.take_losses():
                recorder.log(loss)
                yield {"note": loss}
            yield from _notes(recorder)
            yield {"row": record.row}
        if driver.stopped is not None:
            recorder.update(stopped=driver.stopped)
            recorder.log(driver.stopped)
            yield {"note": f"stops early: {driver.stopped}"}
        rest = constants(driver.worker.engine.module)
        write_final(recording.folder, driver.server, rest | dict((driver.statistics or {}).items()))
    except (Stopped, KeyboardInterrupt, GeneratorExit) as stop:
        recorder.finish("interrupted")
        if isinstance(stop, Stopped):
            yield {"end": "interrupted"}
            return
        raise
    except Exception as error:
        recorder.log(traceback.format_exc())
        ours = error if isinstance(error, FedrayError) else RunError(f"{type(error).__name__}: {error}")
        if memory_bytes is not None and any(sign in str(ours) for sign in NO_MEMORY):
            ours = RunError(
                f"{ours}; runtime.memory_gb gives each process of a run {memory_bytes / 1e9:.1f} GB here: raise it, or "
                "make model, batches or data smaller"
            )
        recorder.finish("failed", error=str(ours))
        yield {"end": "failed", "error": ours}
        return
    recorder.finish("finished")
    yield from _notes(recorder)
    yield {"end": "finished"}


def _notes(recorder: Recorder) -> Iterator[dict[str, Any]]:
    for note in recorder.take_notes():
        yield {"note": note}
