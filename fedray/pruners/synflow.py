"""SynFlow: cut before any training, without data, by how much flows through each weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from fedray.errors import ConfigError
from fedray.prune.allocate import Budget, Rounding, total_kept
from fedray.prune.schedule import sparsity_at
from fedray.prune.select import keep_top_global
from fedray.pruners.fields import check_start, refuse_fields
from fedray.round import Context, Policy, RunFacts, Server, refuse


@final
@dataclass(frozen=True, kw_only=True)
class SynFlow(Policy[None, None]):
    """Iterative synaptic flow pruning (Tanaka et al. 2020, algorithm 1 and equation 5), by the server at the start.

    The score is |w * dR/d|w||, where R is the sum of the outputs for an input of ones with absolute weights, in
    evaluation mode and float64. What flows into a unit flows out of it, the law that keeps layers from being cut off,
    where layers are linear or rectified; a GroupNorm or LayerNorm breaks it. Step i of n keeps the (1 - sparsity)^(i /
    n) of all prunable weights that score highest, and scores again; the mask never changes afterwards. No data are
    looked at, so nothing is exchanged but the mask. Deviations from the authors' code: an exact count is kept, where a
    threshold cuts all that tie with it; the means of batch normalisation are not made positive, which are zero in a
    fresh model anyhow.

    sparsity:   fraction removed, in [0, 1).
    iterations: n, at least 1; with 1 a layer may be cut off, which iterating prevents.
    budget, rounding: what the sparsity is a fraction of, and how its count is rounded: see `prune.allocate`.
    """

    cuts: ClassVar[Literal["none", "weights", "structures", "both"]] = "weights"

    sparsity: float
    iterations: int = 100
    budget: Budget = "prunable_weights"
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        refuse_fields(self)
        refuse(self.iterations < 1, "iterations", self.iterations, "it is a number of steps, at least 1")

    def check(self, run: RunFacts) -> None:
        if run.tokens:
            raise ConfigError(
                "pruner is synflow; it needs an input of ones, and the model takes tokens: take a pruner that looks at "
                "data, such as pruner=snip"
            )
        check_start(self, run)

    def warns(self, run: RunFacts) -> tuple[str, ...]:
        if run.has_statistics or "norm" not in (run.kinds or {}).values():
            return ()
        return (
            "the model normalises each example (GroupNorm or LayerNorm), through which the flow is not conserved: "
            "layers may be cut off; take a model without, or with batch normalisation, or pruner=snip",
        )

    def sparsity_after(self, round: int) -> float:
        return self.sparsity

    def changes_masks(self, round: int) -> bool:
        return round == 0

    def init_server(self, server: Server, ctx: Context) -> tuple[Server, None]:
        assert ctx.flow is not None
        layout, names, mask = server.params.layout, ctx.prunable, server.mask
        counted = names if self.budget == "prunable_weights" else None
        times = {"start": 1, "end": self.iterations, "every": 1}
        before = 0.0 if mask is None else mask.sparsity(counted)
        for step in range(1, self.iterations + 1):
            score = ctx.flow(server.params, server.buffers, mask)
            sparsity = sparsity_at(step, kind="iterative", sparsity=self.sparsity, initial=before, **times)
            total = total_kept(layout, names, sparsity, budget=self.budget, rounding=self.rounding)
            mask = keep_top_global(score, total, names=names, within=mask)
        assert mask is not None
        return server.cut(mask), None
