"""SET: sparse evolutionary training at the server: weak weights give way to random ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch

from fedray.prune.allocate import Allocation
from fedray.prune.regrow import swap
from fedray.pruners.fields import sparse_start
from fedray.pruners.swapping import SwapsWeights
from fedray.round import Context, Policy, Server, refuse
from fedray.sums import Sums
from fedray.tree import Tree


@final
@dataclass(frozen=True, kw_only=True)
class SET(SwapsWeights, Policy[None, None]):
    """Sparse evolutionary training (Mocanu et al. 2018, algorithm 1), with rounds for epochs.

    In round r, if r % every == 0 and r < until, the server drops the floor(ratio_r * kept) smallest magnitudes of its
    average in each tensor and grows as many, drawn without replacement from what was cut before. Clients have no part
    in it and nothing more is sent. Counts never change. Deviations: the smallest magnitudes are dropped, where the
    paper takes the smallest positive and the largest negative weights apart; grown weights start at zero, as in the
    comparison of Evci et al. 2020, and are not drawn.

    initial: the first mask: "random" (which costs its seed on the wire), or "magnitude" of the initial weights.
    The other settings are explained in `pruners.swapping`; allocation "er" and a constant ratio are the paper's.
    """

    cuts: ClassVar[Literal["none", "weights", "structures", "both"]] = "weights"

    allocation: Allocation = "er"
    ratio_decay: Literal["constant", "cosine"] = "constant"
    initial: Literal["magnitude", "random"] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self.initial not in ("magnitude", "random"), "initial", self.initial, "choose magnitude or random")

    def init_server(self, server: Server, ctx: Context) -> tuple[Server, None]:
        return sparse_start(self, server, ctx), None

    def settle(self, server: Server, sums: Sums, memory: None, ctx: Context) -> tuple[Server, Sums, None]:
        if not self.is_due(ctx.round):
            return server, sums, memory
        assert server.mask is not None
        layout, numbers = server.params.layout, self.swaps(server.mask, ctx)
        # The largest of independent numbers are a draw without replacement; float64, so that no two tie.
        drawn = Tree(layout, torch.rand(layout.size, generator=ctx.key.fold("grow").torch(), dtype=torch.float64))
        return server.cut(swap(server.params, drawn, server.mask, numbers, names=ctx.prunable)), sums, memory
