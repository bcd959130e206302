"""What pruners share by which the server cuts the averaged model at rounds of a schedule, for good."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

from fedray.errors import ConfigError
from fedray.prune.schedule import KINDS, Kind, is_event, sparsity_at
from fedray.prune.unit_scores import UNIT_KINDS
from fedray.round import Context, Job, Message, RunFacts, Server, refuse
from fedray.sums import Sums
from fedray.tree import Mask


class CutsUnits(ABC):
    """Events at rounds of a schedule, and the smaller model in between.

    A policy that names this before `Policy` adds what an event keeps (`chosen`), and has these fields:

    sparsity: the final fraction removed, in [0, 1). units: which kinds of units may go.
    schedule, start, finish, every: see `prune.schedule`; start 0 prunes the initial model.
    shrink:   clients train the physically smaller model; if not, the whole one under a mask.
    """

    sparsity: float
    units: tuple[str, ...]
    schedule: Kind
    start: int
    finish: int
    every: int
    shrink: bool

    @abstractmethod
    def chosen(self, server: Server, sparsity: float, ctx: Context) -> Mask:
        """What stays of the server's model at this sparsity. The server's mask is applied to it besides."""

    def refuse_schedule(self) -> None:
        """Refuse values of the fields that are named above; a list, as from a file, becomes a tuple."""
        object.__setattr__(self, "units", tuple(self.units))
        refuse(not 0.0 <= self.sparsity < 1.0, "sparsity", self.sparsity, "it is 0 to below 1; 0.9 keeps 1 in 10")
        known = bool(self.units) and set(self.units) <= set(UNIT_KINDS)
        refuse(not known, "units", list(self.units), f"list some of {', '.join(UNIT_KINDS)}")
        refuse(self.schedule not in KINDS, "schedule", self.schedule, f"choose {', '.join(KINDS)}")
        refuse(self.start < 0, "start", self.start, "it is a round, and 0 prunes before the first")
        late = f"a {self.schedule} schedule ends after its start ({self.start}): write the round of the last pruning"
        refuse(self.schedule != "one_shot" and self.finish <= self.start, "finish", self.finish, late)
        refuse(self.every < 1, "every", self.every, "it is a number of rounds, at least 1")

    def check(self, run: RunFacts) -> None:
        field, last = ("start", self.start) if self.schedule == "one_shot" else ("finish", self.finish)
        if last > run.rounds:
            raise ConfigError(
                f"pruner.{field} is {last}; it must be at most rounds ({run.rounds}), or the sparsity of "
                f"{self.sparsity:g} is never reached; lower it or raise rounds"
            )

    def changes_masks(self, round: int) -> bool | None:
        return is_event(round, kind=self.schedule, start=self.start, end=self.finish, every=self.every)

    def scheduled(self, round: int) -> float:
        """The fraction removed after a round."""
        times = {"start": self.start, "end": self.finish, "every": self.every}
        return sparsity_at(round, kind=self.schedule, sparsity=self.sparsity, **times)

    def init_server(self, server: Server, ctx: Context) -> tuple[Server, None]:
        return self._prune(server, ctx), None

    def begin(self, message: Message, job: Job, memory: None, ctx: Context) -> tuple[Message, Job, None]:
        return message, replace(job, shrink=self.shrink and job.mask is not None), memory

    def settle(self, server: Server, sums: Sums, memory: None, ctx: Context) -> tuple[Server, Sums, None]:
        return self._prune(server, ctx), sums, memory

    def _prune(self, server: Server, ctx: Context) -> Server:
        if not self.changes_masks(ctx.round):
            return server
        mask = self.chosen(server, self.scheduled(ctx.round), ctx)
        return server.cut(mask if server.mask is None else mask & server.mask)
