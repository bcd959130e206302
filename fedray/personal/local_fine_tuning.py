"""Local fine-tuning: a client trains the model a little more before it runs it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

from fedray.personal.innermost import BuildsOnViews, check_innermost
from fedray.round import Context, Policy, RunFacts, View, refuse


@final
@dataclass(frozen=True, kw_only=True)
class LocalFineTuning(BuildsOnViews, Policy[None, None]):
    """Evaluation after some local epochs (Wang et al. 2019, "Federated evaluation of on-device personalization").

    The training of the global model is untouched and nothing is kept: each evaluation starts from the model that the
    client would run otherwise, under its mask. Tensors that clients keep are trained too.

    epochs: passes over the client's training data, at least 1.
    lr:     learning rate, above 0; None for the trainer's in that round.
    """

    epochs: int = 1
    lr: float | None = None

    def __post_init__(self) -> None:
        refuse(self.epochs < 1, "epochs", self.epochs, "it is a number of epochs, at least 1")
        rule = "it must be above 0, or null for the trainer's"
        refuse(self.lr is not None and not 0.0 < self.lr < math.inf, "lr", self.lr, rule)

    def check(self, run: RunFacts) -> None:
        check_innermost(self, run)

    def view(self, view: View, memory: None, ctx: Context) -> View:
        assert ctx.job is not None
        assert ctx.train is not None
        assert ctx.client is not None
        steps = self.epochs * math.ceil(ctx.client.num_examples / ctx.job.batch_size)
        job = replace(ctx.job, params=view.params, buffers=view.buffers, mask=view.mask, num_steps=steps)
        job = replace(job, local=view.local, local_buffers=view.local_buffers)
        fit = ctx.train(job if self.lr is None else replace(job, lr=self.lr), "fine-tuning")
        return replace(view, params=fit.params, buffers=fit.buffers, local=fit.local, local_buffers=fit.local_buffers)
