"""How many coordinates stay where masks only shrink: counts that end at a target and never beyond it."""

from __future__ import annotations

from collections.abc import Mapping

from fedray.prune.allocate import ALLOCATIONS, Allocation, Budget, Rounding, total_kept
from fedray.tree import Layout, Mask


def shrink(counts: Mapping[str, int], rate: float, least: Mapping[str, int]) -> dict[str, int]:
    """How many each tensor keeps after one step: (1 - rate) of what it has, to the nearest; the last step ends at
    `least` exactly.

    counts: kept now, by name. rate: in (0, 1). least: the target by name. At least one goes where the target is not
    reached, so that every tensor gets there; a count that is below the target already stays.
    """
    fewer = {name: min(count - 1, round((1.0 - rate) * count)) for name, count in counts.items()}
    return {name: min(count, max(fewer[name], least[name])) for name, count in counts.items()}


def falling(
    mask: Mask,
    names: tuple[str, ...],
    sparsity: float,
    allocation: Allocation,
    budget: Budget = "prunable_weights",
    rounding: Rounding = "nearest",
) -> dict[str, int]:
    """How many each tensor of a mask keeps at a sparsity, none more than now; as now where a whole model would keep
    more in all: the mask waits until the sparsity has passed its own.

    See `allocate` for the arguments. Raises ConfigError where the budget is impossible.
    """
    limits, allocate = mask.counts(names), ALLOCATIONS[allocation]
    whole = allocate(mask.layout, names, sparsity, budget=budget, rounding=rounding)
    # Counts that are rounded down miss the budget by a few, either way.
    least = min(sum(whole.values()), total_kept(mask.layout, names, sparsity, budget=budget, rounding=rounding))
    if least > sum(limits.values()):
        return limits
    counts = allocate(mask.layout, names, sparsity, budget=budget, rounding=rounding, limits=limits)
    return {name: min(count, limits[name]) for name, count in counts.items()}


def falling_total(
    mask: Mask | None,
    layout: Layout,
    names: tuple[str, ...],
    sparsity: float,
    budget: Budget = "prunable_weights",
    rounding: Rounding = "nearest",
) -> int:
    """How many all named tensors of a mask, None for a whole model, keep together at a sparsity: no more than now."""
    total = total_kept(layout, names, sparsity, budget=budget, rounding=rounding)
    return total if mask is None else min(total, sum(mask.counts(names).values()))
