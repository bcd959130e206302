"""FedAvg: clients train for a while, the server averages what changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from fedray import tree
from fedray.round import Context, Fit, Message, PartSpec, Policy, Server, refuse
from fedray.strategies.differences import (
    AVERAGES,
    Average,
    SendsDifferences,
    mean_difference,
    put_vote,
    votes_spec,
)
from fedray.strategies.model_parts import WEIGHTINGS, Weighting, vote
from fedray.sums import Sums
from fedray.tree import Layout, Tree


@final
@dataclass(frozen=True, kw_only=True)
class FedAvg(SendsDifferences[None, None], Policy[None, None]):
    """Federated averaging (McMahan et al. 2017, algorithm 1), as a mean of differences.

    Masks may differ from client to client, so a coordinate has holders: the clients that vouch for it. Where nobody
    holds, the server's value stays. At lr 1 and equal masks this is the mean of the weights. A client that took no
    step sends a difference of zero, and counts.

    lr:        the server's rate: params + lr * mean difference. Above 0.
    weight_by: "examples" weights a client by its number of examples, "uniform" counts each client once.
    average:   "holders" averages each coordinate over its holders: one alone decides about what it alone holds. "all"
               averages over everybody who answered, the others' difference being zero: what few hold moves slowly, and
               nothing shrinks, as it would if their weight counted as zero. The same bits where masks are equal.
    """

    lr: float = 1.0
    weight_by: Weighting = "examples"
    average: Average = "holders"

    def __post_init__(self) -> None:
        refuse(not 0.0 < self.lr < math.inf, "lr", self.lr, "it must be above 0; 1.0 is the plain mean")
        refuse(self.weight_by not in WEIGHTINGS, "weight_by", self.weight_by, f"choose {' or '.join(WEIGHTINGS)}")
        refuse(self.average not in AVERAGES, "average", self.average, f"choose {' or '.join(AVERAGES)}")

    def parts(self, params: Layout, buffers: Layout) -> Mapping[str, PartSpec]:
        return {**super().parts(params, buffers), **votes_spec(self.average)}

    def upload(self, fit: Fit, message: Message, delta: Tree) -> Message:
        return put_vote(super().upload(fit, message, delta), self.average, weight=self.weight(fit))

    def weight(self, fit: Fit) -> float:
        return vote(fit, self.weight_by)

    def step(self, server: Server, sums: Sums, memory: None, ctx: Context) -> tuple[Tree, None]:
        mean = mean_difference(sums, self.average)
        return tree.add(server.params, mean, self.lr * ctx.server_lr), memory
