"""Threshold pruning by the server: what is small goes, and the size is an outcome."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

from fedray.errors import ConfigError
from fedray.prune.schedule import is_event
from fedray.prune.score import magnitude
from fedray.prune.select import keep_top
from fedray.pruners.cuts_weights import CutsWeights
from fedray.pruners.fields import refuse_fields
from fedray.round import Context, Policy, RunFacts, Server, refuse
from fedray.tree import Mask


@final
@dataclass(frozen=True, kw_only=True)
class Threshold(CutsWeights, Policy[None, None]):
    """Keep the weights of the averaged model whose magnitude is above a threshold.

    Han et al. 2015, "Learning both weights and connections", section 3: a quality parameter times the standard
    deviation of a layer's weights, or one value for all. How many stay is an outcome. The deviation is that of the
    whole tensor, with zeros for what is pruned already: of what is left alone it would grow with every event, and cut
    the same model again and again. Deviations from the paper: it is the server that prunes, right after it has
    averaged, so all clients share one mask; the clock counts rounds; a tensor is never emptied.

    threshold: at least 0; weights at or below it go.
    unit:      "deviations" of each tensor, or the "value" itself for all.
    start, finish, every: rounds of the events, start and finish among them; start 0 prunes the initial weights.
    sticky:    what is pruned stays pruned; otherwise clients train densely in a round that ends with an event.
    at_least:  weights that each tensor keeps in any case, the largest, at least 1.
    """

    threshold: float = 1.0
    unit: Literal["deviations", "value"] = "deviations"
    start: int = 1
    finish: int = 5
    every: int = 1
    sticky: bool = True
    at_least: int = 1

    def __post_init__(self) -> None:
        refuse_fields(self)
        rule = "it is at least 0; 1 cuts what is within one deviation of zero, or with unit=value what is below 1"
        refuse(not 0.0 <= self.threshold < math.inf, "threshold", self.threshold, rule)
        refuse(self.unit not in ("deviations", "value"), "unit", self.unit, "choose deviations or value")
        late = f"it is the round of the last pruning, at least start ({self.start})"
        refuse(self.finish < self.start, "finish", self.finish, late)
        refuse(self.at_least < 1, "at_least", self.at_least, "it is a number of weights, at least 1")

    def check(self, run: RunFacts) -> None:
        if self.finish > run.rounds:
            raise ConfigError(
                f"pruner.finish is {self.finish}; it must be at most rounds ({run.rounds}), or the last pruning never "
                "comes; lower it or raise rounds"
            )

    def sparsity_after(self, round: int) -> float | None:
        return 0.0 if round < self.start else None

    def changes_masks(self, round: int) -> bool:
        return is_event(round, kind="linear", start=self.start, end=self.finish, every=self.every)

    def chosen(self, server: Server, within: Mask | None, ctx: Context) -> Mask:
        score, limits = magnitude(server.params), (within or Mask.full(server.params.layout)).counts(ctx.prunable)
        counts = {}
        for name, limit in limits.items():
            unit = 1.0 if self.unit == "value" else float(server.params[name].double().std(correction=0))
            # The threshold decides how many, and the count which: so a floor needs no rule of its own.
            above = int((score[name].double() > self.threshold * unit).sum())
            counts[name] = min(max(above, self.at_least), limit)
        return keep_top(score, counts, names=ctx.prunable, within=within)
