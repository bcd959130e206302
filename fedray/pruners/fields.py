"""What pruners share: the fields that most of them have, under the same names, and what values these may have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fedray.errors import ConfigError
from fedray.prune.allocate import ALLOCATIONS, BUDGETS, ROUNDINGS
from fedray.prune.merge import MERGES
from fedray.prune.schedule import KINDS, is_event, sparsity_at
from fedray.prune.shrink import falling
from fedray.round import Context, RunFacts, refuse
from fedray.tree import Mask

CHOICES: Mapping[str, tuple[str, ...]] = {
    "allocation": tuple(ALLOCATIONS),
    "budget": BUDGETS,
    "rounding": ROUNDINGS,
    "ranking": ("local", "global"),
    "schedule": KINDS,
    "ratio_decay": ("constant", "cosine"),
    "merge": MERGES,
}
"""Fields that are one of a few words."""


def refuse_fields(policy: Any) -> None:
    """Refuse a bad value of any field that has a usual name: those of `CHOICES`, sparsity, start, finish, every.

    sparsity: in [0, 1). every: at least 1. start: at least 0. finish: after the start, where a schedule is gradual.
    """
    fields = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    if "sparsity" in fields:
        sparsity = fields["sparsity"]
        refuse(not 0.0 <= sparsity < 1.0, "sparsity", sparsity, "it is 0 to below 1; 0.9 keeps 1 in 10")
    for name, options in CHOICES.items():
        if name in fields:
            between = " or " if len(options) == 2 else ", "
            refuse(fields[name] not in options, name, fields[name], f"choose {between.join(options)}")
    if "start" in fields:
        refuse(fields["start"] < 0, "start", fields["start"], "it is a round, and 0 prunes before the first")
    if "every" in fields:
        refuse(fields["every"] < 1, "every", fields["every"], "it is a number of rounds, at least 1")
    if "schedule" in fields and fields["schedule"] != "one_shot":
        kind, start, finish = fields["schedule"], fields["start"], fields["finish"]
        late = f"a {kind} schedule ends after its start ({start}): write the round of the last pruning"
        refuse(finish <= start, "finish", finish, late)


def check_reached(policy: Any, run: RunFacts) -> None:
    """Refuse a run that ends before the schedule does."""
    field = "start" if policy.schedule == "one_shot" else "finish"
    last = getattr(policy, field)
    if last > run.rounds:
        raise ConfigError(
            f"pruner.{field} is {last}; it must be at most rounds ({run.rounds}), or the sparsity of "
            f"{policy.sparsity:g} is never reached; lower it or raise rounds"
        )


def is_due(policy: Any, round: int) -> bool:
    """Whether the schedule of a policy prunes in a round."""
    return is_event(round, kind=policy.schedule, start=policy.start, end=policy.finish, every=policy.every)


def scheduled(policy: Any, round: int) -> float:
    """The fraction removed after a round, by the schedule of a policy."""
    times = {"start": policy.start, "end": policy.finish, "every": policy.every}
    return sparsity_at(round, kind=policy.schedule, sparsity=policy.sparsity, **times)


def scheduled_counts(policy: Any, mask: Mask, ctx: Context) -> dict[str, int]:
    """What a mask keeps of each tensor after this round: see `prune.shrink.falling`."""
    sparsity, how = scheduled(policy, ctx.round), (policy.allocation, policy.budget, policy.rounding)
    return falling(mask, ctx.prunable, sparsity, *how)
