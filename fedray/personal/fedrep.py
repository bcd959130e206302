"""FedRep: each client fits a head to the shared body first, then the body to its head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

from fedray.personal.keeping import KeepsTensors, Kept, check_head, head, place, refuse_head
from fedray.round import Context, Job, Message, Policy, RunFacts, refuse
from fedray.tree import Layout


@final
@dataclass(frozen=True, kw_only=True)
class FedRep(KeepsTensors, Policy[None, Kept | None]):
    """Shared representations (Collins et al. 2021, algorithm 1).

    In each round a client trains its head for `head_epochs` with the received body fixed, then the body with the head
    fixed for as long as the trainer says (one epoch in the paper, trainer.epochs=1). Corrections of the body's steps (a
    pull, a drift) play no part in the first phase; those of the loss and of its sharpness do. Statistics of batches are
    those of the second. Tensors that another policy keeps count as head: they are trained in the first phase.

    layers:      how many of the last layers with a weight matrix are the head, with all that follows. At least 1.
    names:       patterns of the parameters to take instead, such as ["fc2.*"]; None for `layers`.
    head_epochs: passes over the client's data in the first phase; at least 1, and 10 in the paper.
    """

    layers: int = 1
    names: tuple[str, ...] | None = None
    head_epochs: int = 10

    def __post_init__(self) -> None:
        refuse_head(self.layers, self.names)
        rule = "it is a number of epochs, at least 1; personal=fedper trains head and body at once"
        refuse(self.head_epochs < 1, "head_epochs", self.head_epochs, rule)

    def check(self, run: RunFacts) -> None:
        check_head("personal.fedrep", run, self.layers, self.names)

    def keeps(self, kinds: Mapping[str, str], buffers: Layout) -> frozenset[str]:
        return head(kinds, buffers, self.layers, self.names)

    def begin(self, message: Message, job: Job, memory: Kept | None, ctx: Context) -> tuple[Message, Job, Kept | None]:
        assert ctx.train is not None
        assert ctx.client is not None
        job = place(job, memory, ctx)
        assert job.local is not None
        if job.num_steps == 0:
            return message, job, memory
        steps = self.head_epochs * math.ceil(ctx.client.num_examples / job.batch_size)
        plain = replace(job, drift=None, prox=0.0, anchor=None, wants=frozenset())
        first = ctx.train(replace(plain, num_steps=steps, trains=frozenset(job.local.layout.names)), "head")
        return message, replace(job, local=first.local, trains=frozenset(job.params.layout.names)), memory
