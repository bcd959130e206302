"""Everything that a run leaves behind, opened in the driver's process: the store, W&B and the log."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedray.errors import ConfigError
from fedray.track.store import Status, Store
from fedray.track.wandb import WandbConfig, WandbTracker, wandb_environment


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What is needed to open a recorder, as plain values.

    folder: the run directory. resume_round: go on after this round, 0 from the start; None for a new run.
    wandb_variables: of the process that makes this one; the driver's may be older than the command.
    """

    folder: str
    run_id: str
    config_yaml: str
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    wandb: WandbConfig
    resume_round: int | None = None
    wandb_variables: Mapping[str, str] = field(default_factory=wandb_environment)

    @property
    def log_path(self) -> str:
        return str(Path(self.folder) / "log.txt")

    def open(self) -> Recorder:
        return Recorder(self)


class Recorder:
    """Writes each finished round: to disk first, then to W&B, which is a view of it and may fail without harm."""

    def __init__(self, recording: Recording) -> None:
        folder = Path(recording.folder)
        self._log = Path(recording.log_path)
        self._facts: dict[str, Any] = {}
        self._last: Mapping[str, Any] | None = None
        what: dict[str, Any] = {"config_yaml": recording.config_yaml, "manifest": recording.manifest}
        if recording.resume_round is None:
            self._store = Store.create(folder, **what)
        else:
            self._store = Store.resume(folder, last_round=recording.resume_round, **what)
        begins = "starts" if recording.resume_round is None else f"goes on after round {recording.resume_round}"
        self.log(f"run {recording.run_id} {begins}; driver process {os.getpid()} on {platform.node()}")
        self._folder, self._notes, self._said = folder, list[str](), False
        try:
            self._wandb = WandbTracker(
                recording.wandb,
                run_dir=folder,
                run_id=recording.run_id,
                manifest={**recording.manifest, "config": recording.config},
                environment=recording.wandb_variables,
            )
        except ConfigError as error:
            self._store.finish("failed", error=str(error))
            raise
        if recording.resume_round is not None:
            self._wandb.catch_up()
        self._look_at_wandb()

    def write(
        self,
        row: Mapping[str, Any],
        clients: Sequence[Mapping[str, Any]],
        transfers: Sequence[Mapping[str, Any]],
        accuracies: Sequence[float] | None,
    ) -> None:
        """A round is finished when this returns."""
        self._store.write(row, clients, transfers)
        self._wandb.log(row, accuracies)
        self._look_at_wandb()
        self._last = row

    def update(self, **facts: Any) -> None:
        """Facts for the manifest that are known only once the run has started."""
        self._facts |= facts

    def log(self, text: str) -> None:
        """Append to log.txt."""
        with self._log.open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text.rstrip()}\n")

    def finish(self, status: Status, **facts: Any) -> None:
        """Close everything; the manifest and W&B's summary say how the run ended."""
        self.log(f"run {status}" + (f": {facts['error']}" if "error" in facts else ""))
        self._store.finish(status, **self._facts, **facts)
        self._wandb.finish(self._last, status, facts.get("error"))
        self._look_at_wandb()

    def take_notes(self) -> list[str]:
        """What the user should know and has not been told; the log has it already."""
        notes, self._notes = self._notes, []
        return notes

    def _look_at_wandb(self) -> None:
        if self._wandb.failure is not None and not self._said:
            self._said = True
            note = f"{self._wandb.failure}; the run does not need it: fedray wandb sync {self._folder} sends it later"
            self.log(note)
            self._notes.append(note)
