"""Narrow versions of a model: which units a client of a given capacity holds, and which client has which capacity.

A rate is a fraction of each group's units, in (0, 1]. Residual blocks are no width: they stay whole.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.prune.structure import Kept, Structure
from fedray.tree import Mask, Tree

# 0.14 * 50 is 7.000000000000001, and its ceiling is to be 7.
FLOAT_ERROR = 1e-9


def width(rate: float, size: int) -> int:
    """How many of `size` units are held at a rate: the ceiling of their product, at least 1."""
    return max(1, math.ceil(rate * size - FLOAT_ERROR))


def window(structure: Structure, rate: float, first: int = 0) -> Kept:
    """The units that are held: of a group of C units, ceil(rate * C) in a row, from unit `first` modulo C on.

    Past the last unit comes the first. `first` 0 gives the prefixes, which are nested: a smaller rate holds a subset.
    """
    kept = {}
    for group in structure.groups:
        if group.kind != "block":
            held = (torch.arange(width(rate, group.size)) + first) % group.size
            kept[group.name] = torch.zeros(group.size, dtype=torch.bool).index_fill(0, held, True)
    return kept


def counts_of(num_clients: int, shares: tuple[float, ...]) -> list[int]:
    """How many clients have each rate: num_clients * share / sum of shares, rounded down, and what is left over goes to
    the largest remainders, the earlier rate first on a tie."""
    parts = [num_clients * share / sum(shares) for share in shares]
    counts = [math.floor(part + FLOAT_ERROR) for part in parts]
    by_remainder = sorted(range(len(shares)), key=lambda at: counts[at] - parts[at])
    for at in by_remainder[: num_clients - sum(counts)]:
        counts[at] += 1
    return counts


def assigned(key: Key, num_clients: int, shares: tuple[float, ...]) -> tuple[int, ...]:
    """By client, the index of its rate: a random deal of exact counts, see `counts_of`.

    shares: of each rate among clients, relative to their sum.
    """
    counts = counts_of(num_clients, shares)
    cards = [at for at, count in enumerate(counts) for _ in range(count)]
    order = key.permutation(num_clients).tolist()
    return tuple(cards[place] for place in order)


def warnings_of(
    rates: tuple[float, ...], shares: tuple[float, ...], num_clients: int, *, rolls: bool = False
) -> tuple[str, ...]:
    """What may surprise in a deal: parts of the model that nobody trains, rates that nobody gets.

    rolls: whether windows move, so that every part has its turn.
    """
    found = []
    counts = counts_of(num_clients, shares)
    widest = next(rate for rate, count in zip(rates, counts, strict=True) if count)
    if widest < 1.0 and not rolls:
        found.append(
            f"of {num_clients} clients none has rate 1: units past the widest ({widest:g}) are trained by nobody, and "
            "test/accuracy is of the whole model with these as they started; give rate 1 a share and enough clients, "
            "or take a narrower model, of which that width is the whole (docs/pruners.md)"
        )
    missing = [
        f"{rate:g}" for rate, share, count in zip(rates, shares, counts, strict=True) if share > 0.0 and not count
    ]
    if missing:
        found.append(
            f"{num_clients} clients are too few for these shares, and nobody has rate {' and '.join(missing)}: raise "
            "num_clients, or set these shares to 0"
        )
    return tuple(found)


def held_buffers(structure: Structure, kept: Kept, trained: Tree, received: Tree) -> Tree:
    """`trained` buffers, but with those of units that are not held as they were received."""
    flat = trained.flat.clone()
    result = Tree(trained.layout, flat)
    for group in structure.groups:
        for member in group.members:
            if group.name in kept and member.tensor in trained.layout.spans:
                gone = torch.from_numpy(member.positions)[~kept[group.name]].flatten()
                lines = received[member.tensor].index_select(member.dim, gone)
                result[member.tensor].index_copy_(member.dim, gone, lines)
    return result


def owned_outputs(structure: Structure, owned: Tensor) -> Mask:
    """The mask that cuts the rows of the last layer with a weight matrix (and of its bias) of classes not owned.

    owned: bool (num_classes,). Raises ConfigError where that layer has not one row for each class.
    """
    layout = structure.layout
    last = [name for name in layout.names if len(layout.shape(name)) > 1][-1]
    if layout.shape(last)[0] != len(owned):
        raise ConfigError(
            f"pruner.own_labels is True; the last layer, {last}, has {layout.shape(last)[0]} outputs for "
            f"{len(owned)} classes, so they are no outputs of classes: set it to false"
        )
    of_layer = [name for name in layout.names if name.rpartition(".")[0] == last.rpartition(".")[0]]
    rows = {name: owned.view(-1, *[1] * (len(layout.shape(name)) - 1)) for name in of_layer}
    return Mask.of(layout, {name: kept.expand(layout.shape(name)) for name, kept in rows.items()})
