"""GraSP: cut what the flow of the gradient loses least by, or gains by losing, before any training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from fedray.errors import ConfigError
from fedray.prune.allocate import Budget, Rounding
from fedray.prune.score import sensitivity
from fedray.pruners.scored_start import ScoredStart
from fedray.round import Context, Loss, Policy, RunFacts, refuse
from fedray.tree import Mask, Tree


@final
@dataclass(frozen=True, kw_only=True)
class GraSP(ScoredStart, Policy[bool, None]):
    """Gradient signal preservation (Wang et al. 2020, "Picking winning tickets before training", equations 7 and 8).

    Cutting a weight changes |gradient|^2 by twice -w * (H g), to first order, with H the Hessian of the loss and g its
    gradient. The highest of these scores are cut, all prunable weights ranked together: their loss takes least from the
    flow, or adds to it. What is exchanged and ranked here is w * (H g), of which the highest are kept. The mask never
    changes. Deviations: each client scores a batch of its own and the mean is taken, so that H and g are of the same
    client, and the score of the pooled batches is another one; weights are as the model draws them, where the authors'
    code draws those of linear layers anew; H and g are of all parameters, where theirs are of prunable weights. See
    `ScoredStart` for the exchange. A ranking over all may empty a tensor.

    sparsity:    fraction removed, in [0, 1).
    scores:      "clients", or "server": on public data, while the run is set up.
    clients:     who is asked before the first training: "all", or the "cohort" of the first round.
    per_class:   examples of each class behind a score (all of a class that has fewer); None for all that there are.
    temperature: the logits are divided by it, above 0.
    budget, rounding: what the sparsity is a fraction of, and how its count is rounded: see `prune.allocate`.
    """

    cuts: ClassVar[Literal["none", "weights", "structures", "both"]] = "weights"
    exchange: ClassVar[str] = "grasp"

    sparsity: float
    scores: Literal["clients", "server"] = "clients"
    clients: Literal["all", "cohort"] = "all"
    per_class: int | None = 25
    temperature: float = 200.0
    budget: Budget = "prunable_weights"
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        self.refuse_scores()
        number, rule = self.per_class, "it is a number of examples, at least 1, or null for all"
        refuse(number is not None and number < 1, "per_class", number, rule)
        heat, rule = self.temperature, "it must be above 0; 1 leaves the logits as they are"
        refuse(not 0.0 < heat < math.inf, "temperature", heat, rule)

    def check(self, run: RunFacts) -> None:
        ScoredStart.check(self, run)
        if self.per_class is not None and run.objective not in (None, "classification"):
            raise ConfigError(
                f"pruner.per_class is {self.per_class}; the objective of these data is {run.objective}, which has no "
                "classes to take as many of each: set pruner.per_class=null"
            )
        if self.temperature != 1.0 and run.objective == "regression":
            raise ConfigError(
                f"pruner.temperature is {self.temperature:g}; these data are for regression, where there are no logits "
                "to divide: set pruner.temperature=1"
            )

    def score(self, params: Tree, buffers: Tree, mask: Mask | None, ctx: Context) -> Tree:
        assert ctx.probe is not None
        batch, loss = {"batch_size": None, "per_class": self.per_class}, Loss(temperature=self.temperature)
        _, seen = ctx.probe(params, buffers, mask, wants=frozenset({"hvp"}), loss=loss, **batch)
        return sensitivity(params, seen["hvp"])

    def ranked(self, mean: Tree) -> Tree:
        return mean
