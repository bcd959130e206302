"""How much each coordinate matters: larger is kept. Scores are trees over the whole layout."""

from __future__ import annotations

from fedray.tree import Tree


def magnitude(params: Tree) -> Tree:
    """The absolute value of each coordinate (Han et al. 2015, section 3)."""
    return Tree(params.layout, params.flat.detach().abs())
