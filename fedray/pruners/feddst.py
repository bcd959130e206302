"""FedDST: clients prune and regrow a sparse model, the server cuts the union of their masks back to budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from fedray.errors import ConfigError
from fedray.prune.allocate import Allocation, Budget, Rounding
from fedray.prune.regrow import drop, grow, recut
from fedray.prune.schedule import cosine
from fedray.pruners.fields import check_start, moves, refuse_fields, sparse_start, warn_moves
from fedray.round import Context, Fit, Message, Policy, RunFacts, Server, refuse
from fedray.sums import Sums
from fedray.tree import Layout


@final
@dataclass(frozen=True, kw_only=True)
class FedDST(Policy[None, None]):
    """Federated dynamic sparse training (Bibikar et al. 2022, algorithm 1).

    In round r, if r % every == 0 and r < until, each client, after training, drops the smallest magnitudes of each
    tensor, takes the gradient of one batch at the pruned point, and grows the largest |gradient| back to the count;
    grown weights are zero. The server averages each weight over those who kept it and keeps the largest of each
    tensor, as many as before. Deviations from the authors' code (bibikar/feddst): tensors whose part exceeds their
    size are kept whole and the others fill the budget; the ratio in use is the decayed one; the gradient is taken
    after pruning; growth ranks dropped weights alone.

    sparsity:   fraction removed, in [0, 1), in every round. allocation: "erk", "er" or "uniform".
    initial:    the first mask: "magnitude" of the initial weights, or "random" (which costs its seed on the wire).
    ratio:      a client prunes to s + (1 - s) * ratio and regrows; ratio_decay: "cosine" to 0 at `until`, "constant".
    gradient_batch_size: examples behind the growth gradient (all, if a client has fewer); None for all.
    regrow_dropped: whether what was just dropped may grow, as in the authors' code; if not, only for want of others.
    budget, rounding: what the sparsity is a fraction of, and how counts are rounded: see `prune.allocate`.
    """

    cuts: ClassVar[Literal["none", "weights", "structures", "both"]] = "weights"

    sparsity: float
    allocation: Allocation = "erk"
    initial: Literal["magnitude", "random"] = "magnitude"
    every: int = 10
    until: int = 200
    ratio: float = 0.5
    ratio_decay: Literal["constant", "cosine"] = "cosine"
    gradient_batch_size: int | None = 32
    regrow_dropped: bool = True
    budget: Budget = "prunable_weights"
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        refuse_fields(self)
        refuse(self.initial not in ("magnitude", "random"), "initial", self.initial, "choose magnitude or random")
        refuse(self.until < 0, "until", self.until, "it is a round, and 0 freezes the first mask")
        refuse(not 0.0 <= self.ratio <= 1.0, "ratio", self.ratio, "it is the fraction of kept weights swapped, 0 to 1")
        size, rule = self.gradient_batch_size, "it is a number of examples, at least 1, or null for all"
        refuse(size is not None and size < 1, "gradient_batch_size", size, rule)

    def sparsity_after(self, round: int) -> float:
        return self.sparsity

    def changes_masks(self, round: int) -> bool:
        return round == 0 or moves(self, round)

    def check(self, run: RunFacts) -> None:
        sent = [name for _, policy in run.policies for name in policy.parts(Layout((), ()), Layout((), ()))]
        if "delta" not in sent:
            raise ConfigError("pruner is feddst; it needs a strategy that sends part 'delta': set strategy=fedavg")
        check_start(self, run)

    def warns(self, run: RunFacts) -> tuple[str, ...]:
        return warn_moves(self, run)

    def init_server(self, server: Server, ctx: Context) -> tuple[Server, None]:
        return sparse_start(self, server, ctx), None

    def end(self, fit: Fit, message: Message, memory: None, ctx: Context) -> tuple[Fit, Message, None]:
        if not self.changes_masks(ctx.round) or fit.num_steps == 0:
            return fit, message, memory
        assert fit.mask is not None
        assert ctx.probe is not None
        ratio = self.ratio if self.ratio_decay == "constant" else cosine(ctx.round, initial=self.ratio, end=self.until)
        counts = fit.mask.counts(ctx.prunable)
        fewer = {name: round((1.0 - ratio) * count) for name, count in counts.items()}
        pruned = drop(fit.params, fit.mask, fewer, names=ctx.prunable)
        batch = self.gradient_batch_size and min(self.gradient_batch_size, fit.num_examples)
        _, seen = ctx.probe(fit.params, fit.buffers, pruned, wants=frozenset({"grad"}), batch_size=batch)
        avoid = None if self.regrow_dropped else fit.mask
        grown = grow(seen["grad"], pruned, counts, names=ctx.prunable, avoid=avoid)
        # Two cuts: a weight that was dropped and came back starts at zero like any other that grows.
        return fit.cut(pruned).cut(grown), message, memory

    def settle(self, server: Server, sums: Sums, memory: None, ctx: Context) -> tuple[Server, Sums, None]:
        if not self.changes_masks(ctx.round) or "delta" not in sums:
            return server, sums, memory
        assert server.mask is not None
        return server.cut(recut(server.params, server.mask, sums.support("delta"), names=ctx.prunable)), sums, memory
