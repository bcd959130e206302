"""Iterative magnitude pruning with rewinding, by the server: train, cut a fraction of what is left, start over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

from fedray.prune.allocate import Allocation, Budget, Rounding
from fedray.prune.schedule import Kind
from fedray.prune.score import magnitude
from fedray.prune.select import keep_top, keep_top_global
from fedray.prune.shrink import falling_total
from fedray.pruners.fields import check_reached, check_start, is_due, refuse_fields, scheduled, scheduled_counts
from fedray.round import Context, Policy, RunFacts, Server, refuse
from fedray.sums import Sums
from fedray.tree import Mask, Tree, restrict

Saved = tuple[Tree, Tree] | None


@final
@dataclass(frozen=True, kw_only=True)
class Iterative(Policy[Saved, None]):
    """Lottery tickets by iterative magnitude pruning (Frankle and Carbin 2019, strategy 1 of appendix B).

    An event cuts the smallest weights of the averaged model and sets everything back to the initial values, or to those
    of an early round (Frankle et al. 2020, "Linear mode connectivity", algorithm 2); biases, norms and statistics too,
    but not what strategies and corrections remember, tensors that clients keep, or the schedule of the learning rate,
    which goes on with the rounds. Each of n events cuts the same fraction of what is left,
    1 - (1 - sparsity)^(1/n): the paper's 0.2 is 8 events to a sparsity of 0.83. The last one leaves the ticket, which
    the rounds after `finish` train. An event cuts nothing of a model that comes sparser than the schedule is by then.
    Deviations: it is the server that prunes, right after it has averaged, and rounds stand for training runs; every
    layer loses the same fraction, where the paper cuts the output layers of fully connected nets at half the rate.

    sparsity:  final fraction removed, in [0, 1).
    start, finish, every: rounds of the events, start and finish among them; start is at least 1.
    rewind_to: an event goes back to the weights after this round, 0 for the initial ones; None for no rewinding.
    ranking:   "local" cuts the same fraction of each tensor, "global" ranks all prunable weights together.
    budget, rounding: what the sparsity is a fraction of, and how counts are rounded: see `prune.allocate`.
    """

    cuts: ClassVar[Literal["none", "weights", "structures", "both"]] = "weights"
    schedule: ClassVar[Kind] = "iterative"
    allocation: ClassVar[Allocation] = "uniform"

    sparsity: float
    start: int = 1
    finish: int = 8
    every: int = 1
    rewind_to: int | None = 0
    ranking: Literal["local", "global"] = "local"
    budget: Budget = "prunable_weights"
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        refuse(self.start < 1, "start", self.start, "it is a round, at least 1: there is nothing to rewind before")
        refuse_fields(self)
        late = f"it is the round of the last pruning, at least start ({self.start})"
        refuse(self.finish < self.start, "finish", self.finish, late)
        back, rule = self.rewind_to, f"it is 0 or a round before start ({self.start}), or null for no rewinding"
        refuse(back is not None and not 0 <= back < self.start, "rewind_to", back, rule)

    def check(self, run: RunFacts) -> None:
        check_reached(self, run)
        check_start(self, run)

    def warns(self, run: RunFacts) -> tuple[str, ...]:
        if self.finish < run.rounds or self.rewind_to is None or not self.sparsity:
            return ()
        last = f"finish is {self.finish}, the last round: the run ends with the weights of round {self.rewind_to}"
        return (f"{last} under the final mask, untrained; lower it to train the ticket, or set rewind_to=null",)

    def sparsity_after(self, round: int) -> float:
        return scheduled(self, round)

    def changes_masks(self, round: int) -> bool:
        return is_due(self, round) and self.sparsity > 0.0

    def init_server(self, server: Server, ctx: Context) -> tuple[Server, Saved]:
        return server, (server.params, server.buffers) if self.rewind_to == 0 else None

    def settle(self, server: Server, sums: Sums, memory: Saved, ctx: Context) -> tuple[Server, Sums, Saved]:
        if ctx.round == self.rewind_to:
            return server, sums, (server.params, server.buffers)
        if not self.changes_masks(ctx.round):
            return server, sums, memory
        mask = self._kept(server, ctx)
        params, buffers = (server.params, server.buffers) if memory is None else memory
        return replace(server, params=restrict(params, mask), buffers=buffers, mask=mask), sums, memory

    def _kept(self, server: Server, ctx: Context) -> Mask:
        layout, names, within = server.params.layout, ctx.prunable, server.mask
        score = magnitude(server.params)
        if self.ranking == "global":
            total = falling_total(within, layout, names, scheduled(self, ctx.round), self.budget, self.rounding)
            return keep_top_global(score, total, names=names, within=within)
        counts = scheduled_counts(self, Mask.full(layout) if within is None else within, ctx)
        return keep_top(score, counts, names=names, within=within)
