"""FedLC: logits calibrated by how often a client has each class."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

from fedray.errors import ConfigError
from fedray.round import ABSENT_SHIFT, Context, Job, Message, Policy, RunFacts, refuse


@final
@dataclass(frozen=True, kw_only=True)
class FedLC(Policy[None, None]):
    """Logits calibration (Zhang et al. 2022, equation 7): the local loss is the cross-entropy of f_c - tau n_c^(-1/4).

    n_c is the client's number of examples of class c. A class that it does not have takes no part in its softmax, for
    which a shift of 100 stands here: the formula's limit is infinite. In training alone: evaluation takes the logits as
    they are. At tau 0 this is the strategy alone; the shift adds to what is there.

    tau: strength of the calibration, at least 0. The paper tunes it.
    """

    tau: float = 1.0

    def __post_init__(self) -> None:
        refuse(not 0.0 <= self.tau < math.inf, "tau", self.tau, "it must be 0 or more; 0 switches the calibration off")

    def check(self, run: RunFacts) -> None:
        if run.objective not in (None, "classification"):
            raise ConfigError(
                f"correction is fedlc and the data's objective is {run.objective}; it calibrates by the classes of "
                "examples: leave the correction out"
            )

    def begin(self, message: Message, job: Job, memory: None, ctx: Context) -> tuple[Message, Job, None]:
        if self.tau == 0.0:
            return message, job, memory
        assert ctx.client is not None
        counts = ctx.client.label_counts
        shift = tuple(self.tau * count**-0.25 if count else ABSENT_SHIFT for count in counts)
        there = job.loss.logit_shift
        if there is not None:
            shift = tuple(a + b for a, b in zip(there, shift, strict=True))
        return message, replace(job, loss=replace(job.loss, logit_shift=shift)), memory
