"""What every partition needs: its protocol, checks of what it is given, and the arithmetic of whole samples."""

from __future__ import annotations

import hashlib
import math
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fedray.errors import ConfigError

if TYPE_CHECKING:  # keys import torch, and nothing here needs more of them than their methods
    from fedray.keys import Key

REDO_LIMIT = 50
"""Draws of a random partition before the smallest clients are topped up."""


class Partition(Protocol):
    """Deals the samples behind `labels` to clients.

    One whose class says `needs_owners = True` is called with `owners=` too: who made each sample, int64 (n,).
    """

    def __call__(self, labels: np.ndarray, *, num_clients: int, num_classes: int, key: Key) -> list[np.ndarray]:
        """Indices into `labels` for each client: int64, sorted, not empty. labels: integers, shape (n,)."""
        ...


class Sizes(Protocol):
    """Says how many samples each client gets. Such a partition can stand alone, then labels are IID, or in another."""

    def sizes(self, total: int, *, num_clients: int, key: Key) -> np.ndarray:
        """Whole numbers of at least 1 that sum to `total`: int64, shape (num_clients,). Raises ConfigError."""
        ...


def histogram(labels: np.ndarray, parts: list[np.ndarray], num_classes: int) -> np.ndarray:
    """Samples of each client by class: int64, shape (num_clients, num_classes)."""
    clients = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    cells = clients * num_classes + np.asarray(labels)[np.concatenate(parts)]
    return np.bincount(cells, minlength=len(parts) * num_classes).reshape(len(parts), num_classes)


def manifest(labels: np.ndarray, parts: list[np.ndarray], num_classes: int) -> dict[str, Any]:
    """What to keep with a result so that its partition can be told from others; plain JSON types.

    hash: hex blake2b of every client's indices. histogram: samples by client and class.
    """
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(len(part).to_bytes(8, "little") + np.ascontiguousarray(part, dtype="<i8").tobytes())
    return {
        "hash": state.hexdigest(),
        "num_clients": len(parts),
        "num_samples": sum(len(part) for part in parts),
        "histogram": histogram(labels, parts, num_classes).tolist(),
    }


def apportion(weights: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Whole numbers in proportion to `weights` that sum to `totals`, by largest remainder; ties to the lower index.

    weights: int64, shape (rows, columns), no row all zero. totals: int64, shape (rows,). Exact while a weight times
    a total stays below 2**63.
    """
    sums = weights.sum(axis=1, keepdims=True)
    shares, remainders = np.divmod(weights * totals[:, None], sums)
    rest = totals - shares.sum(axis=1)
    rank = np.argsort(np.argsort(-remainders, axis=1, kind="stable"), axis=1)
    whole: np.ndarray = shares + (rank < rest[:, None])
    return whole


def by_label(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """The sorted indices of each class, classes without samples included."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels, minlength=num_classes))[:-1])


def gather(owner: np.ndarray, num_clients: int) -> list[np.ndarray]:
    """The sorted indices that each client owns; -1 is nobody."""
    order = np.argsort(owner, kind="stable")
    order = order[np.searchsorted(owner[order], 0) :]
    return np.split(order, np.cumsum(np.bincount(owner[order], minlength=num_clients))[:-1])


def deal(members: list[np.ndarray], counts: np.ndarray, num_samples: int, random: np.random.Generator) -> np.ndarray:
    """The owner of each sample, int64, shape (num_samples,); -1 is nobody.

    members: indices of each class. counts: how many of them each client gets, drawn at random; (num_classes,
    num_clients), no row beyond the class.
    """
    owner = np.full(num_samples, -1, np.int64)
    for label, indices in enumerate(members):
        shuffled = random.permutation(indices)
        owner[shuffled[: counts[label].sum()]] = np.repeat(np.arange(counts.shape[1]), counts[label])
    return owner


def dirichlet_shares(log_gamma: np.ndarray, exponential: np.ndarray, alpha: float) -> np.ndarray:
    """Shares distributed as Dir(alpha, alpha, ...), float64, from draws of log Gamma(alpha + 1) and Exp(1).

    Gamma(alpha) = Gamma(alpha + 1) * U^(1/alpha), taken in logs: at small alpha the product underflows to zero.
    """
    shift = exponential - exponential.min()  # exponential is -log U
    with np.errstate(over="ignore"):  # an infinite shift is a share of zero
        logs = log_gamma - shift / alpha
    shares = np.exp(logs - logs.max())
    normal: np.ndarray = shares / shares.sum()
    return normal


def cut(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to `shares`, which sum to one: int64; the cumulative sums are rounded down."""
    ends = np.minimum(np.floor(np.cumsum(shares) * total).astype(np.int64), total)
    ends[-1] = total
    return np.diff(ends, prepend=0)


def levelled(sizes: np.ndarray, min_size: int) -> np.ndarray:
    """`sizes` with everyone below min_size raised to it at the cost of the largest; int64, the sum is kept.

    The largest are levelled: nobody gives below the size at which the givers' excess covers what is lacking. Needs a
    sum of at least min_size * len(sizes).
    """
    need = np.maximum(min_size - sizes, 0)
    if not need.any():
        return sizes
    low, high = min_size, int(sizes.max())  # the excess above `low` covers the need, that above `high` is zero
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if np.maximum(sizes - middle, 0).sum() >= need.sum() else (low, middle)
    give = np.maximum(sizes - low, 0)
    give[np.flatnonzero(give)[: give.sum() - need.sum()]] -= 1
    even: np.ndarray = sizes + need - give
    return even


def top_up(owner: np.ndarray, num_clients: int, min_size: int, random: np.random.Generator) -> None:
    """Move samples from the largest clients, in place, until each has min_size; there must be enough for that."""
    sizes = np.bincount(owner, minlength=num_clients)
    change = levelled(sizes, min_size) - sizes
    give, need = np.maximum(-change, 0), np.maximum(change, 0)
    shuffled = random.permutation(len(owner))
    grouped = shuffled[np.argsort(owner[shuffled], kind="stable")]
    rank = np.arange(len(owner)) - (np.cumsum(sizes) - sizes)[owner[grouped]]
    owner[grouped[rank < give[owner[grouped]]]] = np.repeat(np.arange(num_clients), need)


# -- checks ----------------------------------------------------------------------------------------------------------


def checked(labels: np.ndarray, num_clients: int, num_classes: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ConfigError(f"labels have type {labels.dtype} and shape {labels.shape}; give integers of shape (n,)")
    if not is_int(num_clients) or num_clients < 1:
        raise ConfigError(f"num_clients is {num_clients!r}; it must be a whole number of at least 1")
    if num_clients > len(labels):
        raise ConfigError(
            f"num_clients is {num_clients}; there are only {len(labels)} training samples and each client needs one, "
            "so lower it or take a larger data set"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ConfigError(
            f"labels lie from {labels.min()} to {labels.max()}; with num_classes {num_classes} they must lie from 0 "
            f"to {num_classes - 1}, so renumber them or raise num_classes"
        )
    return labels.astype(np.int64, copy=False)


def is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def refuse_below_one(field: str, value: Any) -> None:
    if not is_int(value) or value < 1:
        raise ConfigError(f"partition.{field} is {value!r}; it must be a whole number of at least 1")


def refuse_not_above_zero(field: str, value: Any, remedy: str) -> None:
    if not is_real(value) or not (math.isfinite(value) and value > 0):
        raise ConfigError(f"partition.{field} is {value!r}; it must be above 0 and finite, such as {remedy}")


def refuse_below_zero(field: str, value: Any, remedy: str) -> None:
    if not is_real(value) or not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"partition.{field} is {value!r}; it must be at least 0 and finite, such as {remedy}")


def refuse_no_sizes(field: str, value: Any) -> None:
    if not callable(getattr(value, "sizes", None)):
        raise ConfigError(
            f"partition.{field} is {value!r}; it must be a partition of sizes: Iid, Quantity, LogNormal or PowerLaw"
        )


def refuse_too_many(min_size: int, num_clients: int, total: int) -> None:
    if min_size * num_clients > total:
        raise ConfigError(
            f"partition.min_size is {min_size}; {num_clients} clients of that size need "
            f"{min_size * num_clients} samples and there are {total}, so lower it or num_clients"
        )
