"""FedAvgM: the server moves with momentum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from fedray import tree
from fedray.round import Context, Fit, Policy, Server, refuse
from fedray.strategies.differences import SendsDifferences
from fedray.strategies.model_parts import WEIGHTINGS, Weighting, vote
from fedray.strategies.moments import alive, realign, where
from fedray.sums import Sums
from fedray.tree import Mask, Tree

Momentum = tuple[Tree, Mask | None]
"""The momentum, and the mask under which it was kept."""


@final
@dataclass(frozen=True, kw_only=True)
class FedAvgM(SendsDifferences[Momentum | None, None], Policy[Momentum | None, None]):
    """Federated averaging with server momentum (Hsu et al. 2019, section 4.3).

    v <- momentum * v + mean difference; params + lr * v, or with `nesterov` params + lr * (mean difference +
    momentum * v), both in the form of torch.optim.SGD. At momentum 0 this is FedAvg. Under masks, which the paper
    does not have: the momentum of a coordinate that leaves is forgotten and one that grows starts at zero; where
    nobody vouches, value and momentum stay.

    lr:        the server's rate. Above 0.
    momentum:  in [0, 1). nesterov: whether the step looks ahead along it, as the paper's does.
    weight_by: "examples" weights a client by its number of examples, "uniform" counts each client once.
    """

    lr: float = 1.0
    momentum: float = 0.9
    nesterov: bool = False
    weight_by: Weighting = "examples"

    def __post_init__(self) -> None:
        refuse(not 0.0 < self.lr < math.inf, "lr", self.lr, "it must be above 0; 1.0 is the paper's")
        refuse(not 0.0 <= self.momentum < 1.0, "momentum", self.momentum, "it is 0 to below 1; 0 is strategy=fedavg")
        idle = "there is no momentum to look ahead along: set momentum above 0, or nesterov to false"
        refuse(self.nesterov and self.momentum == 0.0, "nesterov", self.nesterov, idle)
        refuse(self.weight_by not in WEIGHTINGS, "weight_by", self.weight_by, f"choose {' or '.join(WEIGHTINGS)}")

    def weight(self, fit: Fit) -> float:
        return vote(fit, self.weight_by)

    def step(self, server: Server, sums: Sums, memory: Momentum | None, ctx: Context) -> tuple[Tree, Momentum | None]:
        mean, support = sums.mean("delta", otherwise=0.0), sums.support("delta")
        now = alive(server, support)
        old = Tree.zeros(mean.layout) if memory is None else realign(*memory, now)
        velocity = where(support, tree.add(mean, old, self.momentum), old)
        ahead = tree.add(mean, velocity, self.momentum) if self.nesterov else velocity
        params = where(support, tree.add(server.params, ahead, self.lr * ctx.server_lr), server.params)
        return params, (velocity, now)
