"""FedDyn: a regulariser that each client moves until all agree on where the mean loss is least."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

from fedray import tree
from fedray.errors import ConfigError
from fedray.round import Context, Fit, Job, Message, Policy, RunFacts, Server, refuse
from fedray.strategies.differences import SendsDifferences, difference
from fedray.strategies.moments import where
from fedray.sums import Sums
from fedray.tree import Tree, restrict


@final
@dataclass(frozen=True, kw_only=True)
class FedDyn(SendsDifferences[Tree | None, Tree | None], Policy[Tree | None, Tree | None]):
    """Federated learning with dynamic regularisation (Acar et al. 2021, algorithm 1).

    Client k minimises L_k(w) - <g_k, w> + alpha / 2 |w - w_received|^2, then g_k <- g_k - alpha (w_k - w_received),
    which is its gradient at w_k once it has converged. The server keeps h <- h - alpha / m * (sum of differences), m
    being all clients, and moves to the mean of the w_k minus h / alpha. Both start at zero. Clients count once each:
    the optimum is that of the plain mean of their losses.

    Under masks, which the paper does not have: g_k and h live on the mask and start at zero on what grows, also on a
    weight that was dropped and grew back in one round; where nobody vouches, value and h stay. A client that was away
    while a weight left and returned does not know it, and keeps its g_k there. h follows what the server decoded, g_k
    what the client sent from.

    alpha: strength of the regulariser; above 0. The paper uses 0.1, 0.01 and 0.001.
    lr:    the server's rate on its move; 1.0 is the paper's. Above 0.
    """

    alpha: float = 0.01
    lr: float = 1.0

    def __post_init__(self) -> None:
        refuse(not 0.0 < self.alpha < math.inf, "alpha", self.alpha, "it must be above 0; strategy=fedavg is without")
        refuse(not 0.0 < self.lr < math.inf, "lr", self.lr, "it must be above 0; 1.0 is the paper's")

    def check(self, run: RunFacts) -> None:
        if run.optim.name != "sgd":
            raise ConfigError(
                f"trainer.optimizer is {run.optim.name!r}; strategy feddyn adds a constant to each gradient, which an "
                "adaptive optimiser rescales: set trainer.optimizer=sgd, or take strategy=fedavg"
            )

    def weight(self, fit: Fit) -> float:
        return 1.0

    def begin(self, message: Message, job: Job, memory: Tree | None, ctx: Context) -> tuple[Message, Job, Tree | None]:
        message, job, _ = super().begin(message, job, memory, ctx)
        job = replace(job, prox=job.prox + self.alpha)
        if memory is not None:
            mine = tree.scale(restrict(memory, job.mask), -1.0)
            job = replace(job, drift=mine if job.drift is None else tree.add(job.drift, mine))
        return message, job, memory

    def end(self, fit: Fit, message: Message, memory: Tree | None, ctx: Context) -> tuple[Fit, Message, Tree | None]:
        delta = difference(fit)
        message = self.upload(fit, message, delta)
        if fit.num_steps == 0:
            return fit, message, memory
        before = Tree.zeros(delta.layout) if memory is None else restrict(restrict(memory, fit.received.mask), fit.mask)
        return fit, message, fit.without_restarts(tree.add(before, delta, -self.alpha))

    def step(self, server: Server, sums: Sums, memory: Tree | None, ctx: Context) -> tuple[Tree, Tree | None]:
        mean, support = sums.mean("delta", otherwise=0.0), sums.support("delta")
        before = Tree.zeros(mean.layout) if memory is None else restrict(memory, server.mask)
        total = Tree(mean.layout, mean.flat * sums.weight("delta"))  # votes are 1 each: the sum over who vouches
        h = tree.add(before, total, -self.alpha / ctx.num_clients)
        move = tree.add(mean, h, -1.0 / self.alpha)
        return where(support, tree.add(server.params, move, self.lr * ctx.server_lr), server.params), h
