"""What each client is tested on: a share of the global test set that looks like its training data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedray.data.partition import apportion, by_label, histogram
from fedray.errors import ConfigError

if TYPE_CHECKING:  # keys import torch, and nothing here needs more of them than their methods
    from fedray.keys import Key


def local_tests(
    *, train_labels: np.ndarray, parts: list[np.ndarray], test_labels: np.ndarray, num_classes: int, key: Key
) -> list[np.ndarray]:
    """Indices into the global test set for each client: int64, sorted, none twice at a client.

    A client's share of the test set is that of the training set, at least one sample, with the label proportions of
    its training data by largest remainder. Where the test set has too few of a label, the client's other labels make
    up for it as far as they go. Clients may share test samples: only metrics read them. The samples of a client
    depend on its own training data and on key.fold("local_test", client) alone.

    Raises ConfigError if the test set has none of a client's labels.
    """
    weights = histogram(train_labels, parts, num_classes)
    members = by_label(np.asarray(test_labels, np.int64), num_classes)
    supply = np.array([len(m) for m in members])
    sizes = np.maximum(1, np.rint(weights.sum(axis=1) * len(test_labels) / len(train_labels)).astype(np.int64))
    counts = np.minimum(apportion(weights, sizes), supply)
    for short in np.flatnonzero(counts.sum(axis=1) < sizes):
        counts[short] = _fill(counts[short], weights[short], supply, int(sizes[short]))
        if not counts[short].any():
            labels = np.flatnonzero(weights[short]).tolist()
            raise ConfigError(
                f"client {short} trains on labels {labels} alone and the test set has none of them; use a test set "
                "with every label, or another partition"
            )
    tests = []
    for client, wanted in enumerate(counts):
        random = key.fold("local_test", client).numpy()
        chosen = [
            members[label][random.choice(supply[label], wanted[label], replace=False, shuffle=False)]
            for label in np.flatnonzero(wanted)
        ]
        tests.append(np.sort(np.concatenate(chosen)))
    return tests


def _fill(counts: np.ndarray, weights: np.ndarray, supply: np.ndarray, size: int) -> np.ndarray:
    """Raise `counts` towards a sum of `size` in the labels that have weight and supply left."""
    while counts.sum() < size:
        room = np.where((counts < supply) & (weights > 0), weights, 0)
        if not room.any():
            break
        more = apportion(room[None], np.array([size - counts.sum()]))[0]
        counts = np.minimum(counts + more, supply)
    return counts
