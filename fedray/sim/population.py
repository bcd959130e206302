"""Who the clients are: the data set and which of its rows belong to whom.

A population is a bundle of plain arrays. It goes into the object store once per node and every actor reads it as a
view, so a thousand clients cost one copy of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from fedray.round import ClientInfo
from fedray.train import Samples
from fedray.tree import tensor_view


@dataclass(frozen=True, kw_only=True)
class Population:
    """
    train_x, test_x:  uint8 or float32, (n, *shape); train_y, test_y: int64 (n,).
    rows, starts:     client c holds the training rows `rows[starts[c]:starts[c + 1]]`.
    local_rows, local_starts: likewise for its local test, rows of the test set.
    label_counts:     (num_clients, num_classes).
    mean, std, scale: the model's input is (x * scale - mean) / std.
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

    @property
    def num_clients(self) -> int:
        return len(self.starts) - 1

    @property
    def num_test(self) -> int:
        return len(self.test_y)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.train_x.shape[1:]

    @cached_property
    def _tensors(self) -> tuple[torch.Tensor, ...]:
        arrays = (self.train_x, self.train_y, self.test_x, self.test_y, self.rows, self.mean, self.std)
        return tuple(tensor_view(np.ascontiguousarray(array)) for array in arrays)

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
            train_x, train_y, _, _, rows, mean, std = self._tensors
            index = rows[int(self.starts[client]) : int(self.starts[client + 1])]
            found = self._samples[client] = Samples(train_x, train_y, index, mean, std, self.scale)
        return found

    def test(self, start: int, stop: int) -> Samples:
        """A stretch of the global test set."""
        _, _, test_x, test_y, _, mean, std = self._tensors
        return Samples(test_x, test_y, torch.arange(start, stop), mean, std, self.scale)

    def local_test(self, client: int) -> np.ndarray:
        """The rows of the test set that make up a client's local test."""
        return self.local_rows[self.local_starts[client] : self.local_starts[client + 1]]
