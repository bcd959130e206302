"""One mask from the masks of many clients, of which the server knows how many hold each coordinate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from fedray.prune.regrow import drop, grow
from fedray.tree import Layout, Mask, Tree

Merge = Literal["or", "and", "vote"]
MERGES: tuple[str, ...] = get_args(Merge)


def merge(
    layout: Layout, holders: Tensor, num_clients: int, rule: Merge, votes: int, *, names: tuple[str, ...]
) -> Mask:
    """The coordinates that enough clients hold; tensors outside `names` are kept whole.

    holders: how many clients hold each coordinate, int32 (layout.size,). num_clients: how many there are, at least 1.
    rule:    "or" keeps what one holds, "and" what all hold, "vote" what `votes` hold, or all where they are fewer.
    """
    enough = holders >= {"or": 1, "and": num_clients, "vote": min(votes, num_clients)}[rule]
    return Mask.of(layout, {name: enough[layout.spans[name]] for name in names})


def to_count(params: Tree, merged: Mask, held: Mask, counts: Mapping[str, int], *, names: tuple[str, ...]) -> Mask:
    """A merged mask brought to `counts[name]` coordinates in each named tensor.

    Where it has more, the largest magnitudes stay. Where it has fewer, the largest magnitudes among the others are
    added: those that somebody holds first. Ties go to the lower flat index. Raises ConfigError for an impossible count.
    """
    kept = merged.counts(names)
    cut = drop(params, merged, {name: min(counts[name], kept[name]) for name in names}, names=names)
    return grow(params, cut, counts, names=names, avoid=~held)


def hamming(a: Mask, b: Mask, *, names: tuple[str, ...]) -> float:
    """The fraction of a tensor's coordinates in which two masks differ, as a mean over the named tensors."""
    shares = [float((a[name] != b[name]).float().mean(dtype=torch.float64)) for name in names]
    return sum(shares) / len(shares) if shares else 0.0
