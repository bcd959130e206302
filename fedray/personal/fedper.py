"""FedPer: the last layers stay with each client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from fedray.personal.keeping import KeepsTensors, Kept, check_head, head, refuse_head
from fedray.round import Policy, RunFacts
from fedray.tree import Layout


@final
@dataclass(frozen=True, kw_only=True)
class FedPer(KeepsTensors, Policy[None, Kept | None]):
    """Personalisation layers (Arivazhagan et al. 2019, section 3): clients train the whole model and share the base.

    The head never leaves a client, so the server has no whole model and only clients are evaluated. A head that has
    not been trained yet is the initial one.

    layers: how many of the last layers with a weight matrix are the head, with all that follows them. At least 1.
    names:  patterns of the parameters to take instead, such as ["fc2.*"]; None for `layers`.
    """

    layers: int = 1
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        refuse_head(self.layers, self.names)

    def check(self, run: RunFacts) -> None:
        check_head("personal.fedper", run, self.layers, self.names)

    def keeps(self, kinds: Mapping[str, str], buffers: Layout) -> frozenset[str]:
        return head(kinds, buffers, self.layers, self.names)
