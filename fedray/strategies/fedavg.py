"""FedAvg: clients train for a while, the server averages what changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

from fedray import tree
from fedray.round import Context, Fit, Job, Message, Part, PartSpec, Policy, Server, refuse
from fedray.strategies.model_parts import (
    WEIGHTINGS,
    Weighting,
    model_specs,
    put_buffers,
    receive_model,
    send_model,
    settle_buffers,
    vote,
)
from fedray.sums import Sums
from fedray.tree import Layout


@final
@dataclass(frozen=True, kw_only=True)
class FedAvg(Policy[None, None]):
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

    def parts(self, params: Layout, buffers: Layout) -> Mapping[str, PartSpec]:
        return {**model_specs(params, buffers), "delta": PartSpec(layout=params, direction="up")}

    def send(self, server: Server, message: Message, memory: None, ctx: Context) -> Message:
        return send_model(server, message)

    def begin(self, message: Message, job: Job, memory: None, ctx: Context) -> tuple[Message, Job, None]:
        return message, receive_model(message, job), memory

    def end(self, fit: Fit, message: Message, memory: None, ctx: Context) -> tuple[Fit, Message, None]:
        weight = vote(fit, self.weight_by)
        # Against what was received, so that a lossy download changes nothing here; and only where the client
        # vouches, for a weight that it dropped is no difference to average.
        delta = tree.restrict(tree.sub(fit.params, fit.received["params"]), fit.mask)
        message = message.put("delta", Part(value=delta, weight=weight, support=fit.mask))
        return fit, put_buffers(replace(message, mask=fit.mask), fit.buffers, weight=weight), memory

    def settle(self, server: Server, sums: Sums, memory: None, ctx: Context) -> tuple[Server, Sums, None]:
        if "delta" not in sums:
            return server, sums, memory
        params = tree.add(server.params, sums.mean("delta", otherwise=0.0), self.lr)
        return settle_buffers(replace(server, params=params), sums), sums, memory
