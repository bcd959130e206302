"""Partitions by size alone: everyone's labels are IID, and how much they have is equal or skewed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedray.data.partition.base import (
    REDO_LIMIT,
    Sizes,
    apportion,
    checked,
    cut,
    dirichlet_shares,
    refuse_below_one,
    refuse_below_zero,
    refuse_not_above_zero,
    refuse_too_many,
)

if TYPE_CHECKING:  # keys import torch, and nothing here needs more of them than their methods
    from fedray.keys import Key


@dataclass(frozen=True, kw_only=True)
class Iid:
    """Shuffled and cut into parts whose sizes differ by one at most (McMahan et al. 2017, section 3)."""

    def __call__(self, labels: np.ndarray, *, num_clients: int, num_classes: int, key: Key) -> list[np.ndarray]:
        return _shuffled(self, labels, num_clients, num_classes, key.fold("iid"))

    def sizes(self, total: int, *, num_clients: int, key: Key) -> np.ndarray:  # noqa: ARG002
        return total // num_clients + (np.arange(num_clients) < total % num_clients).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """Quantity skew: sizes in proportions drawn from Dir(beta) (NIID-Bench, Li et al. 2022: `iid-diff-quantity`).

    beta:     above 0; the smaller, the fewer clients have most of the samples.
    min_size: fewest samples of a client. NIID-Bench draws anew until it holds (with 10), which need not end. Here
              the number of draws is limited; then the draw that lacks least is mended: those above min_size give in
              proportion to what they have above it.
    """

    beta: float
    min_size: int = 1

    def __post_init__(self) -> None:
        refuse_not_above_zero("beta", self.beta, "0.5 for strong skew or 100 for almost none")
        refuse_below_one("min_size", self.min_size)

    def __call__(self, labels: np.ndarray, *, num_clients: int, num_classes: int, key: Key) -> list[np.ndarray]:
        return _shuffled(self, labels, num_clients, num_classes, key.fold("quantity"))

    def sizes(self, total: int, *, num_clients: int, key: Key) -> np.ndarray:
        refuse_too_many(self.min_size, num_clients, total)
        lacking = None
        for attempt in range(REDO_LIMIT):
            random = key.fold("sizes", attempt).numpy()
            log_gamma = np.log(random.standard_gamma(self.beta + 1.0, num_clients))
            drawn = cut(dirichlet_shares(log_gamma, random.standard_exponential(num_clients), self.beta), total)
            lack = int(np.maximum(self.min_size - drawn, 0).sum())
            if lacking is None or lack < lacking:
                best, lacking = drawn, lack
            if lacking == 0:
                break
        if lacking:
            excess = np.maximum(best - self.min_size, 0)
            spare = total - self.min_size * num_clients
            best = self.min_size + (apportion(excess[None], np.array([spare]))[0] if spare else 0 * excess)
        return best


@dataclass(frozen=True, kw_only=True)
class LogNormal:
    """Quantity skew: everyone has min_size, and the rest goes in proportion to exp(sigma * z), z standard normal (the
    log-normal sizes of FedProx, Li et al. 2020, whose code does so for each of a client's classes: see `Classes.cut`).

    sigma:    at least 0; 0 gives equal sizes, 2 is that of FedProx.
    min_size: fewest samples of a client.
    """

    sigma: float
    min_size: int = 1

    def __post_init__(self) -> None:
        refuse_below_zero("sigma", self.sigma, "0.3 for mild skew or 2 for that of FedProx")
        refuse_below_one("min_size", self.min_size)

    def __call__(self, labels: np.ndarray, *, num_clients: int, num_classes: int, key: Key) -> list[np.ndarray]:
        return _shuffled(self, labels, num_clients, num_classes, key.fold("log_normal"))

    def sizes(self, total: int, *, num_clients: int, key: Key) -> np.ndarray:
        normal = key.fold("sizes").numpy().standard_normal(num_clients)
        return _of_logs(self.sigma * (normal - normal.max()), total, self.min_size)


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """Quantity skew: everyone has min_size, and of the rest the client of rank r has a share in proportion to
    r^-exponent (Zipf's law; FedProx, Li et al. 2020, says that its sizes follow a power law). Ranks are dealt to
    clients at random.

    exponent: at least 0; 0 gives equal sizes, 1 is Zipf's law.
    min_size: fewest samples of a client.
    """

    exponent: float
    min_size: int = 1

    def __post_init__(self) -> None:
        refuse_below_zero("exponent", self.exponent, "1 for Zipf's law")
        refuse_below_one("min_size", self.min_size)

    def __call__(self, labels: np.ndarray, *, num_clients: int, num_classes: int, key: Key) -> list[np.ndarray]:
        return _shuffled(self, labels, num_clients, num_classes, key.fold("power_law"))

    def sizes(self, total: int, *, num_clients: int, key: Key) -> np.ndarray:
        rank = 1 + key.fold("sizes").numpy().permutation(num_clients)
        return _of_logs(-self.exponent * np.log(rank), total, self.min_size)


def _of_logs(logs: np.ndarray, total: int, min_size: int) -> np.ndarray:
    """min_size for everyone, and the rest in proportion to the exponentials of `logs`, of which the largest is 0."""
    refuse_too_many(min_size, len(logs), total)
    weights = np.exp(logs)
    return min_size + cut(weights / weights.sum(), total - min_size * len(logs))


def _shuffled(scheme: Sizes, labels: np.ndarray, num_clients: int, num_classes: int, key: Key) -> list[np.ndarray]:
    labels = checked(labels, num_clients, num_classes)
    sizes = scheme.sizes(len(labels), num_clients=num_clients, key=key)
    order = key.numpy().permutation(len(labels))
    return [np.sort(part) for part in np.split(order, np.cumsum(sizes)[:-1])]
