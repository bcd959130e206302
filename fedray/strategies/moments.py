"""What a server remembers of each coordinate, as masks change."""

from __future__ import annotations

import torch

from fedray.round import Server
from fedray.tree import Mask, Tree, restrict


def alive(server: Server, support: Mask) -> Mask | None:
    """The coordinates that may move in this round: the server's, and those that a client vouches for beside them.
    None where the server has no mask."""
    if server.mask is None or server.mask.digest == support.digest:
        return server.mask
    return server.mask | support


def realign(moment: Tree, before: Mask | None, now: Mask | None, *, fill: float | None = None) -> Tree:
    """A moment that was kept under the mask `before`, under the mask `now`; itself where they are the same.

    A coordinate that left is forgotten. One that entered starts at zero or, with `fill`, at the mean of its
    tensor's coordinates that were there before and still are, and at `fill` where there is none. (A second moment
    of zero would make its first step as long as that of a new run, among coordinates that have long settled.)
    """
    if before is now or (before is not None and now is not None and before.digest == now.digest):
        return moment
    kept = restrict(moment, now)
    if fill is None or before is None:
        return kept
    flat = kept.flat.clone()
    for span in moment.layout.spans.values():
        was = before.flat[span]
        entered = ~was if now is None else now.flat[span] & ~was
        stayed = was if now is None else now.flat[span] & was
        if entered.any():
            mean = float(flat[span][stayed].double().mean()) if stayed.any() else fill
            flat[span] = torch.where(entered, flat.new_tensor(mean), flat[span])
    return Tree(moment.layout, flat)


def where(support: Mask, new: Tree, old: Tree) -> Tree:
    """`new` on the support, `old` where nobody vouched."""
    return Tree(new.layout, torch.where(support.flat, new.flat, old.flat))
