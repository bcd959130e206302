"""What each client is tested on and what it validates with: test samples like its training data, or of its owners, and
a part held back from training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedray.data.partition import apportion, by_label, histogram
from fedray.errors import ConfigError

if TYPE_CHECKING:  # keys import torch, and nothing here needs more of them than their methods
    from fedray.keys import Key


def local_tests(
    *,
    train_labels: np.ndarray,
    parts: list[np.ndarray],
    test_labels: np.ndarray,
    num_classes: int,
    key: Key,
    train_owner: np.ndarray | None = None,
    test_owner: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Indices into the global test set for each client: int64, sorted, none twice at a client.

    A client's share of the test set is that of the training set, at least one sample, with the label proportions of
    its training data by largest remainder. Where the test set has too few of a label, the client's other labels make
    up for it as far as they go. Clients may share test samples: only metrics read them. The samples of a client
    depend on its own training data and on key.fold("local_test", client) alone.

    train_owner, test_owner: who made each sample, int64 (n,), the same numbers in both; None where that is unknown.
    Where both are known and the partition is natural, that is no owner's samples are divided among clients, a client's
    local test is every test sample of the owners that it trains on, and nothing is drawn.

    Raises ConfigError if the test set has none of a client's labels, or none of its owners.
    """
    if train_owner is not None and test_owner is not None and _is_natural(parts, train_owner):
        return _of_owners(parts, train_owner, test_owner)
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


def carve_validation(
    parts: list[np.ndarray], labels: np.ndarray, num_classes: int, fraction: float, key: Key
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Each client's rows, divided into (training, validation): int64, sorted, together what the client had.

    For gates, which must read neither test data nor what was trained on. A client holds back `fraction` of its rows,
    to the nearest number and at least one, with its own label proportions by largest remainder; it trains on at least
    one, so that a client with a single row validates on none. Which rows these are depends on the client's rows and on
    key.fold("validation", client) alone.

    parts: rows of each client. labels: int64 (n,). fraction: from 0, which holds nothing back, to below 1.
    Raises ConfigError.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"the validation fraction is {fraction!r}; it must be at least 0 and below 1, such as 0.1")
    if fraction == 0:
        return list(parts), [part[:0] for part in parts]
    weights = histogram(labels, parts, num_classes)
    sizes = weights.sum(axis=1)
    held = np.minimum(np.maximum(1, np.rint(sizes * fraction).astype(np.int64)), sizes - 1)
    counts = apportion(weights, held)
    training, validation = [], []
    for client, part in enumerate(parts):
        random = key.fold("validation", client).numpy()
        # In shuffled order, the first so many rows of each label are held back.
        rows = random.permutation(part)
        rows = rows[np.argsort(labels[rows], kind="stable")]
        rank = np.arange(len(rows)) - np.repeat(np.cumsum(weights[client]) - weights[client], weights[client])
        taken = rank < np.repeat(counts[client], weights[client])
        training.append(np.sort(rows[~taken]))
        validation.append(np.sort(rows[taken]))
    return training, validation


def _is_natural(parts: list[np.ndarray], owner: np.ndarray) -> bool:
    """Whether nobody's samples are divided among clients."""
    clients = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    pairs = np.unique(np.stack([owner[np.concatenate(parts)], clients]), axis=1)
    return bool(len(np.unique(pairs[0])) == pairs.shape[1])


def _of_owners(parts: list[np.ndarray], train_owner: np.ndarray, test_owner: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(test_owner, kind="stable")
    ordered = test_owner[order]
    tests, without = [], []
    for client, part in enumerate(parts):
        owners = np.unique(train_owner[part])
        starts, ends = np.searchsorted(ordered, owners), np.searchsorted(ordered, owners, side="right")
        rows = np.concatenate([order[start:end] for start, end in zip(starts, ends, strict=True)])
        tests.append(np.sort(rows))
        if not len(rows):
            without.append(client)
    if without:
        raise ConfigError(
            f"{len(without)} of {len(parts)} clients, client {without[0]} among them, have no owner in the test set; "
            "use a test set of the same owners, fewer clients, or partition.take=largest"
        )
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
