"""SNIP: keep the connections that the loss is most sensitive to, before any training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from fedray.prune.allocate import Budget, Rounding
from fedray.prune.score import magnitude, sensitivity
from fedray.pruners.scored_start import ScoredStart
from fedray.round import Context, Policy, refuse
from fedray.tree import Mask, Tree


@final
@dataclass(frozen=True, kw_only=True)
class Snip(ScoredStart, Policy[bool, None]):
    """Single-shot network pruning based on connection sensitivity (Lee et al. 2019, equations 3 to 6, algorithm 1).

    The score is |dL/dc| at c = 1 for a factor c on each weight, which is |w * gradient| of one batch; all prunable
    weights are ranked together, and the mask never changes. The paper has one batch in one place; here each client
    scores a batch of its own (as SSFL does), or the server public data: see `ScoredStart` for the exchange. Deviations:
    scores are not divided by their sum, which does not change their order; weights are as the model draws them, where
    the paper asks for variance scaling. A ranking over all tensors may empty one.

    sparsity:   fraction removed, in [0, 1).
    scores:     "clients", or "server": on public data, while the run is set up.
    clients:    who is asked before the first training: "all", or the "cohort" of the first round.
    absolute:   whether absolute values are taken "after" the mean of the clients' scores, weighted by their examples
                (with batch_size None that is SNIP on all their data at once), or "before" it, by each client (SSFL).
    batch_size: examples behind a score (all, where there are fewer); None for all.
    budget, rounding: what the sparsity is a fraction of, and how its count is rounded: see `prune.allocate`.
    """

    cuts: ClassVar[Literal["none", "weights", "structures", "both"]] = "weights"
    exchange: ClassVar[str] = "snip"

    sparsity: float
    scores: Literal["clients", "server"] = "clients"
    clients: Literal["all", "cohort"] = "all"
    absolute: Literal["after", "before"] = "after"
    batch_size: int | None = 128
    budget: Budget = "prunable_weights"
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        self.refuse_scores()
        refuse(self.absolute not in ("after", "before"), "absolute", self.absolute, "choose after or before")
        size, rule = self.batch_size, "it is a number of examples, at least 1, or null for all"
        refuse(size is not None and size < 1, "batch_size", size, rule)

    def score(self, params: Tree, buffers: Tree, mask: Mask | None, ctx: Context) -> Tree:
        assert ctx.probe is not None
        _, seen = ctx.probe(params, buffers, mask, wants=frozenset({"grad"}), batch_size=self.batch_size)
        signed = sensitivity(params, seen["grad"])
        return signed if self.absolute == "after" else magnitude(signed)

    def ranked(self, mean: Tree) -> Tree:
        return magnitude(mean)
