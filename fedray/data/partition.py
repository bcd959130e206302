"""Who gets which training samples.

A partition is a value that is called with the labels and a key. Laws: parts are disjoint; every client has at
least one sample; the same key gives the same parts; a call always ends. `Iid`, `Dirichlet` and `Shards` deal out
every sample; `Classes` does so if `samples` is None and there are slots for every class.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fedray.errors import ConfigError

if TYPE_CHECKING:  # keys import torch, and nothing here needs more of them than their methods
    from fedray.keys import Key

_REDO_LIMIT = 50  # draws of a Dirichlet partition before the smallest clients are topped up


class Partition(Protocol):
    """Deals the samples behind `labels` to clients."""

    def __call__(self, labels: np.ndarray, *, num_clients: int, num_classes: int, key: Key) -> list[np.ndarray]:
        """Indices into `labels` for each client: int64, sorted, not empty. labels: integers, shape (n,)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Iid:
    """Shuffled and cut into parts whose sizes differ by one at most (McMahan et al. 2017, section 3)."""

    def __call__(self, labels: np.ndarray, *, num_clients: int, num_classes: int, key: Key) -> list[np.ndarray]:
        labels = _checked(labels, num_clients, num_classes)
        order = key.fold("iid").numpy().permutation(len(labels))
        return [np.sort(part) for part in np.array_split(order, num_clients)]


@dataclass(frozen=True, kw_only=True)
class Dirichlet:
    """Label skew: each class is cut in proportions drawn from Dir(alpha), one per client, and clients that have
    n / num_clients samples already get no more (NIID-Bench, Li et al. 2022: `noniid-labeldir` of its utils.py).

    alpha:    above 0; the smaller, the fewer classes at a client.
    min_size: fewest samples of a client. NIID-Bench draws anew until it holds (with 10), which need not end. Here
              the number of draws is limited; then the draw that lacks least is mended by moving samples from the
              largest clients to those below min_size.
    """

    alpha: float
    min_size: int = 1

    def __post_init__(self) -> None:
        if not _is_real(self.alpha) or not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(
                f"partition.alpha is {self.alpha!r}; it must be above 0 and finite, such as 0.1 for strong skew "
                "or 100 for almost none"
            )
        _refuse_below_one("min_size", self.min_size)

    def __call__(self, labels: np.ndarray, *, num_clients: int, num_classes: int, key: Key) -> list[np.ndarray]:
        labels = _checked(labels, num_clients, num_classes)
        if self.min_size * num_clients > len(labels):
            raise ConfigError(
                f"partition.min_size is {self.min_size}; {num_clients} clients of that size need "
                f"{self.min_size * num_clients} samples and there are {len(labels)}, so lower it or num_clients"
            )
        key = key.fold("dirichlet")
        class_sizes = np.bincount(labels, minlength=num_classes)
        lacking = None
        for attempt in range(_REDO_LIMIT):
            drawn = self._draw(class_sizes, num_clients, key.fold("draw", attempt).numpy())
            lack = int(np.maximum(self.min_size - drawn.sum(axis=0), 0).sum())
            if lacking is None or lack < lacking:
                counts, lacking = drawn, lack
            if lacking == 0:
                break
        deal = key.fold("deal").numpy()
        owner = np.empty(len(labels), np.int64)
        for label, members in enumerate(by_label(labels, num_classes)):
            owner[deal.permutation(members)] = np.repeat(np.arange(num_clients), counts[label])
        if lacking:
            _top_up(owner, num_clients, self.min_size, key.fold("top_up").numpy())
        return _gather(owner, num_clients)

    def _draw(self, class_sizes: np.ndarray, num_clients: int, random: np.random.Generator) -> np.ndarray:
        """How many samples of each class go to each client: int64, shape (num_classes, num_clients)."""
        counts = np.zeros((len(class_sizes), num_clients), np.int64)
        sizes = np.zeros(num_clients, np.int64)
        for label, class_size in enumerate(class_sizes):
            # Gamma(alpha) = Gamma(alpha + 1) * U^(1/alpha), in logs: at small alpha the product underflows to zero.
            log_gamma = np.log(random.standard_gamma(self.alpha + 1.0, num_clients))
            exponential = random.standard_exponential(num_clients)  # -log U
            # Some client is below the average as long as any sample is left, so `open_clients` is not empty.
            open_clients = np.flatnonzero(sizes * num_clients < class_sizes.sum())
            if class_size == 0:
                continue
            shift = exponential[open_clients] - exponential[open_clients].min()
            with np.errstate(over="ignore"):  # an infinite shift is a share of zero
                logs = log_gamma[open_clients] - shift / self.alpha
            shares = np.exp(logs - logs.max())
            ends = np.floor(np.cumsum(shares / shares.sum()) * class_size).astype(np.int64)
            ends = np.minimum(ends, class_size)
            ends[-1] = class_size
            counts[label, open_clients] = np.diff(ends, prepend=0)
            sizes += counts[label]
        return counts


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Sorted by label, cut into equal shards, dealt at random (McMahan et al. 2017, section 3: 200 shards of 300
    MNIST digits, two per client). Where the number of samples does not divide, shard sizes differ by one.

    per_client: shards of a client; about the number of its classes.
    """

    per_client: int = 2

    def __post_init__(self) -> None:
        _refuse_below_one("per_client", self.per_client)

    def __call__(self, labels: np.ndarray, *, num_clients: int, num_classes: int, key: Key) -> list[np.ndarray]:
        labels = _checked(labels, num_clients, num_classes)
        num_shards = num_clients * self.per_client
        if num_shards > len(labels):
            raise ConfigError(
                f"partition.per_client is {self.per_client}; {num_clients} clients need {num_shards} shards and there "
                f"are {len(labels)} samples, so lower it or num_clients"
            )
        shards = np.array_split(np.argsort(labels, kind="stable"), num_shards)
        hands = key.fold("shards").numpy().permutation(num_shards).reshape(num_clients, self.per_client)
        return [np.sort(np.concatenate([shards[shard] for shard in hand])) for hand in hands]


@dataclass(frozen=True, kw_only=True)
class Classes:
    """So many classes per client: the n-way k-shot of LotteryFL (Li et al. 2021) and FedDST, and with
    `samples` None the fixed number of labels of NIID-Bench (its `noniid-#label`).

    Classes are dealt from shuffled decks, so numbers of owners differ by one at most and no class is without owner
    if num_clients * classes slots suffice for all (NIID-Bench may leave some out). Only classes that occur count.

    classes: classes of a client.
    samples: samples of each of them; None for an equal cut of each class among its owners.
    """

    classes: int = 2
    samples: int | None = None

    def __post_init__(self) -> None:
        _refuse_below_one("classes", self.classes)
        if self.samples is not None:
            _refuse_below_one("samples", self.samples)

    def __call__(self, labels: np.ndarray, *, num_clients: int, num_classes: int, key: Key) -> list[np.ndarray]:
        labels = _checked(labels, num_clients, num_classes)
        members = by_label(labels, num_classes)
        present = np.array([label for label in range(num_classes) if len(members[label])])
        if self.classes > len(present):
            raise ConfigError(
                f"partition.classes is {self.classes}; the training labels have only {len(present)} classes, so "
                "lower it"
            )
        key = key.fold("classes")
        hands = present[self._deal(len(present), num_clients, key.fold("deal").numpy())]
        random = key.fold("split").numpy()
        owner = np.full(len(labels), -1, np.int64)
        for label in present:
            owners = np.flatnonzero((hands == label).any(axis=1))
            wanted = len(owners) * (self.samples or 1)
            if wanted > len(members[label]):
                what = "samples" if self.samples else "classes"
                raise ConfigError(
                    f"partition.{what} is {getattr(self, what)!r}; the {len(owners)} owners of class {label} need "
                    f"{wanted} samples and it has {len(members[label])}, so lower partition.{what} or num_clients"
                )
            shuffled = random.permutation(members[label])
            if self.samples:
                owner[shuffled[:wanted]] = np.repeat(owners, self.samples)
            else:
                for client, share in zip(owners, np.array_split(shuffled, max(len(owners), 1)), strict=False):
                    owner[share] = client
        return _gather(owner, num_clients)

    def _deal(self, num_present: int, num_clients: int, random: np.random.Generator) -> np.ndarray:
        """Distinct classes for each client: int64, shape (num_clients, classes)."""
        hands = np.empty((num_clients, self.classes), np.int64)
        deck = random.permutation(num_present)
        for client in range(num_clients):
            hand, deck = deck[: self.classes], deck[self.classes :]
            if len(hand) < self.classes:
                fresh = random.permutation(num_present)
                held = np.isin(fresh, hand)  # the new deck gives what the hand lacks before what it holds
                fresh = np.concatenate([fresh[~held], fresh[held]])
                missing = self.classes - len(hand)
                hand, deck = np.concatenate([hand, fresh[:missing]]), fresh[missing:]
            hands[client] = hand
        return hands


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


def _checked(labels: np.ndarray, num_clients: int, num_classes: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ConfigError(f"labels have type {labels.dtype} and shape {labels.shape}; give integers of shape (n,)")
    if not _is_int(num_clients) or num_clients < 1:
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


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _refuse_below_one(field: str, value: Any) -> None:
    if not _is_int(value) or value < 1:
        raise ConfigError(f"partition.{field} is {value!r}; it must be a whole number of at least 1")


def by_label(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """The sorted indices of each class, classes without samples included."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels, minlength=num_classes))[:-1])


def _gather(owner: np.ndarray, num_clients: int) -> list[np.ndarray]:
    """The sorted indices that each client owns; -1 is nobody."""
    order = np.argsort(owner, kind="stable")
    order = order[np.searchsorted(owner[order], 0) :]
    return np.split(order, np.cumsum(np.bincount(owner[order], minlength=num_clients))[:-1])


def _top_up(owner: np.ndarray, num_clients: int, min_size: int, random: np.random.Generator) -> None:
    """Move samples from the largest clients, in place, until each has min_size; needs min_size * num_clients of them.

    The largest are levelled: nobody gives below the size at which the givers' excess covers what is lacking.
    """
    sizes = np.bincount(owner, minlength=num_clients)
    need = np.maximum(min_size - sizes, 0)
    low, high = min_size, int(sizes.max())  # the excess above `low` covers the need, that above `high` is zero
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if np.maximum(sizes - middle, 0).sum() >= need.sum() else (low, middle)
    give = np.maximum(sizes - low, 0)
    give[np.flatnonzero(give)[: give.sum() - need.sum()]] -= 1
    shuffled = random.permutation(len(owner))
    grouped = shuffled[np.argsort(owner[shuffled], kind="stable")]
    rank = np.arange(len(owner)) - (np.cumsum(sizes) - sizes)[owner[grouped]]
    owner[grouped[rank < give[owner[grouped]]]] = np.repeat(np.arange(num_clients), need)
