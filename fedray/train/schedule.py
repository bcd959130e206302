"""Learning rates as a function of the round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Schedule = Literal["constant", "step", "cosine", "linear", "inverse_sqrt"]


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """lr in round 1; then constant, times `decay` every `every` rounds, along a half cosine or a straight line to 0
    after the last round, or divided by the square root of the round.

    decay:  factor of "step" (every `every` rounds) in (0, 1]; every=1 decays exponentially.
    warmup: rounds in which the rate rises in equal steps to its full value; the schedule goes on meanwhile.
    """

    lr: float
    kind: Schedule = "constant"
    decay: float = 1.0
    every: int = 1
    warmup: int = 0

    @property
    def depends_on_rounds(self) -> bool:
        """Whether the rate of a round depends on how many there are."""
        return self.kind in ("cosine", "linear")

    def at(self, round: int, num_rounds: int) -> float:
        """The rate of this round; rounds count from 1."""
        lr = self.lr if round >= self.warmup else self.lr * round / self.warmup
        if self.kind == "step":
            return lr * self.decay ** ((round - 1) // self.every)
        if self.kind == "cosine":
            return lr * 0.5 * (1 + math.cos(math.pi * (round - 1) / num_rounds))
        if self.kind == "linear":
            return lr * (1 - (round - 1) / num_rounds)
        if self.kind == "inverse_sqrt":
            return lr / math.sqrt(round)
        return lr
