"""Units of a model that can be cut whole: filters, neurons, heads and residual blocks, with all that belongs to them.

A group is a set of units of which each may stay or go; its members are the slices of tensors that go with a unit. How
the groups of a model are found is `models.structure`; here is what masks have to do with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedray.errors import ConfigError
from fedray.tree import Layout, Mask, Tree

NO_BUFFERS = Layout((), ())

UnitKind = Literal["filter", "neuron", "head", "block"]
Kept = Mapping[str, Tensor]
"""By group, bool (size,): which of its units stay."""


@dataclass(frozen=True, eq=False)
class Slices:
    """What a physically smaller model has of each tensor.

    kept: by the name of a parameter or buffer, for each dimension the positions that stay, ascending, int64; None
          where all of them do. A tensor that is not named is whole.
    gone: names of tensors that the smaller model does not have, for their block is skipped.
    skipped: names of those blocks.
    """

    kept: Mapping[str, tuple[np.ndarray | None, ...]]
    gone: frozenset[str] = frozenset()
    skipped: frozenset[str] = frozenset()
    _found: dict[Layout, tuple[Layout, Tensor]] = field(default_factory=dict, repr=False)

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """What stays of one tensor; a copy where something goes."""
        for dim, lines in enumerate(self.kept.get(name, ())):
            if lines is not None:
                tensor = tensor.index_select(dim, torch.from_numpy(lines).to(tensor.device))
        return tensor

    def layout(self, whole: Layout) -> Layout:
        """The layout of the smaller model's tensors that lie in `whole`."""
        return self._places(whole)[0]

    def positions(self, whole: Layout) -> Tensor:
        """Where the smaller model's coordinates lie in a flat tensor under `whole`, ascending, int64."""
        return self._places(whole)[1]

    def take(self, tree: Tree) -> Tree:
        """The coordinates that stay."""
        layout, positions = self._places(tree.layout)
        return Tree(layout, tree.flat[positions])

    def take_mask(self, mask: Mask) -> Mask:
        """The mask of the coordinates that stay."""
        layout, positions = self._places(mask.layout)
        return Mask(layout, mask.flat[positions])

    def put(self, base: Tree, small: Tree) -> Tree:
        """`base` with the coordinates of `small`, which came of `take`, in the place of its own."""
        return Tree(base.layout, base.flat.index_copy(0, self.positions(base.layout), small.flat))

    def _places(self, whole: Layout) -> tuple[Layout, Tensor]:
        if whole not in self._found:
            tensors, pieces = {}, [torch.empty(0, dtype=torch.int64)]
            for name, span in whole.spans.items():
                if name not in self.gone:
                    block = torch.arange(span.start, span.stop).view(whole.shape(name))
                    tensors[name] = self.cut(name, block)
                    pieces.append(tensors[name].reshape(-1))
            self._found[whole] = Layout.of(tensors), torch.cat(pieces)
        return self._found[whole]


@dataclass(frozen=True, eq=False)
class Member:
    """The slices of one tensor that belong to a group's units.

    tensor: name of a parameter or of a buffer. dim: the dimension that is cut.
    positions: int64 (size, width): the positions along `dim` of each unit; a unit of a convolution before a linear
               layer owns a run of them, a head as many as it is wide.
    output: whether these are what computes the unit (rows of its layer, its bias and norm), and not what reads it.
    """

    tensor: str
    dim: int
    positions: np.ndarray
    output: bool


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are coupled: each stays or goes in all members. name: of the first layer that computes them.

    least: how many must stay: 1, or 0 where the model does without (a residual block that is skipped).
    """

    name: str
    kind: UnitKind
    size: int
    members: tuple[Member, ...]
    least: int = 1


@dataclass(frozen=True, eq=False)
class Structure:
    """All groups of a model over the layout of its parameters.

    left_out: of layers whose units cannot be cut whole, a sentence each that says why. buffers: their layout.
    """

    layout: Layout
    groups: tuple[Group, ...]
    left_out: tuple[str, ...] = ()
    buffers: Layout = NO_BUFFERS

    @cached_property
    def by_name(self) -> Mapping[str, Group]:
        return {group.name: group for group in self.groups}

    @cached_property
    def axes(self) -> Mapping[tuple[str, int], tuple[tuple[Group, Member], ...]]:
        """Who cuts which dimension of which tensor; a dimension of concatenated inputs is cut by several groups."""
        found: dict[tuple[str, int], list[tuple[Group, Member]]] = {}
        for group in self.groups:
            for member in group.members:
                found.setdefault((member.tensor, member.dim), []).append((group, member))
        return {axis: tuple(pairs) for axis, pairs in found.items()}

    def over(self, layout: Layout) -> Structure:
        """The structure over other parameters of the same model, such as those that the server owns.

        Groups of which no parameter there computes a unit are left out; of the others masks cut what is there.
        """
        if layout == self.layout:
            return self
        owned = [any(m.output and m.tensor in layout.spans for m in group.members) for group in self.groups]
        sentences = tuple(
            f"{group.name}: what computes its units stays with clients"
            for group, there in zip(self.groups, owned, strict=True)
            if not there
        )
        groups = tuple(group for group, there in zip(self.groups, owned, strict=True) if there)
        return replace(self, layout=layout, groups=groups, left_out=self.left_out + sentences)

    def without(self, tensors: Mapping[str, str]) -> Structure:
        """The structure without groups of which one of these tensors computes a unit. tensors: why, by name.

        Raises ConfigError where nothing is left.
        """
        bars = {
            group.name: next((tensors[m.tensor] for m in group.members if m.output and m.tensor in tensors), None)
            for group in self.groups
        }
        sentences = tuple(f"{name}: {why}" for name, why in bars.items() if why is not None)
        if not sentences:
            return self
        groups = tuple(group for group in self.groups if bars[group.name] is None)
        if not groups:
            raise ConfigError(
                f"no units are left that can be cut whole ({'; '.join(sentences)}); take a larger scope, or a pruner "
                "of single weights, such as pruner=magnitude"
            )
        return replace(self, groups=groups, left_out=self.left_out + sentences)

    def slices(self, mask: Mask | None) -> Slices | None:
        """What is left of each tensor without the units that `mask` cuts whole: with all parameters that belong to
        them, those that read them included. None where there is no such unit.

        Of a group that would lose more than it may, the first unit stays, under the mask.
        """
        if mask is None:
            return None
        kept: dict[str, Tensor] = {}
        gone: set[str] = set()
        skipped: set[str] = set()
        for group in self.groups:
            left = torch.zeros(group.size, dtype=torch.bool)
            for member in group.members:
                if member.tensor in self.layout.spans:
                    left |= _alive(mask, member)
            if group.kind == "block":
                if not left.any():
                    skipped.add(group.name)
                    gone.update(member.tensor for member in group.members)
            elif not left.all():
                if int(left.sum()) < group.least:
                    left[: group.least] = True
                kept[group.name] = left
        axes: dict[str, list[np.ndarray | None]] = {}
        for tensor, dim in self.axes:
            whole = self.layout if tensor in self.layout.spans else self.buffers
            shape = whole.shape(tensor)
            lines = None if tensor in gone else self._lines(tensor, dim, shape[dim], kept)
            if lines is not None and not lines.all():
                axes.setdefault(tensor, [None] * len(shape))[dim] = np.flatnonzero(lines.numpy())
        if not axes and not gone:
            return None
        return Slices({name: tuple(dims) for name, dims in axes.items()}, frozenset(gone), frozenset(skipped))

    def mask(self, kept: Kept) -> Mask:
        """The mask that cuts what belongs to units that go; a group that `kept` does not name stays whole."""
        flat = torch.ones(self.layout.size, dtype=torch.bool)
        for name, span in self.layout.spans.items():
            shape = self.layout.shape(name)
            block = flat[span].view(shape)
            for dim in range(len(shape)):
                lines = self._lines(name, dim, shape[dim], kept)
                if lines is not None:
                    block &= lines.view([-1 if at == dim else 1 for at in range(len(shape))])
        return Mask(self.layout, flat)

    def kept(self, mask: Mask | None) -> dict[str, Tensor]:
        """Which units a mask leaves: those of which any coordinate that computes them stays."""
        found = {}
        for group in self.groups:
            left = torch.zeros(group.size, dtype=torch.bool)
            for member in group.members:
                if member.output and member.tensor in self.layout.spans:
                    if mask is None:
                        left[:] = True
                        continue
                    left |= _alive(mask, member)
            found[group.name] = left
        return found

    def unit_scores(self, score: Tree, group: Group, reduce: Literal["sum", "mean"] = "sum") -> Tensor:
        """float64 (size,): a score of coordinates, summed or averaged over what computes each unit."""
        total, count = torch.zeros(group.size, dtype=torch.float64), 0
        for member in group.members:
            if member.output and member.tensor in self.layout.spans:
                block = score[member.tensor].double().movedim(member.dim, 0)
                own = block.reshape(len(block), -1)[torch.from_numpy(member.positions)].flatten(1)
                total += own.sum(1)
                count += own.shape[1]
        if not count:
            raise ConfigError(f"group {group.name} has no parameters of its own, so it cannot be scored")
        return total / count if reduce == "mean" else total

    def _lines(self, tensor: str, dim: int, size: int, kept: Kept) -> Tensor | None:
        """bool (size,): which positions along `dim` stay; None where no group cuts it."""
        lines: Tensor | None = None
        for group, member in self.axes.get((tensor, dim), ()):
            if group.name not in kept:
                continue
            if lines is None:
                lines = torch.ones(size, dtype=torch.bool)
            gone = torch.from_numpy(member.positions)[~kept[group.name]]
            lines[gone.flatten()] = False
        return lines


def _alive(mask: Mask, member: Member) -> Tensor:
    """bool (size,): of which units a mask leaves any coordinate in this tensor."""
    block = mask[member.tensor].movedim(member.dim, 0)
    lines = block.reshape(len(block), -1).any(1)
    return lines[torch.from_numpy(member.positions)].any(1)
