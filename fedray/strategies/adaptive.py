"""What adaptive optimisers on the server share: moments of the mean difference, and the step along them."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from fedray import tree
from fedray.round import Context, Fit, Server, refuse
from fedray.strategies.differences import SendsDifferences
from fedray.strategies.model_parts import WEIGHTINGS, Weighting, vote
from fedray.strategies.moments import alive, realign, where
from fedray.sums import Sums
from fedray.tree import Tree

Moments = dict[str, Any]
"""`first` and `second`, Trees; `mask`, under which they were kept; `steps`, how often the server moved."""


@dataclass(frozen=True, kw_only=True)
class Adaptive(SendsDifferences[Moments | None, None]):
    """Adaptive federated optimisation (Reddi et al. 2021, algorithm 2), with the mean difference d:

        m <- beta1 m + (1 - beta1) d;    v <- as the optimiser has it;    params + lr m / (sqrt(v) + tau)

    The paper averages clients uniformly in algorithm 2 and by examples in its experiments. Under masks, which it does
    not have: what left is forgotten; a coordinate that grows starts at m = 0 and at the mean v of its tensor's kept
    coordinates, for at v = 0 its first step would be about lr / tau times its difference; where nobody vouches, value
    and moments stay.

    lr:        the server's rate, which the paper tunes for each task. Above 0.
    beta1:     decay of the first moment, in [0, 1).
    tau:       what is added to the root; the larger, the less adaptive. Above 0.
    initial:   v before the first round: "tau_squared" as in the paper, or "zero" as in torch.optim.
    weight_by: "examples" weights a client by its number of examples, "uniform" counts each client once.
    """

    lr: float
    beta1: float
    tau: float = 1e-3
    initial: Literal["tau_squared", "zero"] = "tau_squared"
    weight_by: Weighting = "examples"

    def __post_init__(self) -> None:
        refuse(not 0.0 < self.lr < math.inf, "lr", self.lr, "it must be above 0")
        refuse(not 0.0 <= self.beta1 < 1.0, "beta1", self.beta1, "it is 0 to below 1; 0 switches the first moment off")
        refuse(not 0.0 < self.tau < math.inf, "tau", self.tau, "it must be above 0; the paper's is 0.001")
        starts = ("tau_squared", "zero")
        refuse(self.initial not in starts, "initial", self.initial, f"choose {' or '.join(starts)}")
        refuse(self.weight_by not in WEIGHTINGS, "weight_by", self.weight_by, f"choose {' or '.join(WEIGHTINGS)}")

    @abstractmethod
    def second(self, old: Tree, square: Tree) -> Tree:
        """The second moment after a squared mean difference."""

    def correction(self, steps: int) -> tuple[float, float]:
        """What m and v are divided by in this step, the first of which has steps = 1."""
        return 1.0, 1.0

    def weight(self, fit: Fit) -> float:
        return vote(fit, self.weight_by)

    def step(self, server: Server, sums: Sums, memory: Moments | None, ctx: Context) -> tuple[Tree, Moments | None]:
        mean, support = sums.mean("delta", otherwise=0.0), sums.support("delta")
        layout, now = mean.layout, alive(server, support)
        start = self.tau**2 if self.initial == "tau_squared" else 0.0
        if memory is None:
            old, old_square, steps = Tree.zeros(layout), Tree(layout, mean.flat.new_full((layout.size,), start)), 1
        else:
            old = realign(memory["first"], memory["mask"], now)
            old_square = realign(memory["second"], memory["mask"], now, fill=start)
            steps = memory["steps"] + 1
        first = where(support, tree.add(tree.scale(old, self.beta1), mean, 1.0 - self.beta1), old)
        second = where(support, self.second(old_square, Tree(layout, mean.flat.square())), old_square)
        of_first, of_second = self.correction(steps)
        ahead = Tree(layout, first.flat / of_first / ((second.flat / of_second).sqrt() + self.tau))
        params = where(support, tree.add(server.params, ahead, self.lr * ctx.server_lr), server.params)
        return params, {"first": first, "second": second, "mask": now, "steps": steps}


@dataclass(frozen=True, kw_only=True)
class Decaying(Adaptive):
    """Adaptive optimisers whose second moment forgets.

    beta2:           its decay, in [0, 1).
    bias_correction: whether both moments are divided by 1 - beta^steps, as torch.optim.Adam does and the paper does
                     not; it presumes that they start at zero.
    """

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    bias_correction: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(not 0.0 <= self.beta2 < 1.0, "beta2", self.beta2, "it is 0 to below 1; the paper's is 0.99")
        needs = "it corrects moments that start at zero: set initial=zero with it, or leave it out"
        refuse(self.bias_correction and self.initial != "zero", "bias_correction", self.bias_correction, needs)

    def correction(self, steps: int) -> tuple[float, float]:
        return (1.0 - self.beta1**steps, 1.0 - self.beta2**steps) if self.bias_correction else (1.0, 1.0)
