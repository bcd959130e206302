"""Clients choose among masks before the first round, by the loss of each with statistics of all their data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from fedray.round import Context, Exchange, Message, Part, PartSpec, Policy, RunFacts, Server, View, refuse
from fedray.sums import Sums
from fedray.tree import Layout, Mask, Tree, restrict

STATISTICS, LOSSES = "candidate_statistics", "candidate_losses"
Moments = tuple[Tree, ...] | Literal[True] | None
"""Pooled moments by candidate, empty until they are known; None for a model without batch normalisation. True once a
mask is chosen."""


@dataclass(frozen=True, kw_only=True)
class SelectsByStatistics(ABC):
    """What a policy has that lets clients choose its first mask; it names this before `Policy` among its bases.

    Before the first training clients send what batch normalisation sees of their data in each candidate; the server
    pools it. Then each client sends the loss of each candidate with the pooled statistics, and the least mean loss,
    weighted by examples, wins, the first on a tie. Without batch normalisation there is only the second question. Both
    sides make the candidates from the initial weights and the run's key, so no mask travels.

    Huang et al. 2023 (FedTiny), adaptive batch normalisation selection. Deviation: the statistics serve the choice
    alone, and running ones start as they always do.

    candidates: how many masks; 1 asks nobody. voters: "all" clients, available or not, in round 1; or the "cohort" of
                the first round that has one.
    """

    candidates: int = 5
    voters: Literal["all", "cohort"] = "all"

    def __post_init__(self) -> None:
        refuse(self.candidates < 1, "candidates", self.candidates, "it is a number of masks, at least 1")
        refuse(self.voters not in ("all", "cohort"), "voters", self.voters, "choose all or cohort")

    def chooses(self, round: int) -> bool | None:
        """Whether the mask is chosen in this round; None where that depends on who was there."""
        if self.candidates == 1 or round == 0:
            return False
        return round == 1 if self.voters == "all" else None

    def unscored(self, run: RunFacts) -> tuple[str, ...]:
        """What to say where clients keep the statistics that candidates are scored with."""
        kept = run.has_statistics and any(_keeps_statistics(policy, run) for _, policy in run.policies)
        if self.candidates == 1 or not kept:
            return ()
        return (
            "clients keep the statistics of batch normalisation, so no candidate is scored with its own, but with "
            "mean 0 and variance 1: set batch_norm=average and personal=none, or candidates=1",
        )

    @abstractmethod
    def candidate(self, number: int, ctx: Context) -> Mask:
        """The mask of this number, from 0; the same on both sides."""

    def exchange_parts(self, params: Layout, buffers: Layout) -> Mapping[str, Mapping[str, PartSpec]]:
        losses = PartSpec(layout=self._losses(), direction="up", lossy=False)
        if not _normalises(buffers):
            return {LOSSES: {"losses": losses}}
        moments = PartSpec(layout=buffers, direction="both", lossy=False)
        asked = {_moments(number): moments for number in range(self.candidates)}
        up = {name: replace(spec, direction="up") for name, spec in asked.items()}
        down = {name: replace(spec, direction="down") for name, spec in asked.items()}
        return {STATISTICS: up, LOSSES: {"losses": losses, **down}}

    def exchanges(self, memory: Moments, ctx: Context) -> tuple[Exchange, ...]:
        if memory is True or self.candidates == 1:
            return ()
        names = (LOSSES,) if memory is None else (STATISTICS, LOSSES)
        return tuple(Exchange(name=name, clients=self.voters) for name in names)

    def ask(self, exchange: Exchange, server: Server, memory: Moments, ctx: Context) -> Message:
        pooled = memory if isinstance(memory, tuple) else ()
        return Message(parts={_moments(number): Part(value=moments) for number, moments in enumerate(pooled)})

    def answer(self, exchange: Exchange, message: Message, memory: None, ctx: Context) -> Message:
        assert ctx.job is not None
        assert ctx.client is not None
        assert ctx.moments is not None
        assert ctx.score is not None
        answer, losses = Message(), []
        for number in range(self.candidates):
            mask, name = self.candidate(number, ctx), _moments(number)
            view = View(params=restrict(ctx.origin, mask), buffers=ctx.job.buffers, mask=mask)
            if exchange.name == STATISTICS:
                moments, count = ctx.moments(view)
                answer = answer.put(name, Part(value=moments, weight=float(count)))
                continue
            if name in message:
                view = replace(view, buffers=ctx.moments.normalised(message[name]))
            scores = ctx.score(view)
            losses.append(scores["loss" if "loss" in scores else "mse"])
        if exchange.name == STATISTICS:
            return answer
        value = Tree(self._losses(), torch.tensor(losses, dtype=torch.float32))
        return answer.put("losses", Part(value=value, weight=float(ctx.client.num_examples)))

    def learn(
        self, exchange: Exchange, server: Server, sums: Sums, memory: Moments, ctx: Context
    ) -> tuple[Server, Moments]:
        if exchange.name == STATISTICS and _moments(0) in sums:
            return server, tuple(sums.mean(_moments(number), otherwise=0.0) for number in range(self.candidates))
        if exchange.name == LOSSES and "losses" in sums:
            mask = self.candidate(int(sums.mean("losses", otherwise=0.0).flat.argmin()), ctx)
            # From the initial weights, because the first candidate may have cut what this one keeps.
            return replace(server, params=restrict(ctx.origin, mask), mask=mask), True
        return server, memory

    def first_memory(self, server: Server) -> Moments:
        """The server's memory before it has asked."""
        return () if _normalises(server.buffers.layout) else None

    def _losses(self) -> Layout:
        return Layout(("losses",), ((self.candidates,),))


def _keeps_statistics(policy: Policy[Any, Any], run: RunFacts) -> bool:
    """Whether a policy keeps running statistics at clients, by the layers whose scale is a norm's."""
    kinds = run.kinds or {}
    layers = [name.rpartition(".") for name, kind in kinds.items() if kind == "norm"]
    names = tuple(f"{layer}{dot}running_mean" for layer, dot, own in layers if own == "weight")
    return not policy.keeps(kinds, Layout(names, ((1,),) * len(names))).isdisjoint(names)


def _normalises(buffers: Layout) -> bool:
    return any(name.rpartition(".")[2] == "running_mean" for name in buffers.names)


def _moments(number: int) -> str:
    return f"moments{number}"
