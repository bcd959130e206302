"""FedAvg: clients train for a while, the server averages what changed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from fedray import tree
from fedray.round import Context, Fit, Policy, Server, refuse
from fedray.strategies.differences import SendsDifferences
from fedray.strategies.model_parts import WEIGHTINGS, Weighting, vote
from fedray.sums import Sums
from fedray.tree import Tree


@final
@dataclass(frozen=True, kw_only=True)
class FedAvg(SendsDifferences[None, None], Policy[None, None]):
    """Federated averaging (McMahan et al. 2017, algorithm 1), as a mean of differences.

    Each coordinate is averaged over the clients that vouch for it, so different masks need no other aggregator;
    where nobody vouches the server's value stays. At lr 1 and equal masks this is the mean of the weights. A
    client that took no step sends a difference of zero, and counts.

    lr:        the server's rate: params + lr * mean difference. Above 0.
    weight_by: "examples" weights a client by its number of examples, "uniform" counts each client once.
    """

    lr: float = 1.0
    weight_by: Weighting = "examples"

    def __post_init__(self) -> None:
        refuse(not 0.0 < self.lr < math.inf, "lr", self.lr, "it must be above 0; 1.0 is the plain mean")
        refuse(self.weight_by not in WEIGHTINGS, "weight_by", self.weight_by, f"choose {' or '.join(WEIGHTINGS)}")

    def weight(self, fit: Fit) -> float:
        return vote(fit, self.weight_by)

    def step(self, server: Server, sums: Sums, memory: None, ctx: Context) -> tuple[Tree, None]:
        mean = sums.mean("delta", otherwise=0.0)
        return tree.add(server.params, mean, self.lr * ctx.server_lr), memory
