"""Sub-FedAvg (Hy): each client cuts channels of convolutions, and single weights of linear layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final

from fedray.prune.allocate import uniform
from fedray.prune.regrow import drop
from fedray.prune.scales import scale_signs
from fedray.prune.select import keep_top
from fedray.prune.shrink import shrink
from fedray.prune.unit_scores import alive, kept_units, unit_counts, unit_scores
from fedray.prune.widths import held_buffers
from fedray.pruners.moving_masks import Candidate, ComparesEpochs
from fedray.pruners.own_masks import check_differences, check_epochs, check_gate, check_scales
from fedray.round import Context, Fit, Job, Message, Policy, RunFacts, refuse
from fedray.tree import Mask, Tree, add


@final
@dataclass(frozen=True, kw_only=True)
class SubFedAvgHybrid(ComparesEpochs, Policy[None, Any]):
    """Personal subnetworks by structured and unstructured pruning (Vahidian et al. 2021, section 3, algorithm 2).

    As pruner=subfedavg, see there for course, source and deviations, with two kinds of masks. Channels of convolutions
    go by the smallest scale of their batch normalisation, with all that belongs to them; an L1 penalty pulls scales to
    zero. Of linear layers single weights go. Each kind has its own distance; what passes is judged together.

    Further deviations: the penalty has the signs of the scales as they were received; the least number of channels is a
    fraction ([3, 8] of [6, 16] there); a client returns statistics of channels that it has cut as it received them.

    sparsity:  the target of each linear layer: fraction removed of the weights that cut channels leave, in [0, 1).
    rate:      the fraction of what is left there that one event cuts, in (0, 1). distance: as in Sub-FedAvg (Un).
    channel_sparsity, channel_rate, channel_distance: the same for the channels of each group, counted in channels.
    accuracy:  an event needs one above it, in [0, 1). penalty: of the scales, at least 0. shrink: train smaller models.
    """

    exempt = {"sparsity_zero_is_fedavg": "channels have a sparsity of their own, and the penalty pulls scales"}  # noqa: RUF012
    cuts: ClassVar[Literal["none", "weights", "structures", "both"]] = "both"

    sparsity: float = 0.5
    rate: float = 0.1
    distance: float = 5e-4
    channel_sparsity: float = 0.5
    channel_rate: float = 0.45
    channel_distance: float = 0.01
    accuracy: float = 0.5
    penalty: float = 1e-4
    shrink: bool = True

    def __post_init__(self) -> None:
        for name in ("sparsity", "channel_sparsity", "distance", "channel_distance", "accuracy"):
            refuse(not 0.0 <= getattr(self, name) < 1.0, name, getattr(self, name), "it is 0 to below 1")
        for name in ("rate", "channel_rate"):
            refuse(not 0.0 < getattr(self, name) < 1.0, name, getattr(self, name), "it is above 0 and below 1")
        refuse(not 0.0 <= self.penalty < math.inf, "penalty", self.penalty, "it must be 0 or more; 0 is without")

    def changes_masks(self, round: int) -> bool | None:
        return None if round and (self.sparsity or self.channel_sparsity) else False

    def check(self, run: RunFacts) -> None:
        for check in (check_differences, check_gate, check_epochs, check_scales):
            check("subfedavg_hybrid", run)

    def candidates(self, params: Tree, mask: Mask, ctx: Context) -> tuple[Candidate, ...]:
        assert ctx.structure is not None
        found, left = [], alive(ctx.structure, ("filter",), mask)
        fewer = shrink(left.counts(), self.channel_rate, unit_counts(left.layout, self.channel_sparsity))
        if fewer != left.counts():
            names, scores = left.layout.names, unit_scores(ctx.structure, params, "norm_scale", among=left)
            kept = keep_top(scores, fewer, names=names, within=left)
            whole = mask & ctx.structure.mask(kept_units(ctx.structure, kept))
            found.append(Candidate(chosen=kept, names=names, mask=whole, distance=self.channel_distance))
        linear = tuple(name for name in ctx.prunable if len(params.layout.shape(name)) == 2)
        # Of what the channels leave: what went with them is no work of this kind.
        there = ctx.structure.mask(kept_units(ctx.structure, left)).counts(linear)
        least = uniform(params.layout, linear, self.sparsity)
        least = {name: round(count * there[name] / params[name].numel()) for name, count in least.items()}
        lighter = shrink(mask.counts(linear), self.rate, least)
        if lighter != mask.counts(linear):
            single = mask & drop(params, mask, lighter, names=linear)
            found.append(Candidate(chosen=single, names=linear, mask=single, distance=self.distance))
        return tuple(found)

    def begin(self, message: Message, job: Job, memory: Mask | None, ctx: Context) -> tuple[Message, Job, Any]:
        assert ctx.structure is not None
        pull = scale_signs(ctx.structure, job.params, self.penalty)
        drift = job.drift if not self.penalty else pull if job.drift is None else add(job.drift, pull)
        job = replace(job, drift=drift, shrink=self.shrink and job.mask is not None)
        return super().begin(message, job, memory, ctx)

    def end(self, fit: Fit, message: Message, memory: Any, ctx: Context) -> tuple[Fit, Message, Mask | None]:
        fit, message, memory = super().end(fit, message, memory, ctx)
        if fit.mask is not None and (units := ctx.structure) and "buffers" in fit.received:
            held = held_buffers(units, units.kept(fit.mask), fit.buffers, fit.received["buffers"])
            return replace(fit, buffers=held), message, memory
        return fit, message, memory
