"""Units of a model that can be cut whole: filters, neurons, heads and residual blocks, with all that belongs to them.

A group is a set of units of which each may stay or go; its members are the slices of tensors that go with a unit. How
the groups of a model are found is `models.structure`; here is what masks have to do with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedray.errors import ConfigError
from fedray.tree import Layout, Mask, Tree

UnitKind = Literal["filter", "neuron", "head", "block"]
Kept = Mapping[str, Tensor]
"""By group, bool (size,): which of its units stay."""


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
    """All groups of a model over the layout of its parameters."""

    layout: Layout
    groups: tuple[Group, ...]

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
                    block = mask[member.tensor].movedim(member.dim, 0).flatten(1).any(1)
                    left |= block[torch.from_numpy(member.positions)].any(1)
            found[group.name] = left
        return found

    def unit_scores(self, score: Tree, group: Group, reduce: Literal["sum", "mean"] = "sum") -> Tensor:
        """float64 (size,): a score of coordinates, summed or averaged over what computes each unit."""
        total, count = torch.zeros(group.size, dtype=torch.float64), 0
        for member in group.members:
            if member.output and member.tensor in self.layout.spans:
                lines = score[member.tensor].double().movedim(member.dim, 0).flatten(1)
                own = lines[torch.from_numpy(member.positions)].flatten(1)
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
