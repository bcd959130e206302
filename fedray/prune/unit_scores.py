"""How much whole units matter, and which of them to keep.

The units of a model are laid out like the coordinates of a tree, so that `select` ranks them: one name for each group,
with an entry for each of its units. Residual blocks are groups of one unit, which would have nobody to be ranked
against; they share the name "blocks". A mask over that layout says which units stay.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from fedray.errors import ConfigError
from fedray.prune.select import keep_top, keep_top_global
from fedray.prune.structure import Group, Kept, Member, Structure, UnitKind
from fedray.tree import Layout, Mask, Tree

UnitScore = Literal["l1", "l2", "group", "norm_scale", "fpgm"]
"""l1: the sum of the absolute weights that compute a unit (Li et al. 2017, section 3.1), of all its layers where
several are coupled. l2: the root of the sum of their squares. Neither reads biases and norms.
group: the mean over the group's tensors, with those that read the unit and the scales of norms, of the sum of squares
of what belongs to the unit; biases are not read (Fang et al. 2023, DepGraph, as in torch-pruning's default).
norm_scale: the mean of |scale| of its normalisation layers (Liu et al. 2017, section 3).
fpgm: the sum of the Euclidean distances of the weights that compute it to those of the other units (He et al. 2019,
section 3): what lies in the midst of the others goes first."""
UNIT_SCORES: tuple[str, ...] = get_args(UnitScore)
UNIT_KINDS: tuple[str, ...] = get_args(UnitKind)
Ranking = Literal["local", "global"]
RANKINGS: tuple[str, ...] = get_args(Ranking)
BLOCKS = "blocks"
FLOAT_ERROR = 1e-9


def units(structure: Structure, kinds: tuple[str, ...]) -> Layout:
    """The layout of the units of these kinds. Raises ConfigError where the model has none."""
    sizes: dict[str, int] = {}
    for group in structure.groups:
        if group.kind in kinds:
            name = BLOCKS if group.kind == "block" else group.name
            sizes[name] = sizes[name] + group.size if name in sizes else group.size
    if not sizes:
        there = ", ".join(sorted({group.kind for group in structure.groups})) or "none at all"
        raise ConfigError(f"pruner.units is {list(kinds)}; this model has none of them, it has {there}: choose those")
    return Layout(tuple(sizes), tuple((size,) for size in sizes.values()))


def alive(structure: Structure, kinds: tuple[str, ...], mask: Mask | None) -> Mask:
    """Of which units a mask leaves anything, over `units`. To cut the others whole changes no mask."""
    layout = units(structure, kinds)
    if mask is None:
        return Mask.full(layout)
    left = torch.zeros(layout.size, dtype=torch.bool)
    for group, place in _places(structure, layout):
        for member in _params(group, mask.layout):
            left[place] |= _own(mask, member).any(1)
    return Mask(layout, left)


def kept_units(structure: Structure, chosen: Mask) -> Kept:
    """By group, which units stay, from a mask over `units`; groups of other kinds are not named."""
    return {group.name: chosen.flat[place] for group, place in _places(structure, chosen.layout)}


def check_units(structure: Structure, kinds: tuple[str, ...], score: UnitScore) -> None:
    """Raise ConfigError where a model has no units of these kinds, or some about which a score says nothing."""
    for group, _ in _places(structure, units(structure, kinds)):
        _scored(group, structure.layout, score)


def unit_scores(structure: Structure, params: Tree, score: UnitScore, *, among: Mask) -> Tree:
    """The score of each unit, over `units`; larger is kept.

    among: the units that are left; fpgm measures distances to them alone. Residual blocks are scored by means over
    their parameters in the place of sums, so that blocks of different size compare.
    Raises ConfigError for a group about which a score says nothing.
    """
    scores = torch.zeros(among.layout.size, dtype=torch.float64)
    for group, place in _places(structure, among.layout):
        scores[place] = _score(group, params, score, among.flat[place])
    return Tree(among.layout, scores.float())


def unit_counts(layout: Layout, sparsity: float) -> dict[str, int]:
    """How many units of each name stay: ceil((1 - sparsity) * size), so at least 1 for a sparsity below 1."""
    sizes = zip(layout.names, layout.sizes, strict=True)
    return {name: math.ceil((1.0 - sparsity) * size - FLOAT_ERROR) for name, size in sizes}


def choose_units(
    structure: Structure,
    params: Tree,
    sparsity: float,
    *,
    within: Mask,
    score: UnitScore,
    ranking: Ranking,
    most: float,
) -> Mask:
    """Keep the units with the highest score, over `units`; ties to the earlier unit.

    sparsity: fraction of the units removed, in [0, 1). within: only these may be kept.
    ranking: "local" keeps `unit_counts` of each name. "global" ranks all together, each score divided by the mean of
             its name over `within`, and keeps ceil((1 - sparsity) * number of units), or as many as `most` asks for.
    most:    under a global ranking, the largest fraction removed of one name; a group keeps a unit in any case.
    A name of which fewer are left in `within` than that keeps those.
    """
    layout, left = within.layout, within.counts()
    scores = unit_scores(structure, params, score, among=within)

    def at_most(counts: dict[str, int]) -> dict[str, int]:
        return {name: min(count, left[name]) for name, count in counts.items()}

    if ranking == "local":
        return keep_top(scores, at_most(unit_counts(layout, sparsity)), names=layout.names, within=within)
    flat = scores.flat.clone()
    for name, span in layout.spans.items():
        mean = float(scores[name][within[name]].double().mean()) if left[name] else 0.0
        flat[span] = scores[name] / mean if mean > 0.0 else 0.0
    scores = Tree(layout, flat)
    least = {name: max(count, int(name != BLOCKS)) for name, count in unit_counts(layout, most).items()}
    sure = keep_top(scores, at_most(least), names=layout.names, within=within)
    total = min(math.ceil((1.0 - sparsity) * layout.size - FLOAT_ERROR), sum(left.values()))
    more = max(total - sum(sure.counts().values()), 0)
    return sure | keep_top_global(scores, more, names=layout.names, within=within & ~sure)


def cut_most(
    structure: Structure, params: Tree, fits: Callable[[Mask], bool], *, within: Mask, score: UnitScore
) -> Mask:
    """The mask over parameters of the largest sparsity of units that `fits`, under a local ranking; that of `within`
    where none does.

    fits: of a mask over parameters; must hold of every mask that contains one of which it holds.
    """
    levels = sorted({gone / size for size in within.layout.sizes for gone in range(size)})

    def mask(sparsity: float) -> Mask:
        chosen = choose_units(structure, params, sparsity, within=within, score=score, ranking="local", most=1.0)
        return structure.mask(kept_units(structure, chosen))

    # Masks are nested, for one ranking chooses all of them.
    fitting = bisect_left(levels, True, key=lambda sparsity: not fits(mask(sparsity)))
    return mask(levels[max(fitting - 1, 0)])


def _places(structure: Structure, layout: Layout) -> Iterator[tuple[Group, slice]]:
    """The groups whose units a layout has, each with the positions of its units."""
    blocks = layout.spans[BLOCKS].start if BLOCKS in layout.spans else 0
    for group in structure.groups:
        if group.kind == "block" and BLOCKS in layout.spans:
            yield group, slice(blocks, blocks + group.size)
            blocks += group.size
        elif group.kind != "block" and group.name in layout.spans:
            yield group, layout.spans[group.name]


def _score(group: Group, params: Tree, score: UnitScore, among: Tensor) -> Tensor:
    """float64 (size,)."""
    own = [_own(params, member).double() for member in _scored(group, params.layout, score)]
    blocks = group.kind == "block"
    if score == "fpgm":
        rows = torch.cat(own, 1)
        return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")[:, among].sum(1)
    power = 2 if score in ("l2", "group") else 1
    total = torch.stack([rows.abs().pow(power).sum(1) for rows in own]).sum(0)
    if blocks or score == "norm_scale":
        total = total / sum(rows.shape[1] for rows in own)
    elif score == "group":
        total = total / len(own)
    return total.sqrt() if score == "l2" else total


def read_by(score: UnitScore, group: Group, layout: Layout) -> list[Member]:
    """What a score reads of a group; empty where it says nothing about it."""
    members = _params(group, layout)
    weights = [m for m in members if m.output and len(layout.shape(m.tensor)) > 1]
    scales = [m for m in members if m.output and len(layout.shape(m.tensor)) == 1 and not _is_bias(m)]
    if score == "norm_scale":
        weights = scales
    elif score == "group":
        weights = [m for m in members if m in weights or m in scales or not m.output]
    return [] if score == "fpgm" and group.kind == "block" else weights


def _scored(group: Group, layout: Layout, score: UnitScore) -> list[Member]:
    found = read_by(score, group, layout)
    if not found:
        raise ConfigError(
            f"pruner's score of units is {score}; it says nothing about {group.kind} group {group.name}: choose "
            "another score, or leave that kind out of pruner.units"
        )
    return found


def _params(group: Group, layout: Layout) -> list[Member]:
    """The members that are parameters, and no buffers."""
    return [member for member in group.members if member.tensor in layout.spans]


def _is_bias(member: Member) -> bool:
    return member.tensor.rpartition(".")[2] == "bias"


def _own(values: Tree | Mask, member: Member) -> Tensor:
    """(size, number of coordinates of each unit): what belongs to the units of one tensor."""
    lines = values[member.tensor].movedim(member.dim, 0)
    return lines[torch.from_numpy(member.positions)].flatten(1)
