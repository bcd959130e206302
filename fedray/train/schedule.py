"""The clients' learning rate as a function of the round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """lr in round 1; then constant, times `decay` every `every` rounds, or along a half cosine to 0 after the last.

    decay: factor of "step" (every `every` rounds) in (0, 1].
    """

    lr: float
    kind: Literal["constant", "step", "cosine"] = "constant"
    decay: float = 1.0
    every: int = 1

    def at(self, round: int, num_rounds: int) -> float:
        """The rate of this round; rounds count from 1."""
        if self.kind == "step":
            return self.lr * self.decay ** ((round - 1) // self.every)
        if self.kind == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * (round - 1) / num_rounds))
        return self.lr
