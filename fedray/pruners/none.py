"""No pruning: the dense reference of every table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from fedray.round import Policy


@final
@dataclass(frozen=True, kw_only=True)
class NoPruning(Policy[None, None]):
    """Every hook is the identity: the server has no mask, and clients train densely."""

    def sparsity_after(self, round: int) -> float:
        return 0.0

    def changes_masks(self, round: int) -> bool:
        return False
