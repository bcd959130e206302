"""What a run is to reach: targets that are reported when they are reached, and when to stop early."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedray.metrics import rises


@dataclass(frozen=True, kw_only=True)
class Goals:
    """
    metric:     of a row, such as "test/accuracy"; losses, errors and perplexities get better as they fall.
    targets:    values of it: the rounds, bytes and seconds that the run took to each become metrics.
    at_targets: whether the run ends when it has reached all of them.
    patience:   evaluations without a new best, by more than min_delta, after which the run ends; None for no end.
    """

    metric: str = "test/accuracy"
    targets: tuple[float, ...] = ()
    at_targets: bool = False
    patience: int | None = None
    min_delta: float = 0.0

    @property
    def stops(self) -> bool:
        """Whether the length of the run depends on its evaluations."""
        return self.at_targets or self.patience is not None

    @property
    def rising(self) -> bool:
        return rises(self.metric)


@dataclass
class Progress:
    """How far a run is with its goals. `plain` and `of_plain` are for checkpoints."""

    goals: Goals
    best: float | None = None
    since_best: int = 0
    reached: dict[float, dict[str, float]] = field(default_factory=dict)

    def enter(self, row: Mapping[str, Any]) -> None:
        """Take an evaluated round in.

        NaN reaches nothing and is no new best; a round without the metric, as with an empty cohort, does not count.
        """
        goals = self.goals
        value = row.get(goals.metric)
        if value is None:
            return
        if self._better(value):
            self.best, self.since_best = value, 0
        else:
            self.since_best += 1
        for target in goals.targets:
            if target not in self.reached and (value >= target if goals.rising else value <= target):
                self.reached[target] = {
                    "rounds": row["round"],
                    "bytes": row["wire/total_bytes"],
                    "seconds": row["time/total_s"],
                }

    def metrics(self) -> dict[str, float]:
        """`target/<value>/rounds|bytes|seconds` of what is reached."""
        return {
            f"target/{target:g}/{name}": number
            for target, numbers in self.reached.items()
            for name, number in numbers.items()
        }

    def _better(self, value: float) -> bool:
        if self.best is None:
            return not math.isnan(value)
        gain = value - self.best if self.goals.rising else self.best - value
        return gain > self.goals.min_delta

    @property
    def why_stop(self) -> str | None:
        """Why the run ends here; None if it goes on."""
        goals = self.goals
        if goals.at_targets and all(target in self.reached for target in goals.targets):
            return f"{goals.metric} has reached {', '.join(f'{target:g}' for target in goals.targets)}"
        if goals.patience is not None and self.since_best >= goals.patience:
            return f"{goals.metric} has not been better than {self.best} in {goals.patience} evaluations"
        return None

    def plain(self) -> dict[str, Any]:
        return {"best": self.best, "since_best": self.since_best, "reached": list(self.reached.items())}

    @classmethod
    def of_plain(cls, goals: Goals, plain: Mapping[str, Any]) -> Progress:
        reached = {float(target): dict(numbers) for target, numbers in plain["reached"]}
        return cls(goals, plain["best"], plain["since_best"], reached)
