"""Prune and grow: swap the weakest kept coordinates for the strongest dropped ones, at the same counts.

    pruned = drop(params, mask, fewer, names=names)
    grown = grow(gradient, pruned, counts, names=names)

They are two steps because a method may look at the gradient at the point in between, where what was dropped
is zero. A coordinate that grows starts at zero, also one that was dropped a moment ago:
`restrict(restrict(params, pruned), grown)`. Where what is dropped does not compete, `swap` does both in one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from fedray.keys import Key
from fedray.prune.allocate import FLOAT_ERROR
from fedray.prune.score import magnitude
from fedray.prune.select import keep_top, random_mask
from fedray.tree import Mask, Tree


def first_mask(
    params: Tree,
    counts: Mapping[str, int],
    initial: Literal["magnitude", "random"],
    key: Key,
    *,
    names: tuple[str, ...],
    within: Mask | None = None,
) -> Mask:
    """The mask to start from: the largest magnitudes of each tensor, or coordinates drawn by `key`.

    within: what a model came with; only these coordinates may be kept. None for all.
    """
    if initial == "random":
        return random_mask(params.layout, names, counts, key, within=within)
    return keep_top(magnitude(params), counts, names=names, within=within)


def drop(params: Tree, mask: Mask, counts: Mapping[str, int], *, names: tuple[str, ...]) -> Mask:
    """Keep the `counts[name]` largest magnitudes among what is kept; ties stay at the lower flat index.

    Mocanu et al. 2018 (SET), Evci et al. 2020 (RigL).
    """
    return keep_top(magnitude(params), counts, names=names, within=mask)


def grow(
    gradient: Tree, mask: Mask, counts: Mapping[str, int], *, names: tuple[str, ...], avoid: Mask | None = None
) -> Mask:
    """Add the largest |gradient| among what `mask` drops until each tensor keeps `counts[name]`.

    gradient: dense, with respect to the effective weight: it must not be masked.
    avoid:    coordinates that grow only when nothing else is left, such as those dropped a moment ago; so the
              counts are met in any case. Without it they compete like any other (RigL and FedDST).
    Ties go to the lower flat index. Raises ConfigError for a count below what is kept or above the size.
    """
    missing = {name: counts[name] - kept for name, kept in mask.counts(names).items()}
    if not any(missing.values()):
        return mask
    score = magnitude(gradient)
    if avoid is None:
        return mask | keep_top(score, missing, names=names, within=~mask)
    first_choice = ~(mask | avoid)
    free = first_choice.counts(names)
    first = {name: min(missing[name], free[name]) for name in names}
    grown = mask | keep_top(score, first, names=names, within=first_choice)
    return grow(gradient, grown, counts, names=names)


def num_swaps(
    mask: Mask, ratio: float, *, names: tuple[str, ...], among: tuple[str, ...] | None = None
) -> dict[str, int]:
    """How many of each named tensor to swap: floor(ratio * kept), and no more than are dropped.

    ratio: in [0, 1]. among: the tensors in which any are swapped; all of `names` without it.
    A tensor that is kept whole has nothing to grow: what it lost could only come back, at zero.
    """
    numbers = {}
    for name, kept in mask.counts(names).items():
        dropped = mask[name].numel() - kept
        swapped = min(math.floor(ratio * kept + FLOAT_ERROR), dropped)
        numbers[name] = swapped if among is None or name in among else 0
    return numbers


def swap(params: Tree, score: Tree, mask: Mask, numbers: Mapping[str, int], *, names: tuple[str, ...]) -> Mask:
    """Drop the `numbers[name]` smallest magnitudes of each tensor, and grow as many of what `mask` had dropped before:
    those of the largest |score|.

    What is dropped here does not compete, so the score need not be known where the mask keeps. Ties go to the lower
    flat index. Raises ConfigError for a number above what is kept or dropped: see `num_swaps`.
    """
    counts = mask.counts(names)
    pruned = drop(params, mask, {name: count - numbers[name] for name, count in counts.items()}, names=names)
    return pruned | (keep_top(magnitude(score), numbers, names=names, within=~mask) & ~mask)


def recut(params: Tree, mask: Mask, union: Mask, *, names: tuple[str, ...]) -> Mask:
    """Keep as many of each named tensor as `mask` does: the largest magnitudes within `union`.

    union: what somebody kept after growing, which may be more than the mask. Where it is less, all of it stays and
           the count is filled up by index, from `mask` first, so the counts are met in any case.
    Bibikar et al. 2022 (FedDST), the server's half of the readjustment.
    """
    counts, held = mask.counts(names), union.counts(names)
    kept = drop(params, union, {name: min(counts[name], held[name]) for name in names}, names=names)
    # With zeros for gradients everything ties, and ties go to the lower index.
    return grow(Tree.zeros(kept.layout), kept, counts, names=names, avoid=~mask)
