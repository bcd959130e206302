"""FedSAM: local steps that look for flat minima."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

from fedray.errors import ConfigError
from fedray.round import Context, Job, Message, Policy, RunFacts, refuse
from fedray.tree import Layout


@final
@dataclass(frozen=True, kw_only=True)
class FedSAM(Policy[None, None]):
    """Sharpness-aware local steps (Qu et al. 2022, algorithm 1; the step is equation 2 of Foret et al. 2021).

    Each step takes the gradient at w + rho g / |g| instead of w, with the same batch, which doubles its cost. At rho
    0 this is the strategy alone; several radii add up.

    rho: radius of the neighbourhood, at least 0.
    """

    rho: float = 0.05

    def __post_init__(self) -> None:
        refuse(not 0.0 <= self.rho < math.inf, "rho", self.rho, "it must be 0 or more; 0 switches the climb off")

    @property
    def looks_ahead(self) -> bool:  # type: ignore[override]  # at radius 0 it changes nothing
        return self.rho > 0.0

    def check(self, run: RunFacts) -> None:
        sent = [name for _, policy in run.policies for name in policy.parts(Layout((), ()), Layout((), ()))]
        if "delta" not in sent:
            raise ConfigError(
                "correction is fedsam; it changes local steps, and this strategy takes none: set strategy=fedavg, or "
                "leave the correction out"
            )

    def begin(self, message: Message, job: Job, memory: None, ctx: Context) -> tuple[Message, Job, None]:
        return message, replace(job, sharpness=job.sharpness + self.rho), memory
