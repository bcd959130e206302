"""What pruners share whose clients prune to the counts of a schedule: see `prune.schedule` and `prune.allocate`."""

from __future__ import annotations

from typing import Protocol

from fedray.errors import ConfigError
from fedray.prune.allocate import ALLOCATIONS, BUDGETS, ROUNDINGS, Allocation, Budget, Rounding
from fedray.prune.schedule import KINDS, Kind, is_event, sparsity_at
from fedray.prune.shrink import falling
from fedray.round import Context, RunFacts, refuse
from fedray.tree import Mask


class Scheduled(Protocol):
    """A policy with these fields."""

    @property
    def sparsity(self) -> float: ...
    @property
    def schedule(self) -> Kind: ...
    @property
    def start(self) -> int: ...
    @property
    def finish(self) -> int: ...
    @property
    def every(self) -> int: ...
    @property
    def allocation(self) -> Allocation: ...
    @property
    def budget(self) -> Budget: ...
    @property
    def rounding(self) -> Rounding: ...


def refuse_schedule(policy: Scheduled) -> None:
    """Refuse values of the fields."""
    refuse(not 0.0 <= policy.sparsity < 1.0, "sparsity", policy.sparsity, "it is 0 to below 1; 0.9 keeps 1 in 10")
    refuse(policy.schedule not in KINDS, "schedule", policy.schedule, f"choose {', '.join(KINDS)}")
    refuse(policy.start < 1, "start", policy.start, "clients prune after training, so it is a round from 1 on")
    late = f"a {policy.schedule} schedule ends after its start ({policy.start}): write the round of the last pruning"
    refuse(policy.schedule != "one_shot" and policy.finish <= policy.start, "finish", policy.finish, late)
    refuse(policy.every < 1, "every", policy.every, "it is a number of rounds, at least 1")
    rule = f"choose {', '.join(ALLOCATIONS)}"
    refuse(policy.allocation not in ALLOCATIONS, "allocation", policy.allocation, rule)
    refuse(policy.budget not in BUDGETS, "budget", policy.budget, f"choose {' or '.join(BUDGETS)}")
    refuse(policy.rounding not in ROUNDINGS, "rounding", policy.rounding, f"choose {' or '.join(ROUNDINGS)}")


def check_schedule(policy: Scheduled, run: RunFacts) -> None:
    """Refuse a run that ends before the schedule does."""
    field, last = ("start", policy.start) if policy.schedule == "one_shot" else ("finish", policy.finish)
    if last > run.rounds:
        raise ConfigError(
            f"pruner.{field} is {last}; it must be at most rounds ({run.rounds}), or the sparsity of "
            f"{policy.sparsity:g} is never reached; lower it or raise rounds"
        )


def has_event(policy: Scheduled, round: int) -> bool:
    """Whether the schedule prunes in a round."""
    return is_event(round, kind=policy.schedule, start=policy.start, end=policy.finish, every=policy.every)


def scheduled(policy: Scheduled, round: int) -> float:
    """The fraction removed after a round."""
    times = {"start": policy.start, "end": policy.finish, "every": policy.every}
    return sparsity_at(round, kind=policy.schedule, sparsity=policy.sparsity, **times)


def scheduled_counts(policy: Scheduled, mask: Mask, ctx: Context) -> dict[str, int]:
    """What a mask keeps of each tensor after this round: see `prune.shrink.falling`."""
    return falling(
        mask,
        ctx.prunable,
        scheduled(policy, ctx.round),
        allocation=policy.allocation,
        budget=policy.budget,
        rounding=policy.rounding,
    )
