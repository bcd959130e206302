"""Static batch normalisation: no running statistics in training, exact ones for evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from fedray.errors import ConfigError
from fedray.round import Policy, RunFacts
from fedray.tree import Layout


@final
@dataclass(frozen=True, kw_only=True)
class StaticNorm(Policy[None, None]):
    """Static batch normalisation (Diao et al. 2021, HeteroFL, section 3).

    Clients normalise by the statistics of their batches and the running ones travel nowhere. Before each evaluation
    the cohort is sent the new model and answers with the statistics of its data, which the server pools; that exchange
    is in the ledger as "statistics". The paper asks all clients; here it is the cohort, who pay for it. A model about
    which nobody could be asked, because the cohort was empty, is not evaluated. It is the server's model that is asked
    about, of clients who train a narrow one too. A client whose own model is another (a width, a mask of its own) is
    evaluated with statistics of its training data in that one, which it takes by itself, so no bytes are counted;
    theirs, in HeteroFL's code, is the whole model in each evaluation.
    """

    recomputes_statistics: ClassVar[bool] = True

    def check(self, run: RunFacts) -> None:
        if run.kinds is not None and "norm" not in run.kinds.values():
            raise ConfigError(
                "batch_norm is 'static' and this model has no batch normalisation with running statistics; take one "
                "that has (model=batchnorm_cnn), or batch_norm=average"
            )

    def keeps(self, kinds: Mapping[str, str], buffers: Layout) -> frozenset[str]:
        return frozenset(name for name in buffers.names if name.rpartition(".")[2] in ("running_mean", "running_var"))
