"""What the two kinds of Sub-FedAvg share: when a client takes another mask."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

from fedray.prune.merge import hamming
from fedray.pruners.own_masks import OwnMask
from fedray.round import Context, Fit, Job, Message, View
from fedray.tree import Mask, Tree


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What one more event of one kind would leave.

    chosen: of what it decides about: coordinates of parameters, or whole units. names: the tensors, or groups, of it.
    mask:   over the parameters. distance: how far `chosen` must move between the first and the last epoch.
    """

    chosen: Mask
    names: tuple[str, ...]
    mask: Mask
    distance: float


class ComparesEpochs(OwnMask, ABC):
    """A client takes candidates that still move in local training; a policy names this before `Policy`.

    The candidates after the first epoch are those of one epoch from what was received, with batches of its own: then
    no other policy sees local training cut in two, and momentum is not lost between. That is one epoch more, counted
    among the examples seen, for as long as there is a candidate.

    accuracy: what the trained model, under all candidates that moved, must be above; they are taken together or not.
    """

    accuracy: float

    @abstractmethod
    def candidates(self, params: Tree, mask: Mask, ctx: Context) -> tuple[Candidate, ...]:
        """What one more event would leave of these parameters under `mask`; empty where all targets are reached. How
        many there are, and of what, depends on the mask alone."""

    def begin(self, message: Message, job: Job, memory: Mask | None, ctx: Context) -> tuple[Message, Job, Any]:
        mask = Mask.full(job.params.layout) if job.mask is None else job.mask
        if job.num_steps == 0 or not self.candidates(job.params, mask, ctx):
            return message, job, memory
        assert ctx.client is not None
        assert ctx.train is not None
        steps = math.ceil(ctx.client.num_examples / job.batch_size)
        first = ctx.train(replace(job, num_steps=steps, wants=frozenset()), "first epoch")
        return message, job, {"early": tuple(one.chosen for one in self.candidates(first.params, mask, ctx))}

    def end(self, fit: Fit, message: Message, memory: Any, ctx: Context) -> tuple[Fit, Message, Mask | None]:
        if not isinstance(memory, dict):
            return fit, message, fit.mask
        mask = Mask.full(fit.params.layout) if fit.mask is None else fit.mask
        cut = mask
        for early, late in zip(memory["early"], self.candidates(fit.params, mask, ctx), strict=True):
            if hamming(early, late.chosen, names=late.names) > late.distance:
                cut &= late.mask
        if cut != mask:
            smaller = fit.cut(cut)
            assert ctx.validate is not None
            if ctx.validate(View(params=smaller.params, buffers=fit.buffers, mask=cut))["accuracy"] > self.accuracy:
                return smaller, message, cut
        return fit, message, fit.mask
