"""What pruners share that keep one budget and swap weights in some rounds: settings, and when how many."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedray.prune.allocate import Allocation, Budget, Rounding
from fedray.prune.regrow import num_swaps
from fedray.prune.schedule import cosine
from fedray.pruners.fields import check_start, moves, refuse_fields, warn_moves
from fedray.round import Context, Fit, Message, Part, PartSpec, RunFacts, refuse
from fedray.tree import Layout, Mask, Tree, restrict


@dataclass(frozen=True, kw_only=True)
class SwapsWeights(ABC):
    """The budget, and the rounds in which the server swaps weights; a policy names this before `Policy`.

    In round r, if r % every == 0 and r < until, floor(ratio_r * kept) weights of a tensor are swapped, but no more than
    it has dropped ones; so counts never change. What grows has not been trained when its round is over, so `until` is
    best before the end of a run. A model that comes with a mask starts within it; what grows may lie outside.

    sparsity:   fraction removed, in [0, 1), in every round. allocation: how the kept weights are divided among tensors:
                "erk", "er" or "uniform".
    ratio:      the fraction of a tensor's kept weights that is swapped; ratio_decay: "cosine" to 0 at `until`, or
                "constant".
    budget, rounding: what the sparsity is a fraction of, and how counts are rounded: see `prune.allocate`.
    """

    sparsity: float
    allocation: Allocation = "erk"
    every: int = 10
    until: int = 200
    ratio: float = 0.3
    ratio_decay: Literal["constant", "cosine"] = "cosine"
    budget: Budget = "prunable_weights"
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        refuse_fields(self)
        refuse(self.until < 0, "until", self.until, "it is a round, and 0 freezes the first mask")
        refuse(not 0.0 <= self.ratio <= 1.0, "ratio", self.ratio, "it is the fraction of kept weights swapped, 0 to 1")

    def sparsity_after(self, round: int) -> float:
        return self.sparsity

    def changes_masks(self, round: int) -> bool | None:
        return round == 0 or self.is_due(round)

    def check(self, run: RunFacts) -> None:
        check_start(self, run)

    def warns(self, run: RunFacts) -> tuple[str, ...]:
        return warn_moves(self, run)

    def is_due(self, round: int) -> bool:
        """Whether weights are swapped in this round."""
        return moves(self, round)

    def swaps(self, mask: Mask, ctx: Context, among: tuple[str, ...] | None = None) -> dict[str, int]:
        """How many weights of each tensor to swap in this round. among: the tensors in which any are."""
        constant = self.ratio_decay == "constant"
        ratio = self.ratio if constant else cosine(ctx.round, initial=self.ratio, end=self.until)
        return num_swaps(mask, ratio, names=ctx.prunable, among=among)


GROWTH = "growth"


@dataclass(frozen=True, kw_only=True)
class SwapsByGradients(SwapsWeights):
    """With what clients send for it: after training, their gradients of some coordinates that the mask cuts.

    A policy that names this before `Policy` adds which coordinates (`asked`).

    gradient_batch_size: examples behind a client's gradient (all, if it has fewer); None for all.
    """

    gradient_batch_size: int | None = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        size, rule = self.gradient_batch_size, "it is a number of examples, at least 1, or null for all"
        refuse(size is not None and size < 1, "gradient_batch_size", size, rule)

    @abstractmethod
    def asked(self, gradient: Tree, mask: Mask, ctx: Context) -> Mask:
        """The coordinates whose gradient a client sends; none that the mask keeps."""

    def parts(self, params: Layout, buffers: Layout) -> Mapping[str, PartSpec]:
        return {GROWTH: PartSpec(layout=params, direction="up", lossy=False)}

    def end(self, fit: Fit, message: Message, memory: None, ctx: Context) -> tuple[Fit, Message, None]:
        if not self.is_due(ctx.round) or fit.num_steps == 0:
            return fit, message, memory
        assert fit.mask is not None
        assert ctx.probe is not None
        batch = self.gradient_batch_size and min(self.gradient_batch_size, fit.num_examples)
        _, seen = ctx.probe(fit.params, fit.buffers, fit.mask, wants=frozenset({"grad"}), batch_size=batch)
        support = self.asked(seen["grad"], fit.mask, ctx)
        part = Part(value=restrict(seen["grad"], support), weight=float(fit.num_examples), support=support)
        return fit, message.put(GROWTH, part), memory
