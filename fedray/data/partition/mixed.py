"""Label skew inside quantity skew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedray.data.partition.base import (
    Partition,
    Sizes,
    by_label,
    checked,
    cut,
    deal,
    gather,
    histogram,
    refuse_below_one,
    refuse_no_sizes,
)
from fedray.errors import ConfigError

if TYPE_CHECKING:  # keys import torch, and nothing here needs more of them than their methods
    from fedray.keys import Key

_TURNS = 50  # of fitting rows and columns; sizes that the labels allow are met to well below a sample


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """The classes of one partition in the sizes of another.

    `labels` deals first; of that only how many samples of each class a client got is kept. These counts are fitted to
    the drawn sizes and to the class totals in turn (iterative proportional fitting, Deming and Stephan 1940) and the
    samples are dealt anew. So a client has no class that `labels` did not give it, every sample that `labels` deals
    out is dealt out, and sizes are those of `sizes` as far as the classes allow: the clients of a rare class cannot
    all be large. Where both skews have to be as drawn, take DirichletPrior with sizes.

    labels:   a partition by label: Dirichlet, DirichletPrior, Classes or Shards.
    sizes:    a partition by size: Quantity, LogNormal or PowerLaw.
    min_size: fewest samples of a client; `labels` has to give that many.
    """

    labels: Partition
    sizes: Sizes
    min_size: int = 1

    def __post_init__(self) -> None:
        if not callable(self.labels) or getattr(self.labels, "needs_owners", False):
            raise ConfigError(
                f"partition.labels is {self.labels!r}; it must be a partition by label, such as Dirichlet or Classes"
            )
        refuse_no_sizes("sizes", self.sizes)
        refuse_below_one("min_size", self.min_size)

    def __call__(self, labels: np.ndarray, *, num_clients: int, num_classes: int, key: Key) -> list[np.ndarray]:
        labels = checked(labels, num_clients, num_classes)
        key = key.fold("mixed")
        parts = self.labels(labels, num_clients=num_clients, num_classes=num_classes, key=key.fold("labels"))
        smallest = int(np.argmin([len(part) for part in parts]))
        if len(parts[smallest]) < self.min_size:
            raise ConfigError(
                f"partition.min_size is {self.min_size}; partition.labels gives client {smallest} only "
                f"{len(parts[smallest])} samples, so lower it or raise partition.labels.min_size"
            )
        given = histogram(labels, parts, num_classes)
        random = key.fold("reserve").numpy()
        kept = [random.choice(part, self.min_size, replace=False, shuffle=False) for part in parts]
        sizes = self.sizes.sizes(int(given.sum()), num_clients=num_clients, key=key.fold("sizes"))
        counts = _fitted(given, histogram(labels, kept, num_classes), sizes)
        members = by_label(labels, num_classes)
        owner = deal(members, counts.T, len(labels), key.fold("deal").numpy())
        return gather(owner, num_clients)


def _fitted(given: np.ndarray, kept: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Whole numbers with the columns' sums of `given`, nowhere below `kept`, rows near `sizes`, zero where it is.

    given, kept: int64, shape (num_clients, num_classes), kept <= given. sizes: int64, shape (num_clients,).
    """
    totals = given.sum(axis=0)
    present = np.flatnonzero(totals)
    fitted, held = given[:, present].astype(np.float64), given[:, present] > 0
    for _ in range(_TURNS):
        fitted *= (sizes / fitted.sum(axis=1))[:, None]
        fitted *= totals[present] / fitted.sum(axis=0)
        fitted = np.where(held, np.maximum(fitted, 1e-100), 0.0)  # so that no row or column can vanish
    counts = kept.copy()
    for column, label in enumerate(present):
        clients = np.flatnonzero(held[:, column])
        missing = np.maximum(fitted[clients, column] - kept[clients, label], 0)
        weights = missing if missing.any() else fitted[clients, column]
        counts[clients, label] += cut(weights / weights.sum(), int(totals[label] - kept[:, label].sum()))
    return counts
