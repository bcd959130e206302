"""Ditto: each client has a model of its own beside the global one, tied to it by a spring."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, final

from fedray.errors import ConfigError
from fedray.personal.innermost import check_innermost
from fedray.round import Context, Job, Message, Policy, RunFacts, View, refuse

Own = dict[str, Any]
"""`params`, `buffers` and, where clients keep tensors, `local` and `local_buffers` of the client's own model."""


@final
@dataclass(frozen=True, kw_only=True)
class Ditto(Policy[None, Own | None]):
    """Personal models by a pull towards the global one (Li et al. 2021, algorithm 1 with equation 2).

    Beside its part in the global model, which nothing here touches, a client in the cohort takes steps on
    F_k(v) + pull / 2 |v - w|^2, w being the model that it received. v is the model that it runs; it has buffers of its
    own, stays under the mask of the round, and never travels. Until its first round a client runs the global model. A
    pruner that gives each client another part of the model from round to round is refused, for v would lose the others.

    pull:   lambda of the paper, at least 0; 0 is local training alone.
    epochs: passes of v over the client's data in a round, at least 1; None for the steps of the global job.
    start:  v before its first round: "initial" is the model that the run starts from, as in the paper, "received" the
            one that the client receives in that round.
    """

    pull: float = 0.1
    epochs: int | None = None
    start: Literal["initial", "received"] = "initial"

    def __post_init__(self) -> None:
        refuse(not 0.0 <= self.pull < math.inf, "pull", self.pull, "it must be 0 or more; 0 is local training alone")
        few = "it is a number of epochs, at least 1, or null for the steps of the global model"
        refuse(self.epochs is not None and self.epochs < 1, "epochs", self.epochs, few)
        refuse(self.start not in ("initial", "received"), "start", self.start, "choose initial or received")

    def check(self, run: RunFacts) -> None:
        check_innermost(self, run)
        for name, policy in run.policies:
            moves = any(policy.changes_masks(round) for round in range(1, run.rounds + 1))
            if policy.sends_each and moves:
                raise ConfigError(
                    f"{name} gives clients other parts of the model from round to round, and of a model of its own a "
                    "client would lose what is not in the last part: keep parts fixed (pruner.assignment=fixed, "
                    "pruner.shift=0), or set personal=local_fine_tuning"
                )

    def begin(self, message: Message, job: Job, memory: Own | None, ctx: Context) -> tuple[Message, Job, Own | None]:
        assert ctx.job is not None
        assert ctx.train is not None
        assert ctx.client is not None
        if job.num_steps == 0:
            return message, job, memory
        if memory is None:
            first = ctx.job if self.start == "initial" else job
            memory = {"params": first.params, "buffers": first.buffers}
            memory |= {"local": first.local, "local_buffers": first.local_buffers}
        steps = job.num_steps
        if self.epochs is not None:
            steps = self.epochs * math.ceil(ctx.client.num_examples / job.batch_size)
        # The corrections of the global job hold its clients together; this model is meant to differ.
        mine = replace(job, **memory, num_steps=steps, prox=self.pull, anchor=job.params, drift=None)
        fit = ctx.train(replace(mine, trains=None, wants=frozenset(), lr=ctx.lr), "ditto")
        own = {"params": fit.params, "buffers": fit.buffers, "local": fit.local, "local_buffers": fit.local_buffers}
        return message, job, own

    def view(self, view: View, memory: Own | None, ctx: Context) -> View:
        return view if memory is None else replace(view, **memory)
