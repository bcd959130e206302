"""LAMP: magnitude pruning with one ranking over all layers that needs no layer-wise ratios."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from fedray.errors import ConfigError
from fedray.prune.allocate import BUDGETS, ROUNDINGS, Budget, Rounding, total_kept
from fedray.prune.schedule import KINDS, Kind, is_event, sparsity_at
from fedray.prune.score import lamp
from fedray.prune.select import keep_top_global
from fedray.pruners.cuts_weights import CutsWeights
from fedray.round import Context, Policy, RunFacts, Server, refuse
from fedray.tree import Mask


@final
@dataclass(frozen=True, kw_only=True)
class Lamp(CutsWeights, Policy[None, None]):
    """Layer-adaptive magnitude-based pruning (Lee et al. 2021, equation 4).

    The score of a weight is its square over the sum of the squares in its tensor that are not smaller. The largest
    weight of a tensor scores 1, so no tensor is emptied before all of them have one weight left. Deviations: it is the
    server that prunes, right after it has averaged, so all clients share one mask; the paper prunes trained models
    again and again by the same fraction of what is left, here `schedule` says how sparsity rises while rounds go on.

    sparsity: final fraction removed, in [0, 1).
    schedule: "one_shot" (at round `start`), "linear", "cubic" or "iterative": see `prune.schedule`.
    start, finish, every: rounds of the events; start 0 prunes the initial weights; one_shot reads `start` alone.
    sticky:   what is pruned stays pruned; otherwise clients train densely in a round that ends with an event.
    budget, rounding: what the sparsity is a fraction of, and how its count is rounded: see `prune.allocate`.
    """

    cuts: ClassVar[Literal["none", "weights", "structures", "both"]] = "weights"
    regrown: ClassVar[Literal["zero", "held"]] = "held"

    sparsity: float
    schedule: Kind = "iterative"
    start: int = 1
    finish: int = 5
    every: int = 1
    sticky: bool = True
    budget: Budget = "prunable_weights"
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        refuse(not 0.0 <= self.sparsity < 1.0, "sparsity", self.sparsity, "it is 0 to below 1; 0.9 keeps 1 in 10")
        refuse(self.schedule not in KINDS, "schedule", self.schedule, f"choose {', '.join(KINDS)}")
        refuse(self.start < 0, "start", self.start, "it is a round, and 0 prunes before the first")
        late = f"a {self.schedule} schedule ends after its start ({self.start}): write the round of the last pruning"
        refuse(self.schedule != "one_shot" and self.finish <= self.start, "finish", self.finish, late)
        refuse(self.every < 1, "every", self.every, "it is a number of rounds, at least 1")
        refuse(self.budget not in BUDGETS, "budget", self.budget, f"choose {' or '.join(BUDGETS)}")
        refuse(self.rounding not in ROUNDINGS, "rounding", self.rounding, f"choose {' or '.join(ROUNDINGS)}")

    def check(self, run: RunFacts) -> None:
        field, last = ("start", self.start) if self.schedule == "one_shot" else ("finish", self.finish)
        if last > run.rounds:
            raise ConfigError(
                f"pruner.{field} is {last}; it must be at most rounds ({run.rounds}), or the sparsity of "
                f"{self.sparsity:g} is never reached; lower it or raise rounds"
            )

    def sparsity_after(self, round: int) -> float:
        times = {"start": self.start, "end": self.finish, "every": self.every}
        return sparsity_at(round, kind=self.schedule, sparsity=self.sparsity, **times)

    def changes_masks(self, round: int) -> bool:
        return is_event(round, kind=self.schedule, start=self.start, end=self.finish, every=self.every)

    def chosen(self, server: Server, within: Mask | None, ctx: Context) -> Mask:
        layout, names, sparsity = server.params.layout, ctx.prunable, self.sparsity_after(ctx.round)
        total = total_kept(layout, names, sparsity, budget=self.budget, rounding=self.rounding)
        return keep_top_global(lamp(server.params, names=names), total, names=names, within=within)
