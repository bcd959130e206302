"""A random mask, drawn once: the control that every other pruner must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from fedray.prune.allocate import Allocation, Budget, Rounding
from fedray.prune.select import random_mask
from fedray.pruners.fields import check_start, first_counts, refuse_fields
from fedray.round import Context, Policy, RunFacts, Server


@final
@dataclass(frozen=True, kw_only=True)
class Random(Policy[None, None]):
    """Static random pruning at initialisation.

    The mask is a pure function of the run's key and the counts, so it costs its seed on the wire. It never
    changes. Of a model that comes with a mask it is drawn within that, and costs its positions. Random masks with
    layer-wise ratios as a baseline: Liu et al. 2022, "The unreasonable effectiveness of random pruning", section 3.

    sparsity:   fraction removed, in [0, 1).
    allocation: how the kept weights are divided among tensors: "uniform", "er" or "erk".
    budget, rounding: what the sparsity is a fraction of, and how counts are rounded: see `prune.allocate`.
    """

    cuts: ClassVar[Literal["none", "weights", "structures", "both"]] = "weights"

    sparsity: float
    allocation: Allocation = "erk"
    budget: Budget = "prunable_weights"
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        refuse_fields(self)

    def sparsity_after(self, round: int) -> float:
        return self.sparsity

    def changes_masks(self, round: int) -> bool:
        return round == 0

    def check(self, run: RunFacts) -> None:
        check_start(self, run)

    def init_server(self, server: Server, ctx: Context) -> tuple[Server, None]:
        counts, key = first_counts(self, server, ctx), ctx.key.fold("random mask")
        drawn = random_mask(server.params.layout, ctx.prunable, counts, key, within=server.mask)
        return server.cut(drawn), None
