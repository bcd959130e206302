"""What pruners share by which the server cuts the averaged model at rounds of a schedule, for good."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

from fedray.prune.schedule import Kind
from fedray.prune.unit_scores import UNIT_KINDS, UnitScore, check_units
from fedray.pruners.fields import check_reached, is_due, refuse_fields, scheduled
from fedray.round import Context, Job, Message, RunFacts, Server, refuse
from fedray.sums import Sums
from fedray.tree import Mask


class CutsUnits(ABC):
    """Events at rounds of a schedule, and the smaller model in between.

    A policy that names this before `Policy` adds what an event keeps (`chosen`), by which score (`ranks_by`), and has
    these fields:

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
        refuse_fields(self)
        object.__setattr__(self, "units", tuple(self.units))
        known = bool(self.units) and set(self.units) <= set(UNIT_KINDS)
        refuse(not known, "units", list(self.units), f"list some of {', '.join(UNIT_KINDS)}")

    @property
    @abstractmethod
    def ranks_by(self) -> UnitScore:
        """What makes a unit matter."""

    def check(self, run: RunFacts) -> None:
        check_reached(self, run)
        if run.structure is not None:
            check_units(run.structure, self.units, self.ranks_by)

    def changes_masks(self, round: int) -> bool | None:
        return is_due(self, round)

    def init_server(self, server: Server, ctx: Context) -> tuple[Server, None]:
        return self._prune(server, ctx), None

    def begin(self, message: Message, job: Job, memory: None, ctx: Context) -> tuple[Message, Job, None]:
        return message, replace(job, shrink=self.shrink and job.mask is not None), memory

    def settle(self, server: Server, sums: Sums, memory: None, ctx: Context) -> tuple[Server, Sums, None]:
        return self._prune(server, ctx), sums, memory

    def _prune(self, server: Server, ctx: Context) -> Server:
        if not self.changes_masks(ctx.round):
            return server
        mask = self.chosen(server, scheduled(self, ctx.round), ctx)
        return server.cut(mask if server.mask is None else mask & server.mask)
