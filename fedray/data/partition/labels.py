"""Partitions by label: Dirichlet proportions, shards, so many classes per client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedray.data.partition.base import (
    REDO_LIMIT,
    Sizes,
    by_label,
    checked,
    cut,
    deal,
    dirichlet_shares,
    gather,
    refuse_below_one,
    refuse_no_sizes,
    refuse_not_above_zero,
    refuse_too_many,
    top_up,
)
from fedray.data.partition.sizes import Iid
from fedray.errors import ConfigError

if TYPE_CHECKING:  # keys import torch, and nothing here needs more of them than their methods
    from fedray.keys import Key

_ALPHAS = "0.1 for strong skew or 100 for almost none"
_LEAST_LOG = -1e300  # of a share that is zero for all purposes; its differences are finite


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
        refuse_not_above_zero("alpha", self.alpha, _ALPHAS)
        refuse_below_one("min_size", self.min_size)

    def __call__(self, labels: np.ndarray, *, num_clients: int, num_classes: int, key: Key) -> list[np.ndarray]:
        labels = checked(labels, num_clients, num_classes)
        refuse_too_many(self.min_size, num_clients, len(labels))
        key = key.fold("dirichlet")
        class_sizes = np.bincount(labels, minlength=num_classes)
        lacking = None
        for attempt in range(REDO_LIMIT):
            drawn = self._draw(class_sizes, num_clients, key.fold("draw", attempt).numpy())
            lack = int(np.maximum(self.min_size - drawn.sum(axis=0), 0).sum())
            if lacking is None or lack < lacking:
                counts, lacking = drawn, lack
            if lacking == 0:
                break
        owner = deal(by_label(labels, num_classes), counts, len(labels), key.fold("deal").numpy())
        if lacking:
            top_up(owner, num_clients, self.min_size, key.fold("top_up").numpy())
        return gather(owner, num_clients)

    def _draw(self, class_sizes: np.ndarray, num_clients: int, random: np.random.Generator) -> np.ndarray:
        """How many samples of each class go to each client: int64, shape (num_classes, num_clients)."""
        counts = np.zeros((len(class_sizes), num_clients), np.int64)
        sizes = np.zeros(num_clients, np.int64)
        for label, class_size in enumerate(class_sizes):
            log_gamma = np.log(random.standard_gamma(self.alpha + 1.0, num_clients))
            exponential = random.standard_exponential(num_clients)
            # Some client is below the average as long as any sample is left, so `open_clients` is not empty.
            open_clients = np.flatnonzero(sizes * num_clients < class_sizes.sum())
            if class_size == 0:
                continue
            shares = dirichlet_shares(log_gamma[open_clients], exponential[open_clients], self.alpha)
            counts[label, open_clients] = cut(shares, int(class_size))
            sizes += counts[label]
        return counts


@dataclass(frozen=True, kw_only=True)
class DirichletPrior:
    """Label skew: each client draws a prior q ~ Dir(alpha * p) over the classes, p being their shares in the data,
    and then its samples from q without replacement (Hsu et al. 2019, section 3). Clients draw in turns, one sample at
    a time in random order; a class that is used up leaves every prior (as in the code of FedDyn, Acar et al. 2021).

    alpha: above 0; the smaller, the fewer classes at a client. It is the sum of the concentrations, so that with ten
           equal classes the concentration of each is alpha / 10.
    sizes: how many samples each client gets, such as Quantity(beta=0.5) or LogNormal(sigma=0.3); None for equal
           numbers. Label skew and quantity skew are both as drawn, whatever the other is.
    """

    alpha: float
    sizes: Sizes | None = None

    def __post_init__(self) -> None:
        refuse_not_above_zero("alpha", self.alpha, _ALPHAS)
        if self.sizes is not None:
            refuse_no_sizes("sizes", self.sizes)

    def __call__(self, labels: np.ndarray, *, num_clients: int, num_classes: int, key: Key) -> list[np.ndarray]:
        labels = checked(labels, num_clients, num_classes)
        key = key.fold("dirichlet_prior")
        scheme = Iid() if self.sizes is None else self.sizes
        sizes = scheme.sizes(len(labels), num_clients=num_clients, key=key.fold("sizes"))
        supply = np.bincount(labels, minlength=num_classes)
        logs = self._log_priors(supply / supply.sum(), num_clients, key.fold("prior").numpy())
        random = key.fold("draw").numpy()
        turns = random.permutation(np.repeat(np.arange(num_clients), sizes))
        drawn = _in_turns(turns, logs, supply, random)
        counts = np.bincount(drawn * num_clients + turns, minlength=num_classes * num_clients)
        members, shape = by_label(labels, num_classes), (num_classes, num_clients)
        owner = deal(members, counts.reshape(shape), len(labels), key.fold("deal").numpy())
        return gather(owner, num_clients)

    def _log_priors(self, shares: np.ndarray, num_clients: int, random: np.random.Generator) -> np.ndarray:
        """Logs of unnormalised draws from Dir(alpha * shares): float64, shape (num_clients, num_classes)."""
        concentration = np.maximum(self.alpha * shares, np.finfo(float).tiny)
        log_gamma = np.log(random.standard_gamma(concentration + 1.0, (num_clients, len(shares))))
        with np.errstate(over="ignore"):
            shift = random.standard_exponential(log_gamma.shape) / concentration
        logs: np.ndarray = np.maximum(log_gamma - shift, _LEAST_LOG)
        return logs


def _in_turns(turns: np.ndarray, logs: np.ndarray, supply: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The class that each turn draws from its client's prior, no class more often than its supply: int64, (n,).

    Every turn draws at once. Then, one after the other as classes run out, the turns after that draw anew among the
    classes that are left, which is what drawing turn by turn comes to.

    turns: the client of each turn, int64 (n,). logs: of priors, (num_clients, num_classes). supply: (num_classes,),
    with a sum of n.
    """
    open_classes = supply > 0
    drawn = _draw(turns, logs, open_classes, random)
    while True:
        order = np.argsort(drawn, kind="stable")
        found = np.bincount(drawn, minlength=len(supply))
        over = np.flatnonzero(open_classes & (found > supply))
        if not len(over):
            return drawn
        starts = np.cumsum(found) - found
        firsts = order[starts[over] + supply[over]]  # the first turn of each that comes too late
        label, first = over[firsts.argmin()], firsts.min()
        open_classes = open_classes & (np.arange(len(supply)) != label)
        late = order[starts[label] : starts[label] + found[label]]
        late = late[late >= first]
        drawn[late] = _draw(turns[late], logs, open_classes, random)


def _draw(clients: np.ndarray, logs: np.ndarray, open_classes: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """An open class for each of `clients`, drawn from its prior: int64, shape of clients."""
    rows, index = np.unique(clients, return_inverse=True)
    weights = np.where(open_classes, logs[rows], -np.inf)
    weights = np.exp(weights - weights.max(axis=1, keepdims=True))
    ends = np.cumsum(weights, axis=1)
    # One search for all: client i has the numbers from i to i + 1.
    ends = ends / ends[:, -1:] + np.arange(len(rows))[:, None]
    at = np.minimum(index + random.random(len(index)), np.nextafter(index + 1.0, 0))
    drawn: np.ndarray = np.searchsorted(ends.ravel(), at, side="right") - index * logs.shape[1]
    return drawn


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Sorted by label, cut into equal shards, dealt at random (McMahan et al. 2017, section 3: 200 shards of 300
    MNIST digits, two per client). Where the number of samples does not divide, shard sizes differ by one.

    per_client: shards of a client; about the number of its classes.
    """

    per_client: int = 2

    def __post_init__(self) -> None:
        refuse_below_one("per_client", self.per_client)

    def __call__(self, labels: np.ndarray, *, num_clients: int, num_classes: int, key: Key) -> list[np.ndarray]:
        labels = checked(labels, num_clients, num_classes)
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
    samples: samples of each of them; None to deal out all.
    cut:     how a class is cut among its owners, if not equally: Quantity(beta=alpha) is the extended Dirichlet of
             PFLlib (its `exdir`) and, with two classes, the `mixed` of NIID-Bench; LogNormal(sigma=2, min_size=5) is
             the recipe of FedProx for MNIST (Li et al. 2020). Its min_size is that of each class of each client.
    """

    classes: int = 2
    samples: int | None = None
    cut: Sizes | None = None

    def __post_init__(self) -> None:
        refuse_below_one("classes", self.classes)
        if self.samples is not None:
            refuse_below_one("samples", self.samples)
        if self.cut is not None:
            refuse_no_sizes("cut", self.cut)
            if self.samples is not None:
                raise ConfigError(
                    f"partition.samples is {self.samples}; with partition.cut every sample of a class is dealt out, "
                    "so set one of the two to null"
                )

    def __call__(self, labels: np.ndarray, *, num_clients: int, num_classes: int, key: Key) -> list[np.ndarray]:
        labels = checked(labels, num_clients, num_classes)
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
            elif len(owners):
                scheme = Iid() if self.cut is None else self.cut
                counts = scheme.sizes(len(shuffled), num_clients=len(owners), key=key.fold("cut", label))
                owner[shuffled] = np.repeat(owners, counts)
        return gather(owner, num_clients)

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
