"""Magnitude pruning by the server: once, or gradually while the model trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from fedray.prune.allocate import Allocation, Budget, Rounding
from fedray.prune.schedule import Kind
from fedray.prune.score import magnitude
from fedray.prune.select import keep_top, keep_top_global
from fedray.prune.shrink import falling_total
from fedray.pruners.cuts_weights import CutsWeights
from fedray.pruners.fields import check_reached, check_start, is_due, refuse_fields, scheduled, scheduled_counts
from fedray.round import Context, Policy, RunFacts, Server
from fedray.tree import Mask


@final
@dataclass(frozen=True, kw_only=True)
class Magnitude(CutsWeights, Policy[None, None]):
    """Remove the weights of the averaged model that have the smallest magnitude.

    Han et al. 2015, "Learning both weights and connections", section 3 (magnitude); Zhu and Gupta 2017, "To prune,
    or not to prune" (gradual, cubic). Deviations: an event prunes to an exact count, where Han prunes below a
    multiple of a layer's standard deviation; the clock counts rounds, where Zhu and Gupta count steps; and it is
    the server that prunes, right after it has averaged, so all clients share one mask.

    sparsity:   final fraction removed, in [0, 1).
    ranking:    "local" ranks within each tensor, `allocation` says how many it keeps; "global" ranks all prunable
                weights together (`allocation` is not read) and may empty a tensor.
    allocation: "uniform", "er" or "erk".
    schedule:   "one_shot" (at round `start`), "linear", "cubic" or "iterative": see `prune.schedule`.
    start, finish, every: rounds of the events; start 0 prunes the initial weights; one_shot reads `start` alone.
    sticky:     what is pruned stays pruned: each mask lies within the one before. Otherwise clients train densely
                in a round that ends with an event, their upload is dense too, and pruned weights compete again. Of a
                model that comes with a mask nothing returns, and it stays as it is until the schedule has passed it.
    budget, rounding: what the sparsity is a fraction of, and how counts are rounded: see `prune.allocate`.
    """

    sparsity: float
    ranking: Literal["local", "global"] = "local"
    allocation: Allocation = "uniform"
    schedule: Kind = "one_shot"
    start: int = 0
    finish: int = 0
    every: int = 1
    sticky: bool = True
    budget: Budget = "prunable_weights"
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        refuse_fields(self)

    def sparsity_after(self, round: int) -> float:
        return scheduled(self, round)

    def changes_masks(self, round: int) -> bool:
        return is_due(self, round)

    def check(self, run: RunFacts) -> None:
        check_reached(self, run)
        if self.sticky:
            check_start(self, run)

    def chosen(self, server: Server, within: Mask | None, ctx: Context) -> Mask:
        layout, names, score = server.params.layout, ctx.prunable, magnitude(server.params)
        if self.ranking == "global":
            sparsity = self.sparsity_after(ctx.round)
            total = falling_total(within, layout, names, sparsity, self.budget, self.rounding)
            return keep_top_global(score, total, names=names, within=within)
        counts = scheduled_counts(self, Mask.full(layout) if within is None else within, ctx)
        return keep_top(score, counts, names=names, within=within)
