"""FedTiny: clients choose among coarse masks, then layers are adjusted group by group by few gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import numpy as np

from fedray.errors import ConfigError
from fedray.prune.allocate import ALLOCATIONS, Allocation
from fedray.prune.regrow import swap
from fedray.prune.score import magnitude
from fedray.prune.search import noisy_counts
from fedray.prune.select import keep_top
from fedray.pruners.candidates import Moments, SelectsByStatistics
from fedray.pruners.swapping import GROWTH, SwapsByGradients
from fedray.round import Context, Policy, RunFacts, Server, refuse
from fedray.sums import Sums
from fedray.tree import Mask, Tree


@final
@dataclass(frozen=True, kw_only=True)
class FedTiny(SelectsByStatistics, SwapsByGradients, Policy[Moments, None]):
    """FedTiny (Huang et al. 2023): adaptive batch normalisation selection, then progressive pruning.

    The first mask is one of several at the same sparsity, which keep the largest initial weights of each tensor and
    divide the budget differently: see `pruners.candidates`. In round r, if r % every == 0 and r < until, one group of
    tensors is adjusted, the last first, then around again. Of each tensor in it clients send, after training, the k =
    floor(ratio_r * kept) largest gradients where the mask cuts; the server drops the k smallest magnitudes of its
    average and grows the k largest of the weighted sum of gradients, in which what was not sent is zero. Grown weights
    are zero. Deviations: groups are runs of tensors, where the paper takes the blocks of its networks; what is dropped
    cannot grow in the same round; candidates come from the initial weights, which need not be pre-trained.

    allocation: of candidate 0; the others multiply its counts by 1 + noise * u, u uniform in [-1, 1), and keep the sum.
    groups:     how many runs of tensors, as equal as can be; 1 adjusts all tensors at once.
    gradient_batch_size: examples behind a client's gradient (all, if it has fewer); None for all.
    The other settings are explained in `pruners.swapping` and `pruners.candidates`.
    """

    cuts: ClassVar[Literal["none", "weights", "structures", "both"]] = "weights"

    allocation: Allocation = "uniform"
    noise: float = 0.5
    until: int = 100
    groups: int = 5

    def __post_init__(self) -> None:
        SelectsByStatistics.__post_init__(self)
        SwapsByGradients.__post_init__(self)
        refuse(not 0.0 <= self.noise < 1.0, "noise", self.noise, "it is 0 to below 1, and 0 makes all candidates equal")
        refuse(self.groups < 1, "groups", self.groups, "it is a number of groups, at least 1")

    def changes_masks(self, round: int) -> bool | None:
        return round == 0 or self.is_due(round) or self.chooses(round)

    def check(self, run: RunFacts) -> None:
        SwapsByGradients.check(self, run)
        if run.initial_mask is not None:
            raise ConfigError(
                "pruner is fedtiny; its candidates are masks of a whole model, and that of model.init_from comes with "
                "one: name its file final/model.safetensors for the weights alone, or take pruner=rigl"
            )

    def warns(self, run: RunFacts) -> tuple[str, ...]:
        return self.unscored(run) + SwapsByGradients.warns(self, run)

    def candidate(self, number: int, ctx: Context) -> Mask:
        how: dict[str, Any] = {"budget": self.budget, "rounding": self.rounding}
        counts = ALLOCATIONS[self.allocation](ctx.origin.layout, ctx.prunable, self.sparsity, **how)
        if number:
            counts = noisy_counts(ctx.origin.layout, counts, self.noise, ctx.run_key.fold("candidate", number))
        return keep_top(magnitude(ctx.origin), counts, names=ctx.prunable)

    def init_server(self, server: Server, ctx: Context) -> tuple[Server, Moments]:
        return server.cut(self.candidate(0, ctx)), self.first_memory(server)

    def asked(self, gradient: Tree, mask: Mask, ctx: Context) -> Mask:
        # What is not prunable is kept whole by the selection, and nobody asks for it.
        return keep_top(magnitude(gradient), self._swaps(mask, ctx), names=ctx.prunable, within=~mask) & ~mask

    def settle(self, server: Server, sums: Sums, memory: Moments, ctx: Context) -> tuple[Server, Sums, Moments]:
        if not self.is_due(ctx.round) or GROWTH not in sums:
            return server, sums, memory
        assert server.mask is not None
        summed = Tree(server.params.layout, sums.mean(GROWTH, otherwise=0.0).flat * sums.weight(GROWTH))
        grown = swap(server.params, summed, server.mask, self._swaps(server.mask, ctx), names=ctx.prunable)
        return server.cut(grown), sums, memory

    def _swaps(self, mask: Mask, ctx: Context) -> dict[str, int]:
        groups = np.array_split(np.array(ctx.prunable), min(self.groups, len(ctx.prunable)))
        group = groups[-1 - (ctx.round // self.every - 1) % len(groups)]
        return self.swaps(mask, ctx, among=tuple(group.tolist()))
