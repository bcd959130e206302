"""FedProx: a pull towards the received model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

from fedray.errors import ConfigError
from fedray.round import Context, Job, Message, Policy, RunFacts, refuse
from fedray.tree import Layout


@final
@dataclass(frozen=True, kw_only=True)
class FedProx(Policy[None, None]):
    """Adds mu / 2 * |w - w_received|^2 to the local loss (Li et al. 2020, equation 2).

    The paper also lets slow clients do less work; that is the trainer's affair. At mu 0 this is the strategy alone.

    mu: coefficient of the pull, at least 0.
    """

    mu: float

    def __post_init__(self) -> None:
        refuse(not 0.0 <= self.mu < math.inf, "mu", self.mu, "it must be 0 or more; 0 switches the pull off")

    def check(self, run: RunFacts) -> None:
        none = Layout((), ())
        if self.mu and not any("delta" in policy.parts(none, none) for _, policy in run.policies):
            raise ConfigError(
                f"correction.fedprox.mu is {self.mu:g}; the pull acts on clients that take local steps, and this "
                "strategy takes one gradient where it is zero: set strategy=fedavg, or correction=none"
            )

    def begin(self, message: Message, job: Job, memory: None, ctx: Context) -> tuple[Message, Job, None]:
        return message, replace(job, prox=job.prox + self.mu), memory
