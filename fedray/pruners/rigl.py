"""RigL at the server: weak weights give way to those that the clients' gradients ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from fedray.prune.regrow import swap
from fedray.pruners.fields import sparse_start
from fedray.pruners.swapping import GROWTH, SwapsByGradients
from fedray.round import Context, Policy, Server, refuse
from fedray.sums import Sums
from fedray.tree import Mask, Tree


@final
@dataclass(frozen=True, kw_only=True)
class RigL(SwapsByGradients, Policy[None, None]):
    """The rigged lottery (Evci et al. 2020, section 3, algorithm 1), with rounds for steps.

    In round r, if r % every == 0 and r < until, clients send, after training, the dense gradient at their weights where
    the mask cuts. In each tensor the server drops the floor(ratio_r * kept) smallest magnitudes of its average and
    grows as many, the largest of the mean gradient. Grown weights are zero; counts never change. Deviations: what is
    dropped cannot grow in the same round (the authors' code lets it, at zero), so nobody sends a gradient of what is
    kept; the mean of gradients at the clients' own weights stands for one at the average.

    initial: the first mask: "random" (which costs its seed on the wire), or "magnitude" of the initial weights.
    gradient_batch_size: examples behind a client's gradient (all, if it has fewer); None for all.
    until:   the paper stops after 3/4 of the training. The other settings are explained in `pruners.swapping`.
    """

    cuts: ClassVar[Literal["none", "weights", "structures", "both"]] = "weights"

    initial: Literal["magnitude", "random"] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self.initial not in ("magnitude", "random"), "initial", self.initial, "choose magnitude or random")

    def init_server(self, server: Server, ctx: Context) -> tuple[Server, None]:
        return sparse_start(self, server, ctx), None

    def asked(self, gradient: Tree, mask: Mask, ctx: Context) -> Mask:
        return ~mask

    def settle(self, server: Server, sums: Sums, memory: None, ctx: Context) -> tuple[Server, Sums, None]:
        if not self.is_due(ctx.round) or GROWTH not in sums:
            return server, sums, memory
        assert server.mask is not None
        gradient, numbers = sums.mean(GROWTH, otherwise=0.0), self.swaps(server.mask, ctx)
        return server.cut(swap(server.params, gradient, server.mask, numbers, names=ctx.prunable)), sums, memory
