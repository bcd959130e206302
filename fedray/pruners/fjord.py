"""FjORD: ordered dropout, every step on a width drawn from those that a client can run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from fedray.errors import ConfigError
from fedray.prune.structure import Kept, Structure
from fedray.prune.widths import counts_of, window
from fedray.pruners.by_capacity import Assignment, TrainsWidths
from fedray.pruners.own_masks import check_differences
from fedray.round import Context, Job, Message, Policy, RunFacts
from fedray.tree import Mask


@final
@dataclass(frozen=True, kw_only=True)
class FjORD(TrainsWidths, Policy[None, None]):
    """Ordered dropout (Horvath et al. 2021, sections 3 and 4, algorithm 1).

    A client with largest rate p_max is sent the first ceil(p_max C) of the C units of every group. Each step of its
    training draws a rate p <= p_max, all equally likely, and trains the first ceil(p C) units alone. The strategy
    averages each coordinate over those who were sent it, by examples: that is the paper's mean by nested bands.
    Clients are evaluated at p_max. At a single rate of 1 this is the strategy alone, bit for bit.
    Deviations: all rates share the running statistics of batch normalisation, where the reproduction in Flower keeps
    some for each; statistics of channels that a client does not hold are the server's in its vote; and what travels is
    the width alone, where that reproduction sends the whole model.

    rates:   fractions of each group's units, falling; the rates of clients, and those that a step draws from.
    shares:  of each rate as p_max among clients, relative to their sum.
    assignment: "fixed" for the run, as in the paper, or "dynamic": clients are dealt to p_max anew in each round.
    distils: a step at p < p_max also teaches it the outputs at p_max (self-distillation, section 4.2).
    shrink:  train physically smaller models; if not, the whole one under masks.
    """

    rates: tuple[float, ...] = (1.0, 0.8, 0.6, 0.4, 0.2)
    shares: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    assignment: Assignment = "fixed"
    distils: bool = True
    shrink: bool = True

    def __post_init__(self) -> None:
        self.refuse_widths()

    def check(self, run: RunFacts) -> None:
        check_differences("fjord", run)
        if not any(counts_of(run.num_clients, self.shares)[:-1]):
            return  # each client has a single rate, and no step draws one
        if self.distils and run.objective == "regression":
            raise ConfigError(
                "pruner.distils is True and the data's objective is regression; outputs are taught as probabilities of "
                "classes: set it to false"
            )
        for name, policy in run.policies:
            if policy.looks_ahead:
                raise ConfigError(
                    f"{name} takes gradients beside the weights, and each step of pruner fjord trains another part of "
                    "them: leave one of the two out"
                )

    def held(self, structure: Structure, rate: float, ctx: Context) -> Kept:
        return window(structure, rate)

    def begin(self, message: Message, job: Job, memory: None, ctx: Context) -> tuple[Message, Job, None]:
        message, job, memory = super().begin(message, job, memory, ctx)
        assert ctx.structure is not None
        rates = [rate for rate in reversed(self.rates) if rate <= self.rate(ctx)]
        if len(rates) == 1:
            return message, job, memory
        held = Mask.full(job.params.layout) if job.mask is None else job.mask
        submodels = tuple(held & ctx.structure.mask(window(ctx.structure, rate)) for rate in rates)
        return message, replace(job, submodels=submodels, distils=self.distils, shrink=self.shrink), memory
