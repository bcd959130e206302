"""The scales of normalisation layers, by which channels are told apart."""

from __future__ import annotations

import torch

from fedray.prune.structure import Structure
from fedray.tree import Tree


def scale_signs(structure: Structure, params: Tree, strength: float) -> Tree:
    """The gradient of strength * (sum of |scale|) over the scales of normalisation layers whose units can be cut whole,
    at `params`; zero at every other parameter (Liu et al. 2017, section 3, the penalty of network slimming)."""
    flat = torch.zeros_like(params.flat)
    for group in structure.groups:
        for member in group.members:
            vector = member.tensor in params.layout.spans and len(params.layout.shape(member.tensor)) == 1
            if vector and member.output and not member.tensor.endswith("bias"):
                span = params.layout.spans[member.tensor]
                flat[span] = strength * params.flat[span].sign()
    return Tree(params.layout, flat)
