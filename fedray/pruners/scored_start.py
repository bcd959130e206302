"""What pruners share that rank the initial weights by a score on data, before any training, and cut once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

from fedray.errors import ConfigError
from fedray.prune.allocate import Budget, Rounding, total_kept
from fedray.prune.select import keep_top_global
from fedray.pruners.fields import check_start, refuse_fields
from fedray.round import Context, Exchange, Message, Part, PartSpec, RunFacts, Server, refuse
from fedray.sums import Sums
from fedray.tree import Layout, Mask, Tree

SCORES = "scores"


class ScoredStart(ABC):
    """One question before the first training, and one ranking over all prunable tensors, with an exact count.

    Clients draw the initial weights from the seed, as the server does, so the question brings them a mask at most; the
    answer is 4 bytes a parameter, once. The server takes the mean, weighted by the clients' examples. An empty cohort
    cannot be asked, nor trains, and the next round asks again: so only with "all" it is known beforehand when the mask
    is cut.

    A policy that names this before `Policy` adds what is scored (`score`) and how the mean is ranked (`ranked`), and
    has these fields:

    sparsity: fraction removed, in [0, 1).
    scores:   "clients", or "server": on public data, while the run is set up.
    clients:  who is asked: "all", available or not, or the "cohort" of the first round that has one.
    budget, rounding: what the sparsity is a fraction of, and how its count is rounded: see `prune.allocate`.
    """

    exchange: ClassVar[str]
    sparsity: float
    scores: Literal["clients", "server"]
    clients: Literal["all", "cohort"]
    budget: Budget
    rounding: Rounding

    @abstractmethod
    def score(self, params: Tree, buffers: Tree, mask: Mask | None, ctx: Context) -> Tree:
        """What one client, or the server, has to say about each coordinate."""

    @abstractmethod
    def ranked(self, mean: Tree) -> Tree:
        """How much each coordinate matters, larger is kept, from the mean of the scores."""

    def refuse_scores(self) -> None:
        """Refuse values of the fields that are named above."""
        refuse_fields(self)
        refuse(self.scores not in ("clients", "server"), "scores", self.scores, "choose clients or server")
        refuse(self.clients not in ("all", "cohort"), "clients", self.clients, "choose all or cohort")

    def check(self, run: RunFacts) -> None:
        if self.scores == "server" and run.public == 0:
            raise ConfigError(
                "pruner.scores is 'server'; the server scores on public data, and it has none: set public above 0, "
                "such as public=250, or pruner.scores=clients"
            )
        check_start(self, run)

    def sparsity_after(self, round: int) -> float | None:
        if self.scores == "server":
            return self.sparsity
        if round == 0:
            return 0.0
        return self.sparsity if self.clients == "all" else None

    def changes_masks(self, round: int) -> bool | None:
        if self.scores == "server" or round == 0:
            return round == 0 and self.scores == "server"
        return round == 1 if self.clients == "all" else None

    def init_server(self, server: Server, ctx: Context) -> tuple[Server, bool]:
        if self.scores == "clients":
            return server, False
        return self._cut(server, self.score(server.params, server.buffers, server.mask, ctx), ctx), True

    def exchange_parts(self, params: Layout, buffers: Layout) -> Mapping[str, Mapping[str, PartSpec]]:
        return {self.exchange: {SCORES: PartSpec(layout=params, direction="up", lossy=False)}}

    def exchanges(self, memory: bool, ctx: Context) -> tuple[Exchange, ...]:
        return () if memory else (Exchange(name=self.exchange, clients=self.clients),)

    def ask(self, exchange: Exchange, server: Server, memory: bool, ctx: Context) -> Message:
        return Message(mask=server.mask)

    def answer(self, exchange: Exchange, message: Message, memory: None, ctx: Context) -> Message:
        assert ctx.client is not None
        assert ctx.job is not None
        found = self.score(ctx.origin, ctx.job.buffers, message.mask, ctx)
        return Message(parts={SCORES: Part(value=found, weight=float(ctx.client.num_examples))})

    def learn(self, exchange: Exchange, server: Server, sums: Sums, memory: bool, ctx: Context) -> tuple[Server, bool]:
        if SCORES not in sums:
            return server, memory
        return self._cut(server, sums.mean(SCORES, otherwise=0.0), ctx), True

    def _cut(self, server: Server, mean: Tree, ctx: Context) -> Server:
        layout, names = mean.layout, ctx.prunable
        total = total_kept(layout, names, self.sparsity, budget=self.budget, rounding=self.rounding)
        return server.cut(keep_top_global(self.ranked(mean), total, names=names, within=server.mask))
