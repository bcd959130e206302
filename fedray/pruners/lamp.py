"""LAMP: magnitude pruning with one ranking over all layers that needs no layer-wise ratios."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from fedray.prune.allocate import Budget, Rounding
from fedray.prune.schedule import Kind
from fedray.prune.score import lamp
from fedray.prune.select import keep_top_global
from fedray.prune.shrink import falling_total
from fedray.pruners.cuts_weights import CutsWeights
from fedray.pruners.fields import check_reached, check_start, is_due, refuse_fields, scheduled
from fedray.round import Context, Policy, RunFacts, Server
from fedray.tree import Mask


@final
@dataclass(frozen=True, kw_only=True)
class Lamp(CutsWeights, Policy[None, None]):
    """Layer-adaptive magnitude-based pruning (Lee et al. 2021, equation 4).

    The score of a weight is its square over the sum of the squares in its tensor that are not smaller. The largest
    weight of a tensor scores 1, so no tensor is emptied before all of them have one weight left. Deviations: it is the
    server that prunes, right after it has averaged, so all clients share one mask; the paper prunes trained models
    again and again by the same fraction of what is left, here `schedule` says how sparsity rises while rounds go on.

    sparsity: final fraction removed, in [0, 1).
    schedule: "one_shot" (at round `start`), "linear", "cubic" or "iterative": see `prune.schedule`.
    start, finish, every: rounds of the events; start 0 prunes the initial weights; one_shot reads `start` alone.
    sticky:   what is pruned stays pruned; otherwise clients train densely in a round that ends with an event. A model
              that comes with a mask stays as it is until the schedule has passed it.
    budget, rounding: what the sparsity is a fraction of, and how its count is rounded: see `prune.allocate`.
    """

    sparsity: float
    schedule: Kind = "iterative"
    start: int = 1
    finish: int = 5
    every: int = 1
    sticky: bool = True
    budget: Budget = "prunable_weights"
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        refuse_fields(self)

    def check(self, run: RunFacts) -> None:
        check_reached(self, run)
        if self.sticky:
            check_start(self, run)

    def sparsity_after(self, round: int) -> float:
        return scheduled(self, round)

    def changes_masks(self, round: int) -> bool:
        return is_due(self, round)

    def chosen(self, server: Server, within: Mask | None, ctx: Context) -> Mask:
        layout, names, sparsity = server.params.layout, ctx.prunable, self.sparsity_after(ctx.round)
        total = falling_total(within, layout, names, sparsity, self.budget, self.rounding)
        return keep_top_global(lamp(server.params, names=names), total, names=names, within=within)
