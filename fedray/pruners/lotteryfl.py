"""LotteryFL: each client finds a winning ticket of its own, by pruning a little and starting again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

from fedray.prune.allocate import Budget, Rounding, uniform
from fedray.prune.regrow import drop
from fedray.prune.shrink import shrink
from fedray.pruners.fields import check_budget, refuse_fields
from fedray.pruners.own_masks import OwnMask, check_differences, check_gate, check_steps
from fedray.round import Context, Fit, Job, Message, Policy, RunFacts, View, refuse
from fedray.tree import Mask, Tree, restrict

Ticket = Mask | tuple[Mask | None, Tree, Tree]
"""The mask, and where a client runs what it trained, parameters and buffers."""


@final
@dataclass(frozen=True, kw_only=True)
class LotteryFL(OwnMask, Policy[None, Ticket | None]):
    """Personal lottery tickets (Li et al. 2021, "LotteryFL: empower edge intelligence with personalized and
    communication-efficient federated learning", section 4, algorithm 1).

    A client in the cohort looks at what it received, the server's weights under its own mask. If that is accurate
    enough and its target is not reached, it cuts a fraction of what is left in each tensor, the smallest magnitudes,
    and starts again from the initial weights under the new mask; otherwise it trains on. Both ways it sends, and is
    sent, what its mask holds; the server averages each coordinate over its holders and keeps its value where it has
    none.

    Deviations: the gate looks at a part of the training data that is set apart (`validation`), where the authors'
    code looks at the client's test images; the last step ends at the target exactly, where theirs may go beyond;
    counts are exact, where they cut below a percentile; the initial weights stay what they were, biases too; what is
    cut is held at zero by the mask, where they stop weights that are nearly zero. The paper averages clients
    uniformly, which is strategy.weight_by=uniform. Rewinding leaves buffers as they were received, and a pull to the
    received model (FedProx) still leads there. The paper's tables count the values of weights one way alone; here both
    ways and masks are counted, and `reprice --as lotteryfl` has the paper's.

    sparsity: the target: fraction removed from each tensor, in [0, 1). The paper keeps 0.1, 0.3 or 0.5.
    rate:     the fraction of what is left that one event cuts, in (0, 1).
    accuracy: an event needs an accuracy above it, in [0, 1).
    runs:     a client's own model: "trained" is the one that it sent last, "averaged" the server's under its mask. The
              authors' code reports the best that either had on a client's test images in any round.
    budget, rounding: what the sparsity is a fraction of, and how counts are rounded: see `prune.allocate`.
    """

    cuts: ClassVar[Literal["none", "weights"]] = "weights"

    sparsity: float = 0.9
    rate: float = 0.2
    accuracy: float = 0.5
    runs: Literal["trained", "averaged"] = "trained"
    budget: Budget = "prunable_weights"
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        refuse_fields(self)
        refuse(not 0.0 < self.rate < 1.0, "rate", self.rate, "it is the fraction that an event cuts, above 0, below 1")
        refuse(not 0.0 <= self.accuracy < 1.0, "accuracy", self.accuracy, "it is 0 to below 1; the paper's is 0.5")
        refuse(self.runs not in ("trained", "averaged"), "runs", self.runs, "choose trained or averaged")

    def changes_masks(self, round: int) -> bool | None:
        return None if round and self.sparsity else False

    def check(self, run: RunFacts) -> None:
        check_differences("lotteryfl", run)
        check_gate("lotteryfl", run)
        check_steps("lotteryfl", run)
        check_budget(self, run)

    def begin(
        self, message: Message, job: Job, memory: Ticket | None, ctx: Context
    ) -> tuple[Message, Job, Ticket | None]:
        layout, names = job.params.layout, ctx.prunable
        mask = Mask.full(layout) if job.mask is None else job.mask
        counts = mask.counts(names)
        least = uniform(layout, names, self.sparsity, budget=self.budget, rounding=self.rounding)
        fewer = shrink(counts, self.rate, least)
        if fewer == counts or job.num_steps == 0:
            return message, job, memory
        assert ctx.validate is not None
        if ctx.validate(View(params=job.params, buffers=job.buffers, mask=mask))["accuracy"] <= self.accuracy:
            return message, job, memory
        ticket = drop(job.params, mask, fewer, names=names)
        anchor = restrict(job.params if job.anchor is None else job.anchor, ticket)
        return message, replace(job, params=restrict(ctx.origin, ticket), mask=ticket, anchor=anchor), memory

    def end(
        self, fit: Fit, message: Message, memory: Ticket | None, ctx: Context
    ) -> tuple[Fit, Message, Ticket | None]:
        return fit, message, fit.mask if self.runs == "averaged" else (fit.mask, fit.params, fit.buffers)

    def view(self, view: View, memory: Ticket | None, ctx: Context) -> View:
        if not isinstance(memory, tuple):
            return super().view(view, memory, ctx)
        return replace(view, mask=memory[0], params=memory[1], buffers=memory[2])
