"""How much each coordinate matters: larger is kept. Scores are trees over the whole layout."""

from __future__ import annotations

import numpy as np
import torch

from fedray.tree import Tree


def magnitude(params: Tree) -> Tree:
    """The absolute value of each coordinate (Han et al. 2015, section 3)."""
    return Tree(params.layout, params.flat.detach().abs())


def sensitivity(params: Tree, slope: Tree) -> Tree:
    """w * s: how fast a quantity with slope s changes with a factor c on the coordinate, at c = 1.

    With the gradient for the slope it is dL/dc, whose absolute value is SNIP's score (Lee et al. 2019, equations 3
    to 5). With the Hessian times the gradient it is half of what |gradient|^2 gains by the coordinate, to first order:
    GraSP's score with the sign turned, so that larger is kept (Wang et al. 2020, equation 8).
    """
    return Tree(params.layout, params.flat * slope.flat)


def lamp(params: Tree, *, names: tuple[str, ...]) -> Tree:
    """w^2 over the sum of the squares that are not smaller, in each named tensor; float64, 0 elsewhere.

    Lee et al. 2021, "Layer-adaptive sparsity for the magnitude-based pruning", equation 4. Of equal magnitudes the one
    at the lower flat index counts as the larger, so exactly one coordinate of a tensor scores 1.
    """
    score = np.zeros(params.layout.size)
    for name in names:
        span = params.layout.spans[name]
        squares = np.square(params.flat[span].detach().cpu().numpy().astype(np.float64))
        falling = np.argsort(-squares, kind="stable")
        ranked = squares[falling]
        # A sum of zeros belongs to zeros alone, which score 0 however it is divided.
        sums = np.maximum(np.cumsum(ranked), np.finfo(np.float64).tiny)
        score[span][falling] = ranked / sums
    return Tree(params.layout, torch.from_numpy(score))
