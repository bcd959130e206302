"""Which clients take part in a round: who can be reached, and whom the server draws among them.

Both are functions of the seed and the round alone, so methods that are compared at one seed see the same cohorts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final

import numpy as np

from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.round import refuse


class Availability(Protocol):
    """Who can be reached in a round."""

    def __call__(self, *, round: int, num_clients: int, key: Key) -> np.ndarray:
        """bool, shape (num_clients,). round: from 1. key: of the run."""
        ...


@final
@dataclass(frozen=True, kw_only=True)
class Always:
    """Every client, in every round."""

    def __call__(self, *, round: int, num_clients: int, key: Key) -> np.ndarray:  # noqa: ARG002 - the protocol's
        return np.ones(num_clients, bool)


@final
@dataclass(frozen=True, kw_only=True)
class Periodic:
    """Each client can be reached in the first `present` rounds of every `period`, from an offset of its own.

    Like devices that charge at night in different time zones. With groups=g there are g offsets, evenly spaced over
    the period, and clients are dealt to them in turn; with None each client draws one.
    """

    period: int
    present: int
    groups: int | None = None

    def __post_init__(self) -> None:
        refuse(self.period < 1, "period", self.period, "it is a number of rounds, at least 1")
        bad = not 1 <= self.present <= self.period
        refuse(bad, "present", self.present, f"it must be from 1 to period, which is {self.period}")
        few = self.groups is not None and self.groups < 1
        refuse(few, "groups", self.groups, "it must be at least 1, or null for an offset of each client's own")

    def __call__(self, *, round: int, num_clients: int, key: Key) -> np.ndarray:
        if self.groups is None:
            offsets = key.fold("availability").numpy().integers(self.period, size=num_clients)
        else:
            offsets = np.arange(num_clients) % self.groups * self.period // self.groups
        here: np.ndarray = (round - 1 + offsets) % self.period < self.present
        return here


@final
@dataclass(frozen=True, kw_only=True)
class RandomDropout:
    """Each client is away with probability `rate`, in each round anew and independently of all others."""

    rate: float

    def __post_init__(self) -> None:
        refuse(not 0 <= self.rate < 1, "rate", self.rate, "it is the probability of being away, in [0, 1)")

    def __call__(self, *, round: int, num_clients: int, key: Key) -> np.ndarray:
        drawn = key.fold("round", round, "availability").numpy().random(num_clients)
        here: np.ndarray = drawn >= self.rate
        return here


class Sampler(Protocol):
    """Draws a cohort among the clients that can be reached."""

    def check(self, *, num_clients: int, cohort: int) -> None:
        """Refuse what cannot be drawn, by ConfigError."""
        ...

    def __call__(self, here: np.ndarray, *, cohort: int, sizes: np.ndarray, round: int, key: Key) -> np.ndarray:
        """Ids, without repetition; fewer than `cohort` where fewer can be reached.

        here: ids that can be reached, ascending. sizes: examples of every client. key: of the run.
        """
        ...


@final
@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Every client with the same probability, without replacement (McMahan et al. 2017, algorithm 1)."""

    def check(self, *, num_clients: int, cohort: int) -> None:
        """Nothing to refuse."""

    def __call__(self, here: np.ndarray, *, cohort: int, sizes: np.ndarray, round: int, key: Key) -> np.ndarray:  # noqa: ARG002
        random = key.fold("round", round, "cohort").numpy()
        return here[random.choice(len(here), min(cohort, len(here)), replace=False)]


@final
@dataclass(frozen=True, kw_only=True)
class BySize:
    """One client after the other with probability in proportion to its examples, without replacement.

    Then a plain mean is nearly unbiased: use `strategy.weight_by=uniform` (Li et al. 2020, "On the convergence of
    FedAvg on non-IID data", scheme I, which draws with replacement).
    """

    def check(self, *, num_clients: int, cohort: int) -> None:
        """Nothing to refuse."""

    def __call__(self, here: np.ndarray, *, cohort: int, sizes: np.ndarray, round: int, key: Key) -> np.ndarray:
        random = key.fold("round", round, "cohort").numpy()
        shares = sizes[here] / max(sizes[here].sum(), 1)
        return here[random.choice(len(here), min(cohort, len(here)), replace=False, p=shares if len(here) else None)]


@final
@dataclass(frozen=True, kw_only=True)
class Fixed:
    """The same cohort in every round. clients: their ids; None draws them once from the seed."""

    clients: Sequence[int] | None = None

    def check(self, *, num_clients: int, cohort: int) -> None:
        if self.clients is None:
            return
        outside = [client for client in self.clients if not 0 <= client < num_clients]
        if outside or len(set(self.clients)) != len(self.clients):
            raise ConfigError(
                f"sampling.clients is {list(self.clients)}; it names clients from 0 to {num_clients - 1}, each once"
            )
        if len(self.clients) != cohort:
            raise ConfigError(
                f"sampling.clients names {len(self.clients)} clients and cohort is {cohort}; set "
                f"cohort={len(self.clients)}, or sampling.clients=null"
            )

    def __call__(self, here: np.ndarray, *, cohort: int, sizes: np.ndarray, round: int, key: Key) -> np.ndarray:  # noqa: ARG002
        chosen = self.clients
        if chosen is None:
            chosen = key.fold("cohort").numpy().choice(len(sizes), cohort, replace=False).tolist()
        return here[np.isin(here, np.asarray(chosen))]
