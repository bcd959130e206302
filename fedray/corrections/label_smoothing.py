"""Label smoothing: local targets that are not quite sure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from fedray.errors import ConfigError
from fedray.round import Context, Job, Message, Policy, RunFacts, refuse


@final
@dataclass(frozen=True, kw_only=True)
class LabelSmoothing(Policy[None, None]):
    """Cross-entropy against (1 - s) * one-hot + s / num_classes (Szegedy et al. 2016, section 7).

    In training alone: evaluation scores the plain loss. At 0 this is the strategy alone; smoothing what is smooth
    already leaves (1 - s) (1 - t) of the one-hot target.

    smoothing: s, in [0, 1).
    """

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        rule = "it is 0 to below 1; the paper's is 0.1, and 0 switches it off"
        refuse(not 0.0 <= self.smoothing < 1.0, "smoothing", self.smoothing, rule)

    def check(self, run: RunFacts) -> None:
        if run.objective == "regression":
            raise ConfigError(
                "correction is label_smoothing and the data's objective is regression; there are no labels to smooth: "
                "leave the correction out"
            )

    def begin(self, message: Message, job: Job, memory: None, ctx: Context) -> tuple[Message, Job, None]:
        if self.smoothing == 0.0:
            return message, job, memory
        there = job.loss.smoothing
        smoothing = there + self.smoothing - there * self.smoothing
        return message, replace(job, loss=replace(job.loss, smoothing=smoothing)), memory
