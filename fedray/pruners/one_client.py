"""Pruning at one client before the first round: it trains, looks for another mask from time to time, and stops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from fedray.errors import ConfigError
from fedray.prune.search import has_settled
from fedray.pruners.by_time import Flops, SearchesByTime
from fedray.round import Context, Exchange, Fit, Message, Part, PartSpec, RunFacts, Server, View, refuse
from fedray.sums import Sums
from fedray.tree import Layout, Mask, Tree, add

INITIAL = "initial_pruning"
ABOVE_CHANCE = 1.5  # reconfigurations begin when accuracy is so many times that of chance


@dataclass(frozen=True, kw_only=True)
class PrunesAtOneClient(SearchesByTime):
    """One client trains alone before round 1 and chooses mask and weights that all begin with.

    A policy names this before `Policy` among its bases. The client trains for rounds of `initial_steps` steps, adds up
    the squared sums of their batch gradients, and looks for the next mask after every `initial_every` rounds, once its
    training accuracy is ABOVE_CHANCE / num_classes (at once where samples have no classes: numbers, next tokens). The
    weights go on from there. It is sent the FLOPs of an example by tensor, and the mask that the model came with.

    Jiang et al. 2022 (PruneFL), initial pruning. Deviations from the authors' code: they square the gradient of each
    batch, train on 200 examples, and count from the round in which the accuracy, looked at every 10 rounds, is enough.

    initial_client: its id; None to draw one. It is waited for, available or not. initial_rounds: at most so many; 0
    switches all of this off.
    tolerance, patience: it ends when `patience` masks on end moved the kept count by at most `tolerance` of it.
    """

    # Read by the conformance suite.
    exempt: ClassVar[Mapping[str, str]] = {
        f"settings_are_read.{name}": "it decides after several reconfigurations, and a short run has one"
        for name in ("tolerance", "patience")
    }

    initial_client: int | None = None
    initial_rounds: int = 1000
    initial_steps: int = 10
    initial_every: int = 50
    tolerance: float = 0.1
    patience: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("initial_rounds", 0), ("initial_steps", 1), ("initial_every", 1), ("patience", 1)):
            refuse(getattr(self, name) < least, name, getattr(self, name), f"it is a whole number, at least {least}")
        few = f"it is 0, or at least initial_every ({self.initial_every}), for else no mask is ever looked for"
        refuse(0 < self.initial_rounds < self.initial_every, "initial_rounds", self.initial_rounds, few)
        refuse(not self.tolerance >= 0.0, "tolerance", self.tolerance, "it is a fraction of the size, 0 or more")

    def check(self, run: RunFacts) -> None:
        super().check(run)
        if self.initial_client is not None and not 0 <= self.initial_client < run.num_clients:
            raise ConfigError(
                f"pruner.initial_client is {self.initial_client}; it is a client's id from 0 to {run.num_clients - 1}, "
                "or null to draw one"
            )

    def exchange_parts(self, params: Layout, buffers: Layout) -> Mapping[str, Mapping[str, PartSpec]]:
        answer = {"params": params, "buffers": buffers} if buffers.size else {"params": params}
        parts = {name: PartSpec(layout=layout, direction="up", lossy=False) for name, layout in answer.items()}
        return {INITIAL: {**parts, "flops": PartSpec(layout=_by_tensor(params), direction="down", lossy=False)}}

    def exchanges(self, memory: Flops, ctx: Context) -> tuple[Exchange, ...]:
        if ctx.round != 1 or not self.initial_rounds:
            return ()
        drawn = int(ctx.run_key.fold("initial client").numpy().integers(ctx.num_clients))
        return (Exchange(name=INITIAL, clients=(drawn if self.initial_client is None else self.initial_client,)),)

    def ask(self, exchange: Exchange, server: Server, memory: Flops, ctx: Context) -> Message:
        layout = _by_tensor(server.params.layout)
        counts = [memory[name] if name in memory else 0.0 for name in server.params.layout.names]
        # A whole mask goes without saying.
        mask = None if server.mask is None or bool(server.mask.flat.all()) else server.mask
        return Message(mask=mask).put("flops", Part(value=Tree(layout, torch.tensor(counts, dtype=torch.float32))))

    def answer(self, exchange: Exchange, message: Message, memory: Tree | None, ctx: Context) -> Message:
        mask = Mask.full(ctx.origin.layout) if message.mask is None else message.mask
        fit = self._prune(mask, dict(zip(ctx.origin.layout.names, message["flops"].flat.tolist(), strict=True)), ctx)
        found = Message(parts={"params": Part(value=fit.params, support=fit.mask)}, mask=fit.mask)
        return found.put("buffers", Part(value=fit.buffers)) if fit.buffers.layout.size else found

    def learn(
        self, exchange: Exchange, server: Server, sums: Sums, memory: Flops, ctx: Context
    ) -> tuple[Server, Flops]:
        if "params" not in sums:
            return server, memory
        found = replace(server, params=sums.mean("params", otherwise=0.0), mask=sums.support("params"))
        return replace(found, buffers=sums.mean("buffers", otherwise=0.0)) if "buffers" in sums else found, memory

    def _prune(self, mask: Mask, flops: Flops, ctx: Context) -> Fit:
        assert ctx.job is not None
        assert ctx.train is not None
        examples = float(ctx.job.num_steps * ctx.job.batch_size)
        importance, ready = Tree.zeros(ctx.origin.layout), False
        job = replace(ctx.job, mask=mask, num_steps=self.initial_steps, wants=frozenset({"grad_sum"}))
        sizes: list[int] = []
        for number in range(1, self.initial_rounds + 1):
            fit = ctx.train(job, f"initial pruning {number}")
            importance = add(importance, squared(fit.evidence["grad_sum"]))
            if number % self.initial_every == 0:
                ready = ready or _above_chance(fit, ctx)
                if ready:
                    mask = self.next_mask(fit.params, mask, importance, flops, examples, 0, ctx)
                    fit = fit.cut(mask)
                    importance = Tree.zeros(importance.layout)
                    sizes.append(sum(mask.counts(ctx.prunable).values()))
            if has_settled(sizes, tolerance=self.tolerance, patience=self.patience):
                break
            job = replace(job, params=fit.params, buffers=fit.buffers, mask=fit.mask, **_local(fit))
        return fit


def squared(a: Tree) -> Tree:
    """The square of each coordinate."""
    return Tree(a.layout, a.flat.square())


def _above_chance(fit: Fit, ctx: Context) -> bool:
    """Whether a model has learned anything; True where that cannot be told by classes."""
    assert ctx.client is not None
    assert ctx.score is not None
    classes = len(ctx.client.label_counts)
    if classes < 2:
        return True
    scores = ctx.score(View(params=fit.params, buffers=fit.buffers, mask=fit.mask, **_local(fit)))
    return "accuracy" not in scores or scores["accuracy"] >= ABOVE_CHANCE / classes


def _local(fit: Fit) -> dict[str, Any]:
    return {"local": fit.local, "local_buffers": fit.local_buffers}


def _by_tensor(params: Layout) -> Layout:
    """One number for each tensor."""
    return Layout(("flops",), ((len(params.names),),))
