"""Clients as the data have them: writers, speakers, devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import numpy as np

from fedray.data.partition.base import checked, gather
from fedray.errors import ConfigError

if TYPE_CHECKING:  # keys import torch, and nothing here needs more of them than their methods
    from fedray.keys import Key

Take = Literal["even", "largest"]


@dataclass(frozen=True, kw_only=True)
class Natural:
    """One client per owner, in the order of the owners' numbers (LEAF, Caldas et al. 2018: writers of FEMNIST, roles
    of Shakespeare). Only owners with a training sample count.

    take: what happens with more owners than clients. "even": owners are dealt to clients at random, numbers of owners
          differ by one at most and every sample is dealt out; "largest": the owners with most samples are the
          clients (ties to the lower number) and the others' samples go to nobody.
    """

    needs_owners: ClassVar[bool] = True

    take: Take = "even"

    def __post_init__(self) -> None:
        if self.take not in get_args(Take):
            raise ConfigError(f"partition.take is {self.take!r}; choose {' or '.join(get_args(Take))}")

    def __call__(
        self, labels: np.ndarray, *, num_clients: int, num_classes: int, key: Key, owners: np.ndarray | None = None
    ) -> list[np.ndarray]:
        labels = checked(labels, num_clients, num_classes)
        if owners is None:
            raise ConfigError(
                "partition is Natural and the data do not say who made each sample; take data with owners, such as "
                "FEMNIST or Shakespeare, or another partition"
            )
        owners = np.asarray(owners)
        if owners.shape != labels.shape or not np.issubdtype(owners.dtype, np.integer):
            raise ConfigError(
                f"owners have type {owners.dtype} and shape {owners.shape}; give one integer for each of the "
                f"{len(labels)} samples"
            )
        numbers, index, counts = np.unique(owners, return_inverse=True, return_counts=True)
        if num_clients > len(numbers):
            raise ConfigError(
                f"num_clients is {num_clients}; the training data have {len(numbers)} owners and a client needs one, "
                f"so lower it to at most {len(numbers)} or take another partition"
            )
        client = np.full(len(numbers), -1, np.int64)
        if num_clients == len(numbers):
            client[:] = np.arange(num_clients)
        elif self.take == "largest":
            chosen = np.sort(np.argsort(-counts, kind="stable")[:num_clients])
            client[chosen] = np.arange(num_clients)
        else:
            client[key.fold("natural").numpy().permutation(len(numbers))] = np.arange(len(numbers)) % num_clients
        return gather(client[index], num_clients)
