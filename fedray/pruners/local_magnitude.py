"""Magnitude pruning at the clients, with masks of their own or one that is made of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final, get_args

from fedray.prune.allocate import Allocation, Budget, Rounding
from fedray.prune.merge import Merge, merge, to_count
from fedray.prune.regrow import drop
from fedray.prune.schedule import Kind
from fedray.pruners.fields import check_reached, is_due, refuse_fields, scheduled, scheduled_counts
from fedray.pruners.own_masks import OwnMask, check_differences
from fedray.round import Context, Fit, Message, Policy, RunFacts, Server, refuse
from fedray.sums import Sums
from fedray.tree import Mask

Masks = Literal["personal", "synchronised"]


@final
@dataclass(frozen=True, kw_only=True)
class LocalMagnitude(OwnMask, Policy[None, Mask | None]):
    """Each client removes the weights of what it trained that have the smallest magnitude, and sends the others.

    Schedules and counts of pruner=magnitude, elsewhere; what is cut stays cut. Magnitude is Han et al. 2015, section 3,
    votes on masks Stripelis et al. 2022 (FedSparsify), the way back to the budget Bibikar et al. 2022 (FedDST).

    sparsity, allocation, budget, rounding: fraction removed in the end, in [0, 1), and counts: see `prune.allocate`.
    schedule, start, finish, every: rounds after whose training clients prune, from 1 on: see `prune.schedule`.
    masks:     "personal": a client keeps its mask, prunes in any round in which it is behind the schedule, and runs the
               server's weights under it; the server has none. "synchronised": the cohort of an event prunes, and one
               mask that the server makes of theirs goes to all; what follows is read for it alone.
    merge:     a weight stays that one of them holds ("or"), all ("and"), or `votes` ("vote"; all, if fewer answered).
    reproject: bring the merged mask to the counts of the schedule by magnitude of the averaged weights: cut what is too
               much, add what most nearly stayed. Otherwise its size is an outcome.
    """

    cuts: ClassVar[Literal["none", "weights", "structures", "both"]] = "weights"

    sparsity: float
    allocation: Allocation = "uniform"
    schedule: Kind = "one_shot"
    start: int = 1
    finish: int = 0
    every: int = 1
    masks: Masks = "synchronised"
    merge: Merge = "or"
    votes: int = 2
    reproject: bool = True
    budget: Budget = "prunable_weights"
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        refuse(self.start < 1, "start", self.start, "clients prune after training, so it is a round from 1 on")
        refuse_fields(self)
        refuse(self.masks not in get_args(Masks), "masks", self.masks, "choose personal or synchronised")
        refuse(self.votes < 1, "votes", self.votes, "it is a number of clients, at least 1")

    @property
    def sends_each(self) -> bool:  # type: ignore[override]  # only masks of their own are not the same for all
        return self.masks == "personal"

    def sparsity_after(self, round: int) -> float | None:
        exact = round < self.start or (self.masks == "synchronised" and self.reproject)
        return scheduled(self, round) if exact else None

    def changes_masks(self, round: int) -> bool | None:
        if self.masks == "personal":
            return None if round >= self.start and self.sparsity else False
        return is_due(self, round)

    def check(self, run: RunFacts) -> None:
        check_differences("local_magnitude", run)
        check_reached(self, run)
        rule = f"it must be at most cohort ({run.cohort}), for no weight can have more: set it lower, or merge to and"
        refuse(self.merge == "vote" and self.votes > run.cohort, "votes", self.votes, rule)

    def send(self, server: Server, message: Message, memory: None, ctx: Context) -> Message:
        return super().send(server, message, memory, ctx) if self.sends_each else message

    def end(self, fit: Fit, message: Message, memory: Mask | None, ctx: Context) -> tuple[Fit, Message, Mask | None]:
        mask = Mask.full(fit.params.layout) if fit.mask is None else fit.mask
        counts = scheduled_counts(self, mask, ctx)
        if self.changes_masks(ctx.round) is not False and counts != mask.counts(ctx.prunable):
            fit = fit.cut(drop(fit.params, mask, counts, names=ctx.prunable))
        return fit, message, fit.mask if self.sends_each else None

    def settle(self, server: Server, sums: Sums, memory: None, ctx: Context) -> tuple[Server, Sums, None]:
        if self.sends_each or not self.changes_masks(ctx.round):
            return server, sums, memory
        layout, names = server.params.layout, ctx.prunable
        before = held = merged = Mask.full(layout) if server.mask is None else server.mask
        if "delta" in sums:
            held, count = sums.support("delta"), sums.count("delta")
            merged = merge(layout, sums.holders("delta"), count, self.merge, self.votes, names=names)
        if self.reproject:
            merged = to_count(server.params, merged, held, scheduled_counts(self, before, ctx), names=names)
        return (server if merged == before else server.cut(merged)), sums, memory
