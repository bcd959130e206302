"""FedNova: clients that take more steps do not pull harder for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch

from fedray import tree
from fedray.errors import ConfigError
from fedray.round import Context, Fit, Job, Message, Optim, Part, PartSpec, Policy, RunFacts, Server, refuse
from fedray.strategies.differences import SendsDifferences, difference
from fedray.strategies.model_parts import WEIGHTINGS, Weighting, vote
from fedray.sums import Sums
from fedray.tree import Layout, Tree

STEPS = "effective_steps"
SCALAR = Layout((STEPS,), ((),))
Local = dict[str, float]
"""Between `begin` and `end` only: the momentum, whether it is nesterov's, and the pull of the job."""


@final
@dataclass(frozen=True, kw_only=True)
class FedNova(SendsDifferences[None, Local | None], Policy[None, Local | None]):
    """Normalised averaging (Wang et al. 2020, equations 8 and 9).

    A client sends its difference over its effective number of steps a_i, and a_i in a part of its own; the server
    moves by (mean of a_i) times (mean of what was sent), both with the same weights. a_i = |a_i|_1 of the paper
    (section 4): the local steps for plain SGD, [t - r (1 - r^t) / (1 - r)] / (1 - r) with momentum r after t steps,
    [1 - (1 - lr mu)^t] / (lr mu) with a pull of mu; for both at once, and for nesterov momentum, the same recursion.
    (Flower's port moves the server by the mean number of steps where there is a pull; here it is the mean of a_i.)
    Where all a_i are equal this is FedAvg. A client that took no step has no direction, and sends nothing.

    lr:        the server's rate. Above 0.
    weight_by: "examples" weights a client by its number of examples, "uniform" counts each client once.
    """

    lr: float = 1.0
    weight_by: Weighting = "examples"

    def __post_init__(self) -> None:
        refuse(not 0.0 < self.lr < math.inf, "lr", self.lr, "it must be above 0; 1.0 is the paper's")
        refuse(self.weight_by not in WEIGHTINGS, "weight_by", self.weight_by, f"choose {' or '.join(WEIGHTINGS)}")

    def check(self, run: RunFacts) -> None:
        if run.optim.name != "sgd":
            raise ConfigError(
                f"trainer.optimizer is {run.optim.name!r}; strategy fednova knows the effective steps of SGD alone: "
                "set trainer.optimizer=sgd, or take strategy=fedavg"
            )

    def weight(self, fit: Fit) -> float:
        return vote(fit, self.weight_by)

    def parts(self, params: Layout, buffers: Layout) -> Mapping[str, PartSpec]:
        steps = PartSpec(layout=SCALAR, direction="up", lossy=False, absolute=True)
        return {**super().parts(params, buffers), STEPS: steps}

    def begin(
        self, message: Message, job: Job, memory: Local | None, ctx: Context
    ) -> tuple[Message, Job, Local | None]:
        message, job, _ = super().begin(message, job, memory, ctx)
        return message, job, {"momentum": job.optim.momentum, "nesterov": job.optim.nesterov, "prox": job.prox}

    def end(self, fit: Fit, message: Message, memory: Local | None, ctx: Context) -> tuple[Fit, Message, Local | None]:
        assert memory is not None
        if fit.num_steps == 0:
            return fit, message, None
        optim = Optim(momentum=memory["momentum"], nesterov=bool(memory["nesterov"]))
        steps = optim.effective_steps(fit.num_steps, lr=fit.lr, prox=memory["prox"])
        if not 0.0 < steps < math.inf:
            raise ConfigError(
                f"the pull of {memory['prox']:g} at a rate of {fit.lr:g} overshoots, so strategy fednova finds "
                f"{steps:g} effective steps; lower the correction's mu or trainer.lr"
            )
        message = self.upload(fit, message, tree.scale(difference(fit), 1.0 / steps))
        value = Tree(SCALAR, torch.tensor([steps]))
        return fit, message.put(STEPS, Part(value=value, weight=self.weight(fit))), None

    def step(self, server: Server, sums: Sums, memory: None, ctx: Context) -> tuple[Tree, None]:
        steps = float(sums.mean(STEPS, otherwise=0.0).flat)
        return tree.add(server.params, sums.mean("delta", otherwise=0.0), self.lr * ctx.server_lr * steps), memory
