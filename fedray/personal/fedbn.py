"""FedBN: batch normalisation stays with each client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from fedray.errors import ConfigError
from fedray.personal.keeping import KeepsTensors, Kept, check_steps
from fedray.round import Policy, RunFacts, refuse
from fedray.tree import Layout

Extent = Literal["all", "statistics"]


@final
@dataclass(frozen=True, kw_only=True)
class FedBN(KeepsTensors, Policy[None, Kept | None]):
    """Local batch normalisation (Li et al. 2021, algorithm 1): everything is averaged but its layers.

    What is normalised over batches is found by its running statistics; layer and group normalisation are shared like
    any weight. The server has no whole model, so only clients are evaluated.

    keep: "all" keeps scale, shift and statistics, as in the paper; "statistics" shares scale and shift.
    """

    keep: Extent = "all"

    def __post_init__(self) -> None:
        refuse(self.keep not in ("all", "statistics"), "keep", self.keep, "choose all or statistics")

    def check(self, run: RunFacts) -> None:
        check_steps("personal.fedbn", run)
        if run.kinds is not None and "norm" not in run.kinds.values():
            raise ConfigError(NO_BATCH_NORM)

    def keeps(self, kinds: Mapping[str, str], buffers: Layout) -> frozenset[str]:
        layers = {name.rpartition(".")[0] for name in buffers.names if name.endswith("running_mean")}
        if not layers:
            raise ConfigError(NO_BATCH_NORM)
        names = [*buffers.names, *(kinds if self.keep == "all" else ())]
        return frozenset(name for name in names if name.rpartition(".")[0] in layers)

    def owns(self, local: Layout, buffers: Layout) -> list[str]:
        return list(buffers.names)


NO_BATCH_NORM = (
    "personal is fedbn and this model has no batch normalisation with running statistics; take one that has "
    "(model=batchnorm_cnn), or leave it out"
)
