"""Sub-FedAvg (Un): each client prunes a little while its mask still moves during local training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

from fedray.prune.allocate import Budget, Rounding, uniform
from fedray.prune.regrow import drop
from fedray.prune.shrink import shrink
from fedray.pruners.fields import check_budget, refuse_fields
from fedray.pruners.moving_masks import Candidate, ComparesEpochs
from fedray.pruners.own_masks import check_differences, check_epochs, check_gate
from fedray.round import Context, Policy, RunFacts, refuse
from fedray.tree import Mask, Tree


@final
@dataclass(frozen=True, kw_only=True)
class SubFedAvg(ComparesEpochs, Policy[None, Any]):
    """Personal subnetworks by unstructured pruning (Vahidian, Morafah and Lin 2021, "Personalized federated learning by
    structured and unstructured pruning under data heterogeneity", section 3, algorithm 1).

    A client in the cohort makes two candidate masks, each by cutting a fraction of what is left in every tensor, the
    smallest magnitudes: after its first local epoch and after its last. It takes the second where they differ by more
    than `distance`, what it trained is accurate enough under it, and its target is not reached. Nothing is rewound. It
    sends, and is sent, what its mask holds; the server averages each coordinate over its holders and keeps its value
    where it has none. A client runs the server's weights under its own mask.

    Deviations: the first candidate is that of one epoch from what was received, with batches of its own, so that local
    training goes on in one piece; that is one epoch more, counted, until the target is reached. The gate looks at
    training data that are set apart (`validation`), where the authors' code looks at the client's test images. The last
    step ends at the target exactly, where theirs is capped at 5 %; counts are exact, where they cut below a percentile.
    They average uniformly, which is strategy.weight_by=uniform, and leave running statistics of batch normalisation
    with their clients, which is batch_norm=affine; under batch_norm=average a client runs the server's, though the gate
    judges what it trained with its own.

    sparsity: the target: fraction removed from each tensor, in [0, 1).
    rate:     the fraction of what is left that one event cuts, in (0, 1).
    distance: an event needs masks that differ in more than this fraction of a tensor, on average, at least 0.
    accuracy: an event needs an accuracy above it, in [0, 1).
    budget, rounding: what the sparsity is a fraction of, and how counts are rounded: see `prune.allocate`.
    """

    cuts: ClassVar[Literal["none", "weights"]] = "weights"

    sparsity: float = 0.3
    rate: float = 0.1
    distance: float = 1e-4
    accuracy: float = 0.5
    budget: Budget = "prunable_weights"
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        refuse_fields(self)
        refuse(not 0.0 < self.rate < 1.0, "rate", self.rate, "it is the fraction that an event cuts, above 0, below 1")
        refuse(not 0.0 <= self.distance < 1.0, "distance", self.distance, "it is 0 to below 1; the authors' is 1e-4")
        refuse(not 0.0 <= self.accuracy < 1.0, "accuracy", self.accuracy, "it is 0 to below 1; the authors' is 0.5")

    def changes_masks(self, round: int) -> bool | None:
        return None if round and self.sparsity else False

    def check(self, run: RunFacts) -> None:
        check_differences("subfedavg", run)
        check_gate("subfedavg", run)
        check_epochs("subfedavg", run)
        check_budget(self, run)

    def candidates(self, params: Tree, mask: Mask, ctx: Context) -> tuple[Candidate, ...]:
        names, counts = ctx.prunable, mask.counts(ctx.prunable)
        least = uniform(params.layout, names, self.sparsity, budget=self.budget, rounding=self.rounding)
        fewer = shrink(counts, self.rate, least)
        if fewer == counts:
            return ()
        late = drop(params, mask, fewer, names=names)
        return (Candidate(chosen=late, names=names, mask=late, distance=self.distance),)
