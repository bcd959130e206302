"""Hybrid pruning by the server: first whole units, then single weights, under one budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from fedray.prune.allocate import ALLOCATIONS, Allocation, total_kept
from fedray.prune.schedule import Kind
from fedray.prune.score import magnitude
from fedray.prune.select import keep_top, keep_top_global
from fedray.prune.unit_scores import RANKINGS, UNIT_SCORES, Ranking, UnitScore, alive, cut_most
from fedray.pruners.fields import refuse_fields, scheduled
from fedray.pruners.on_schedule import CutsUnits
from fedray.round import Context, Policy, Server, refuse
from fedray.tree import Mask


@final
@dataclass(frozen=True, kw_only=True)
class Hybrid(CutsUnits, Policy[None, None]):
    """Remove whole units of the averaged model, and then weights of what is left, down to an exact count.

    The budget is a fraction of the prunable weights. An event first removes the largest fraction of each group's units
    that takes at most `by_structure` of that budget, as `Structured` does; then the smallest magnitudes among the
    weights that are left, as `Magnitude` does, until the budget is met to the weight. The sparsity is that of both
    stages together, not that within the smaller model. Both rank the weights of that moment, and what is gone stays
    gone. Biases and norms go with their units, and are no part of the budget. Combines Li et al. 2017 and Han et al.
    2015; no paper has this very rule: Sub-FedAvg (Vahidian et al. 2021) prunes channels of convolutions and single
    weights of linear layers, where here both stages see every layer.

    sparsity:     final fraction of the prunable weights removed, in [0, 1).
    by_structure: the largest share of what is removed that goes with units, in [0, 1]; 0 cuts weights alone.
    units:        which kinds may go: filter, neuron, head, block.
    unit_score:   how units are ranked within their group: score of `Structured`.
    ranking:      "local" ranks weights within each tensor, `allocation` divides them; "global" all together.
    allocation:   "uniform", "er" or "erk"; what the units leave of a tensor is its upper bound.
    schedule, start, finish, every: see `prune.schedule`; start 0 prunes the initial model.
    shrink:       clients train the physically smaller model under a mask of its weights; if not, the whole one.
    """

    cuts: ClassVar[Literal["none", "weights", "structures", "both"]] = "both"

    sparsity: float
    by_structure: float = 0.5
    units: tuple[str, ...] = ("filter", "neuron", "head")
    unit_score: UnitScore = "l1"
    ranking: Ranking = "local"
    allocation: Allocation = "uniform"
    schedule: Kind = "one_shot"
    start: int = 0
    finish: int = 0
    every: int = 1
    shrink: bool = True

    def __post_init__(self) -> None:
        refuse_fields(self)
        self.refuse_schedule()
        share = self.by_structure
        refuse(not 0.0 <= share <= 1.0, "by_structure", share, "it is a share of what is removed, 0 to 1")
        refuse(self.unit_score not in UNIT_SCORES, "unit_score", self.unit_score, f"choose {', '.join(UNIT_SCORES)}")
        refuse(self.ranking not in RANKINGS, "ranking", self.ranking, f"choose {' or '.join(RANKINGS)}")

    def sparsity_after(self, round: int) -> float | None:
        return scheduled(self, round)

    @property
    def ranks_by(self) -> UnitScore:
        return self.unit_score

    def chosen(self, server: Server, sparsity: float, ctx: Context) -> Mask:
        assert ctx.structure is not None
        layout, names = server.params.layout, ctx.prunable
        total = total_kept(layout, names, sparsity)
        before = Mask.full(layout) if server.mask is None else server.mask
        removable = self.by_structure * (sum(Mask.full(layout).counts(names).values()) - total)
        units = cut_most(
            ctx.structure,
            server.params,
            lambda mask: (
                sum((~mask).counts(names).values()) <= removable
                and sum((mask & before).counts(names).values()) >= total
            ),
            within=alive(ctx.structure, self.units, server.mask),
            score=self.unit_score,
        )
        within, score = units & before, magnitude(server.params)
        if self.ranking == "global":
            return within & keep_top_global(score, total, names=names, within=within)
        counts = ALLOCATIONS[self.allocation](layout, names, sparsity, limits=within.counts(names))
        return within & keep_top(score, counts, names=names, within=within)
