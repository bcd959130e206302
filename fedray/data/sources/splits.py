"""From what a format holds to numbered labels and owners, and a test set where there is none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedray.data.dataset import Kind
from fedray.data.partition.base import apportion, by_label
from fedray.errors import ConfigError

if TYPE_CHECKING:  # keys import torch, and nothing here needs more of them than their methods
    from fedray.keys import Key

_CHUNK = 4096  # samples copied together, so that a mapped file is not loaded whole


@dataclass(frozen=True, kw_only=True)
class Split:
    """Samples as a format gives them.

    x:     as `Dataset` wants them. y: int64 (n,), or text (n,) for classes by name, or what `Dataset` wants.
    owner: numbers or text (n,); None where nobody made the samples.
    """

    x: np.ndarray
    y: np.ndarray
    owner: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Both splits with numbered labels and owners, and what they mean to a model."""

    train: Split
    test: Split
    num_classes: int | None = None
    objective: Kind = "classification"
    vocabulary: int | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for which, split in (("train", self.train), ("test", self.test)):
            found |= {f"{which}_x": split.x, f"{which}_y": split.y}
        for which, split in (("train", self.train), ("test", self.test)):
            if split.owner is not None:
                found[f"{which}_owner"] = split.owner
        return found

    def classes(self) -> int:
        """How many classes, tokens or outputs there are."""
        if self.num_classes is not None:
            return self.num_classes
        if self.objective == "next_token":
            assert self.vocabulary is not None
            return self.vocabulary
        if self.objective == "regression":
            return int(self.train.y.shape[1])
        return 1 + max(int(split.y.max()) for split in (self.train, self.test))


def settle(
    train: Split,
    test: Split | None,
    *,
    scratch: Path,
    test_fraction: float | None,
    num_classes: int | None = None,
    objective: Kind = "classification",
    vocabulary: int | None = None,
) -> Decoded:
    """Number classes and owners, and hold out a test set if there is none.

    Classes by name are numbered in the sorted order of the training samples' names, owners in that of all. What is
    held out is a share of each owner's samples, or of each class where nobody owns any; it is fixed for all seeds.
    Raises ConfigError for a class that only the test samples have, and for a share that leaves nothing.
    """
    if train.y.dtype.kind == "U":
        names, numbers = np.unique(train.y, return_inverse=True)
        train, num_classes = replace(train, y=numbers.astype(np.int64)), len(names)
        if test is not None:
            test = replace(test, y=_number(test.y, names))
    owners = [split.owner for split in (train, test) if split is not None and split.owner is not None]
    if owners:
        everyone = np.unique(np.concatenate(owners))
        train = _owned(train, everyone)
        test = None if test is None else _owned(test, everyone)
    if test is None:
        assert test_fraction is not None
        train, test = _held_out(train, test_fraction, objective, scratch)
    return Decoded(train=train, test=test, num_classes=num_classes, objective=objective, vocabulary=vocabulary)


def _number(labels: np.ndarray, names: np.ndarray) -> np.ndarray:
    if labels.dtype.kind != "U":
        raise ConfigError(
            "data.path has class names in its training samples and numbers in its test samples; give both alike"
        )
    unknown = np.setdiff1d(labels, names)
    if unknown.size:
        raise ConfigError(
            f"data.path has the class {str(unknown[0])!r} in its test samples only; a class needs training samples, so "
            "add some or drop it"
        )
    return np.searchsorted(names, labels).astype(np.int64)


def _owned(split: Split, everyone: np.ndarray) -> Split:
    if split.owner is None:
        return split
    return replace(split, owner=np.searchsorted(everyone, split.owner).astype(np.int64))


def _held_out(split: Split, fraction: float, objective: Kind, scratch: Path) -> tuple[Split, Split]:
    from fedray.keys import Key

    if split.owner is not None:
        groups = split.owner
    elif objective == "classification":
        groups = split.y
    else:
        groups = np.zeros(len(split.y), np.int64)
    if groups.size and groups.min() < 0:
        raise ConfigError(
            f"data.train_y is {groups.min()} at sample {int(groups.argmin())}; labels must lie from 0 on, so renumber "
            "them or drop unlabelled samples"
        )
    # A class or an owner keeps a training sample, however few it has.
    held = hold_out(groups, fraction, Key.of(0).fold("data", "held out"), keep=1)
    if not held.any():
        raise ConfigError(
            f"data.test_fraction is {fraction}; of {len(held)} samples it leaves none to test on, so raise it"
        )
    parts = []
    for name, rows in (("train", np.flatnonzero(~held)), ("test", np.flatnonzero(held))):
        x = np.lib.format.open_memmap(
            scratch / f"raw_held_{name}.npy", mode="w+", dtype=split.x.dtype, shape=(len(rows), *split.x.shape[1:])
        )
        for start in range(0, len(rows), _CHUNK):
            x[start : start + _CHUNK] = split.x[rows[start : start + _CHUNK]]
        parts.append(Split(x=x, y=split.y[rows], owner=None if split.owner is None else split.owner[rows]))
    return parts[0], parts[1]


def hold_out(groups: np.ndarray, fraction: float, key: Key, *, keep: int = 0) -> np.ndarray:
    """Which samples are for testing: bool (n,), a share of each group drawn under the key.

    groups: int64 (n,), from 0 on. keep: how many samples of a group are left out of the draw at least.
    """
    sizes = np.bincount(groups)
    counts = apportion(sizes[None], np.array([round(fraction * len(groups))]))[0]
    counts = np.minimum(counts, np.maximum(sizes - keep, 0))
    held = np.zeros(len(groups), bool)
    for group, (members, count) in enumerate(zip(by_label(groups, len(sizes)), counts, strict=True)):
        if count:
            held[key.fold(group).numpy().permutation(members)[:count]] = True
    return held


def check_fraction(fraction: object) -> float:
    """A share of samples to test on, checked."""
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise ConfigError(f"data.test_fraction is {fraction!r}; it must lie between 0 and 1, such as 0.2")
    return float(fraction)


def refuse_no_test(folder: Path, what: str, fraction: float | None) -> None:
    """Refuse a folder without test samples unless a share of the training samples is to be held out."""
    if fraction is None:
        raise ConfigError(
            f"data.path is {str(folder)!r}: no {what} in {folder}; give the folder that holds train and test samples, "
            "or hold out a share of them with data.test_fraction=0.2"
        )


_MOST = 1 << 20  # beyond it lies a slip of the finger, and arrays that no memory holds


def check_count(key: str, value: object, least: int = 1) -> int:
    """A whole number of `data`, checked."""
    if isinstance(value, int) and value > _MOST:
        raise ConfigError(f"data.{key} is {value!r}; it must be at most {_MOST}, so lower it")
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ConfigError(f"data.{key} is {value!r}; it must be a whole number of at least {least}")
    return int(value)
