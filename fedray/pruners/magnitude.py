"""Magnitude pruning by the server: once, or gradually while the model trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from fedray.prune.allocate import ALLOCATIONS, Allocation, Budget, Rounding, total_kept
from fedray.prune.schedule import Kind
from fedray.prune.score import magnitude
from fedray.prune.select import keep_top, keep_top_global
from fedray.pruners.cuts_weights import CutsWeights
from fedray.pruners.fields import check_reached, is_due, refuse_fields, scheduled
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
                in a round that ends with an event, their upload is dense too, and pruned weights compete again.
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

    def chosen(self, server: Server, within: Mask | None, ctx: Context) -> Mask:
        layout, names, score = server.params.layout, ctx.prunable, magnitude(server.params)
        sparsity = self.sparsity_after(ctx.round)
        if self.ranking == "global":
            total = total_kept(layout, names, sparsity, budget=self.budget, rounding=self.rounding)
            return keep_top_global(score, total, names=names, within=within)
        allocate = ALLOCATIONS[self.allocation]
        limits = None if within is None else within.counts(names)
        counts = allocate(layout, names, sparsity, budget=self.budget, rounding=self.rounding, limits=limits)
        return keep_top(score, counts, names=names, within=within)
