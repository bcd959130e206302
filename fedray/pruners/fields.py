"""What pruners share: the fields that most of them have, under the same names, and what values these may have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fedray.errors import ConfigError
from fedray.prune.allocate import ALLOCATIONS, BUDGETS, ROUNDINGS, total_kept
from fedray.prune.merge import MERGES
from fedray.prune.regrow import first_mask
from fedray.prune.schedule import KINDS, is_event, sparsity_at
from fedray.prune.shrink import falling
from fedray.round import Context, RunFacts, Server, refuse
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
    """Refuse a run that ends before the schedule does, and a budget that the end of it cannot meet."""
    field = "start" if policy.schedule == "one_shot" else "finish"
    last = getattr(policy, field)
    if last > run.rounds:
        raise ConfigError(
            f"pruner.{field} is {last}; it must be at most rounds ({run.rounds}), or the sparsity of "
            f"{policy.sparsity:g} is never reached; lower it or raise rounds"
        )
    check_budget(policy, run)


def check_budget(policy: Any, run: RunFacts) -> None:
    """Refuse a sparsity that the budget makes impossible in this model."""
    if run.layout is not None and hasattr(policy, "budget"):
        how = {"rounding": policy.rounding, "budget": policy.budget}
        total_kept(run.layout, run.prunable, policy.sparsity, **how)


def check_start(policy: Any, run: RunFacts) -> None:
    """Refuse a model that comes with fewer weights than a policy keeps of a whole one, and a budget that is impossible.

    For policies that never keep more than what the model came with.
    """
    check_budget(policy, run)
    if run.initial_mask is None:
        return
    layout, names, left = run.initial_mask.layout, run.prunable, sum(run.initial_mask.counts(run.prunable).values())
    how: dict[str, Any] = {"rounding": policy.rounding, "budget": policy.budget}
    if not hasattr(policy, "allocation") or getattr(policy, "ranking", "local") == "global":
        kept = total_kept(layout, names, policy.sparsity, **how)
    else:
        kept = sum(ALLOCATIONS[policy.allocation](layout, names, policy.sparsity, **how).values())
    if kept > left:
        raise ConfigError(
            f"pruner.sparsity is {policy.sparsity:g}; that keeps {kept:,} weights, and the model of model.init_from "
            f"comes with {left:,}, a sparsity of {run.initial_mask.sparsity(names):.4g}: set a higher one, or "
            "pruner=none to go on with that mask"
        )


def moves(policy: Any, round: int) -> bool:
    """Whether a policy with `every` and `until` moves its mask in a round; until None is never."""
    return 0 < round and round % policy.every == 0 and (policy.until is None or round < policy.until)


def warn_moves(policy: Any, run: RunFacts) -> tuple[str, ...]:
    """What to say of a policy with `every` and `until` that never moves its mask, or does so when training is over."""
    times = f"every is {policy.every} and until is {'null' if policy.until is None else policy.until}"
    if not any(moves(policy, round) for round in range(1, run.rounds + 1)):
        return (f"{times}: in {run.rounds} rounds the mask never moves",)
    if moves(policy, run.rounds):
        return (
            f"{times}: the mask moves in round {run.rounds}, the last, and what it brings back is not trained; "
            f"test/accuracy_before_prune is that of the model before: set until to {run.rounds} or less",
        )
    return ()


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


def first_counts(policy: Any, server: Server, ctx: Context) -> dict[str, int]:
    """What a policy keeps of each tensor from the start: of a model that comes with a mask no more than that."""
    mask = Mask.full(server.params.layout) if server.mask is None else server.mask
    return falling(mask, ctx.prunable, policy.sparsity, policy.allocation, policy.budget, policy.rounding)


def sparse_start(policy: Any, server: Server, ctx: Context) -> Server:
    """The server under the first mask of a policy with `initial`: see `prune.regrow.first_mask`."""
    counts, key = first_counts(policy, server, ctx), ctx.key.fold("random mask")
    return server.cut(first_mask(server.params, counts, policy.initial, key, names=ctx.prunable, within=server.mask))
