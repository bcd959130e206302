"""FedSGD: clients send one gradient, the server takes the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

from fedray import tree
from fedray.errors import ConfigError
from fedray.round import Context, Fit, Job, Message, Optim, Part, PartSpec, Policy, RunFacts, Server, refuse
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
class FedSGD(Policy[None, None]):
    """Federated SGD by aggregating gradients (McMahan et al. 2017, section 2).

    A client computes one batch gradient at the received model, and the server takes one step of plain SGD with the
    clients' rate times `lr`. With whole clients as batches and everyone present this is gradient descent. A client
    that could take no step sends no gradient; where nobody vouches the server's value stays.

    lr:         factor on trainer.lr. Above 0.
    weight_by:  "examples" weights a client by its number of examples, "uniform" counts each client once.
    batch_size: examples of the batch (all, if a client has fewer); None for all of the client's.
    """

    lr: float = 1.0
    weight_by: Weighting = "examples"
    batch_size: int | None = None

    def __post_init__(self) -> None:
        refuse(not 0.0 < self.lr < math.inf, "lr", self.lr, "it must be above 0; 1.0 steps with trainer.lr itself")
        refuse(self.weight_by not in WEIGHTINGS, "weight_by", self.weight_by, f"choose {' or '.join(WEIGHTINGS)}")
        few = "it is a number of examples, at least 1, or null for all of a client's"
        refuse(self.batch_size is not None and self.batch_size < 1, "batch_size", self.batch_size, few)

    def check(self, run: RunFacts) -> None:
        for name in ("name", "momentum", "weight_decay", "clip_norm"):
            value, plain = getattr(run.optim, name), getattr(Optim(), name)
            if value != plain:
                key = "trainer.optimizer" if name == "name" else f"trainer.{name}"
                raise ConfigError(
                    f"{key} is {value!r}; strategy fedsgd runs no local optimiser, so it must be {plain!r}; set it so "
                    f"or take strategy=fedavg"
                )
        if run.epochs != 1 or run.steps is not None:
            raise ConfigError(
                f"trainer.epochs is {run.epochs!r} and trainer.steps is {run.steps!r}; strategy fedsgd takes one "
                f"gradient a round: set trainer.epochs=1 and trainer.steps=null, or take strategy=fedavg"
            )

    def parts(self, params: Layout, buffers: Layout) -> Mapping[str, PartSpec]:
        return {**model_specs(params, buffers), "gradient": PartSpec(layout=params, direction="up")}

    def send(self, server: Server, message: Message, memory: None, ctx: Context) -> Message:
        return send_model(server, message)

    def begin(self, message: Message, job: Job, memory: None, ctx: Context) -> tuple[Message, Job, None]:
        assert ctx.client is not None
        examples = ctx.client.num_examples
        size = examples if self.batch_size is None else min(self.batch_size, examples)
        # A rate of zero leaves the model where it is: the step is there for its gradient.
        one = replace(job, num_steps=1, batch_size=size, lr=0.0, wants=job.wants | {"grad_sum"})
        return message, receive_model(message, one), memory

    def end(self, fit: Fit, message: Message, memory: None, ctx: Context) -> tuple[Fit, Message, None]:
        message = replace(message, mask=fit.mask)
        if fit.num_steps == 0:
            return fit, message, memory
        weight = vote(fit, self.weight_by)
        gradient = tree.restrict(tree.scale(fit.evidence["grad_sum"], 1.0 / fit.num_steps), fit.mask)
        message = message.put("gradient", Part(value=gradient, weight=weight, support=fit.mask))
        return fit, put_buffers(message, fit.buffers, weight=weight), memory

    def settle(self, server: Server, sums: Sums, memory: None, ctx: Context) -> tuple[Server, Sums, None]:
        if "gradient" not in sums:
            return server, sums, memory
        params = tree.add(server.params, sums.mean("gradient", otherwise=0.0), -ctx.lr * self.lr * ctx.server_lr)
        return settle_buffers(replace(server, params=params), sums), sums, memory
