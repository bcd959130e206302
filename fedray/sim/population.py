"""Who the clients are: the data set and which of its rows belong to whom.

A population is a bundle of plain arrays. It goes into the object store once per node and every actor reads it as a
view, so a thousand clients cost one copy of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from fedray.keys import Key
from fedray.round import ClientInfo
from fedray.train import Samples
from fedray.train.engine import Augmented
from fedray.tree import tensor_view


@dataclass(frozen=True, kw_only=True)
class Population:
    """
    train_x, test_x:  uint8 or float32, (n, *shape); train_y, test_y: int64 (n,).
    rows, starts:     client c holds the training rows `rows[starts[c]:starts[c + 1]]`.
    local_rows, local_starts: likewise for its local test, rows of the test set.
    label_counts:     (num_clients, num_labels).
    mean, std, scale: the model's input is (x * scale - mean) / std.
    vocabulary:       how many tokens there are, if samples are tokens.
    held_rows, held_starts: likewise for what is set apart of its training data for gates; None for nothing.
    skew:             what clients' circumstances make of their samples, called as
                      skew(x, positions=, size=, client=, num_clients=, key=, kind=); None for nothing.
    augment:          random changes of training inputs, called as augment(x, generator); None for none.
    key:              what the skew draws from.
    public_rows:      training rows that the server has to itself; None for none.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    local_rows: np.ndarray
    local_starts: np.ndarray
    label_counts: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    scale: float
    vocabulary: int | None = None
    held_rows: np.ndarray | None = None
    held_starts: np.ndarray | None = None
    skew: Any = None
    augment: Any = None
    key: Key | None = None
    public_rows: np.ndarray | None = None

    @property
    def num_clients(self) -> int:
        return len(self.starts) - 1

    @property
    def unjudged(self) -> tuple[int, ...]:
        """Clients of whose training data nothing is set apart, where something is of others'."""
        return () if self.held_starts is None else tuple(np.flatnonzero(np.diff(self.held_starts) == 0).tolist())

    @property
    def num_test(self) -> int:
        return len(self.test_y)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.train_x.shape[1:]

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        names = (
            "train_x",
            "train_y",
            "test_x",
            "test_y",
            "rows",
            "local_rows",
            "mean",
            "std",
            "held_rows",
            "public_rows",
        )
        found = {name: getattr(self, name) for name in names}
        return {name: tensor_view(np.ascontiguousarray(a)) for name, a in found.items() if a is not None}

    def touch(self) -> None:
        """Read a byte of every page, so that shared memory is mapped now and not in the middle of the first rounds."""
        for array in (self.train_x, self.train_y, self.test_x, self.test_y, self.rows):
            np.ascontiguousarray(array).reshape(-1).view(np.uint8)[::4096].max(initial=0)

    def info(self, client: int) -> ClientInfo:
        """Size and labels of one client."""
        found = self._infos.get(client)
        if found is None:
            size = int(self.starts[client + 1] - self.starts[client])
            counts = tuple(self.label_counts[client].tolist())
            found = self._infos[client] = ClientInfo(id=client, num_examples=size, label_counts=counts)
        return found

    @cached_property
    def _infos(self) -> dict[int, ClientInfo]:
        return {}

    @cached_property
    def _samples(self) -> dict[int, Samples]:
        return {}

    def train(self, client: int) -> Samples:
        """The training data of one client."""
        found = self._samples.get(client)
        if found is None:
            index = self._of("rows", self.starts, client)
            found = self._samples[client] = self._view("train", index, client, self.augment)
        return found

    def held(self, client: int) -> Samples | None:
        """What is set apart of a client's training data; None where that is nothing."""
        if self.held_starts is None:
            return None
        index = self._of("held_rows", self.held_starts, client)
        return self._view("train", index, client, whose="held") if len(index) else None

    def public(self) -> Samples | None:
        """The server's own data; None where it has none."""
        return None if self.public_rows is None else self._view("train", self._tensors["public_rows"])

    def test(self, start: int, stop: int) -> Samples:
        """A stretch of the global test set."""
        return self._view("test", torch.arange(start, stop))

    def local_samples(self, client: int) -> Samples:
        """A client's local test, under its own circumstances."""
        return self._view("test", self._of("local_rows", self.local_starts, client), client)

    def _of(self, rows: str, starts: np.ndarray, client: int) -> torch.Tensor:
        return self._tensors[rows][int(starts[client]) : int(starts[client + 1])]

    def _view(
        self,
        split: str,
        index: torch.Tensor,
        client: int | None = None,
        augment: Augmented | None = None,
        whose: str | None = None,
    ) -> Samples:
        """whose: what tells the noise of these samples from that of others in the same arrays; the split by default."""
        tensors = self._tensors
        skew = None
        if self.skew is not None and client is not None:
            assert self.key is not None
            skew = partial(
                _skewed,
                self.skew,
                size=len(index),
                client=client,
                num_clients=self.num_clients,
                key=self.key.fold("skew"),
                kind=whose or split,
            )
        return Samples(
            tensors[f"{split}_x"],
            tensors[f"{split}_y"],
            index,
            tensors["mean"],
            tensors["std"],
            self.scale,
            tokens=self.vocabulary is not None,
            skew=skew,
            augment=augment,
        )

    def local_test(self, client: int) -> np.ndarray:
        """The rows of the test set that make up a client's local test."""
        return self.local_rows[self.local_starts[client] : self.local_starts[client + 1]]


def _skewed(skew: Any, x: torch.Tensor, positions: torch.Tensor, **facts: Any) -> torch.Tensor:
    found: torch.Tensor = skew(x, positions=positions, **facts)
    return found
