"""How many coordinates to keep in each tensor, for one sparsity of the whole.

Every rule divides one budget among tensors in proportion to a whole-number share, with no tensor above its
size: a tensor whose part would exceed its size is kept whole, and the others divide what is left, until none
exceeds (Evci et al. 2020, appendix). Shares and sizes are integers, so this is done without rounding error.

budget:   what a sparsity is a fraction of. "prunable_weights": of the tensors in `names`. "all_parameters": of
          everything; what is never pruned is taken off first (FedPruning's convention).
rounding: "nearest": the total is exactly round((1 - sparsity) * N), or that minus what is never pruned; each
          tensor is within 1 of its real-valued part, and what flooring leaves over goes to the largest
          remainders, the earlier tensor first on a tie. "floor": budget and counts are rounded down; for er and
          erk the budget is the sum of each tensor's floor((1 - sparsity) * size) and a tensor that is kept whole
          takes floor(sparsity * size) from the others, as in google-research/rigl and FedPruning, so the total
          misses the budget by a few.
limits:   upper bounds by name, where a mask may only shrink; the size of the tensor without it. A budget above
          their sum is refused where the total is exact; counts that are rounded down are cut to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, get_args

from fedray.errors import ConfigError
from fedray.prune.select import keep_top_global
from fedray.tree import Layout, Mask, Tree

Allocation = Literal["uniform", "er", "erk"]
Rounding = Literal["nearest", "floor"]
Budget = Literal["prunable_weights", "all_parameters"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)
BUDGETS: tuple[str, ...] = get_args(Budget)

# A product that misses a whole number by float error alone counts as that number: (1 - 0.9) * 100 is 9.999...
FLOAT_ERROR = 1e-6


def total_kept(
    layout: Layout,
    names: tuple[str, ...],
    sparsity: float,
    *,
    rounding: Rounding = "nearest",
    budget: Budget = "prunable_weights",
) -> int:
    """How many coordinates of `names` are kept in all.

    sparsity: fraction removed, in [0, 1]. Raises ConfigError where that budget is impossible.
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ConfigError(f"pruner.sparsity is {sparsity!r}; it is the fraction removed, from 0 to 1")
    prunable = sum(_sizes(layout, names).values())
    everything = prunable if budget == "prunable_weights" else layout.size
    kept = (1.0 - sparsity) * everything
    total = (round(kept) if rounding == "nearest" else math.floor(kept + FLOAT_ERROR)) - (everything - prunable)
    if total < 0:
        raise ConfigError(
            f"pruner.sparsity is {sparsity:g}; with budget all_parameters it must be at most "
            f"{math.floor(1e4 * prunable / everything) / 1e4:g} here, because {everything - prunable:,} of "
            f"{everything:,} parameters are never pruned; lower it or set pruner.budget=prunable_weights"
        )
    return total


def uniform(
    layout: Layout,
    names: tuple[str, ...],
    sparsity: float,
    *,
    rounding: Rounding = "nearest",
    budget: Budget = "prunable_weights",
    limits: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Kept counts by name; every tensor is equally sparse."""
    if rounding == "floor":
        total, sizes = total_kept(layout, names, sparsity, rounding=rounding, budget=budget), _sizes(layout, names)
        floored = {name: total * size // max(sum(sizes.values()), 1) for name, size in sizes.items()}
        return floored if limits is None else {name: min(count, limits[name]) for name, count in floored.items()}
    return _divide(layout, names, sparsity, _sizes(layout, names), rounding, budget, limits)


def er(
    layout: Layout,
    names: tuple[str, ...],
    sparsity: float,
    *,
    rounding: Rounding = "nearest",
    budget: Budget = "prunable_weights",
    limits: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Kept counts by name; the kept fraction is proportional to (n_in + n_out) / (n_in * n_out).

    Erdos-Renyi (Mocanu et al. 2018). A vector counts as n_in = 1.
    """
    shares = {}
    for name in names:
        outputs, inputs, *kernel = _matrix(layout.shape(name))
        shares[name] = (outputs + inputs) * math.prod(kernel)
    return _divide(layout, names, sparsity, shares, rounding, budget, limits)


def erk(
    layout: Layout,
    names: tuple[str, ...],
    sparsity: float,
    *,
    rounding: Rounding = "nearest",
    budget: Budget = "prunable_weights",
    limits: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Kept counts by name; the kept fraction is proportional to sum(shape) / prod(shape).

    Erdos-Renyi-Kernel (Evci et al. 2020, section 3). A vector counts as n_in = 1.
    """
    shares = {name: sum(_matrix(layout.shape(name))) for name in names}
    return _divide(layout, names, sparsity, shares, rounding, budget, limits)


ALLOCATIONS: Mapping[str, Callable[..., dict[str, int]]] = {"uniform": uniform, "er": er, "erk": erk}


def ranked(
    score: Tree,
    names: tuple[str, ...],
    sparsity: float,
    *,
    within: Mask | None = None,
    rounding: Rounding = "nearest",
    budget: Budget = "prunable_weights",
) -> dict[str, int]:
    """Kept counts by name that one ranking over all tensors gives. It can empty a tensor; the data decide."""
    count = total_kept(score.layout, names, sparsity, rounding=rounding, budget=budget)
    return keep_top_global(score, count, names=names, within=within).counts(names)


def _divide(
    layout: Layout,
    names: tuple[str, ...],
    sparsity: float,
    shares: Mapping[str, int],
    rounding: Rounding,
    budget: Budget,
    limits: Mapping[str, int] | None,
) -> dict[str, int]:
    total = total_kept(layout, names, sparsity, rounding=rounding, budget=budget)
    sizes = _sizes(layout, names)
    caps = sizes if limits is None else {name: min(sizes[name], limits[name]) for name in names}
    # Flooring fills no budget: the counts of one event may leave a few less than the budget of the next.
    if rounding == "nearest" and total > sum(caps.values()):
        raise ConfigError(
            f"pruner.sparsity is {sparsity:g}; that keeps {total:,} weights, but only {sum(caps.values()):,} may "
            f"still be kept, so sparsity must not fall while masks only shrink"
        )
    if rounding == "floor":
        whole, rest = _whole(shares, sizes, lambda whole: _floored_rest(total, sizes, whole))
    else:
        whole, rest = _whole(shares, caps, lambda whole: total - sum(caps[name] for name in whole))
    split = {name: shares[name] for name in names if name not in whole}
    among = max(sum(split.values()), 1)
    kept = {name: caps[name] if name in whole else min(rest * shares[name] // among, caps[name]) for name in names}
    if rounding == "nearest":
        left_over = rest - sum(kept[name] for name in split)
        for name in sorted(split, key=lambda name: -(rest * shares[name] % among))[:left_over]:
            kept[name] += 1
    return kept


def _whole(
    shares: Mapping[str, int], caps: Mapping[str, int], rest_beside: Callable[[set[str]], int]
) -> tuple[set[str], int]:
    """The tensors that are kept up to their cap, and what is left for the others."""
    whole: set[str] = set()
    while True:
        rest = rest_beside(whole)
        among = sum(share for name, share in shares.items() if name not in whole)
        over = {name for name in shares if name not in whole and rest * shares[name] > caps[name] * among}
        if not over:
            return whole, rest
        # All at once: keeping one whole leaves more for the rest, so whoever exceeds now still will.
        whole |= over


def _floored_rest(total: int, sizes: Mapping[str, int], whole: set[str]) -> int:
    everything = max(sum(sizes.values()), 1)
    kept = sum(total * size // everything for name, size in sizes.items() if name not in whole)
    removed = sum((everything - total) * sizes[name] // everything for name in whole)
    return max(kept - removed, 0)


def _sizes(layout: Layout, names: tuple[str, ...]) -> dict[str, int]:
    return {name: math.prod(layout.shape(name)) for name in names}


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape, 1, 1)[:2] if len(shape) < 2 else shape
