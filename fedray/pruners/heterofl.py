"""HeteroFL: clients of different capacity train nested widths of one model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch

from fedray.errors import ConfigError
from fedray.prune.structure import Kept, Structure
from fedray.prune.widths import owned_outputs, window
from fedray.pruners.by_capacity import Assignment, TrainsWidths
from fedray.pruners.own_masks import check_differences
from fedray.round import Context, Fit, Job, Message, Policy, RunFacts


@final
@dataclass(frozen=True, kw_only=True)
class HeteroFL(TrainsWidths, Policy[None, None]):
    """Heterogeneous federated learning by nested widths (Diao et al. 2021, section 3, algorithm 1).

    A client with rate r holds the first ceil(r C) of the C units of every group, and all outputs. The strategy
    averages each coordinate over those who hold it; where nobody does, the server's value stays. The paper's mean
    counts clients equally (strategy.weight_by=uniform), its batch normalisation is batch_norm=static.
    At rates of 1, without scaler, masked loss and own labels, this is the strategy alone, bit for bit.
    Deviations from the authors' code (diaoenmao/HeteroFL): shares are exact counts of clients, also where they are
    dealt anew, and not drawn for each; what is averaged are differences from what was sent; the masked loss is that of
    training alone, where theirs masks local tests too; under batch_norm=average, a client votes for the server's
    statistics of channels that it does not hold.

    rates:  fractions of each group's units, falling: the levels a, b, c, d and e of the paper are 1 to 0.0625.
    shares: of each rate among clients, relative to their sum. assignment: "fixed" for the run, "dynamic" each round.
    scaler: divide the outputs of hidden layers by the client's rate in training, as in the paper; for models that
            normalise them, with batch_norm=static if by batches, for it changes running statistics.
    masked_loss: replace logits of classes that a client has no example of by 0 in its training.
    own_labels:  send the model's outputs (rows of the last layer) only of classes that a client has; the others stay
                 as they were. The mask that says so costs bytes, and tells the server which classes a client has. Rows
                 that are not sent count as removed in the sparsity of clients, which is that of what they sent.
    shrink: train the physically smaller model; if not, the whole one under a mask.
    """

    rates: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125, 0.0625)
    shares: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    assignment: Assignment = "fixed"
    scaler: bool = False
    masked_loss: bool = True
    own_labels: bool = True
    shrink: bool = True

    def __post_init__(self) -> None:
        self.refuse_widths()

    def check(self, run: RunFacts) -> None:
        check_differences("heterofl", run)
        if (self.masked_loss or self.own_labels) and run.objective not in (None, "classification"):
            raise ConfigError(
                f"pruner is heterofl and the data's objective is {run.objective}; pruner.masked_loss and "
                "pruner.own_labels go by the classes of examples: set both to false"
            )
        recomputed = any(policy.recomputes_statistics for _, policy in run.policies)
        if self.scaler and run.has_statistics and not recomputed:
            raise ConfigError(
                "pruner.scaler is True; running statistics of batch normalisation would be those of outputs 1 / rate "
                "times as large as in evaluation: set batch_norm=static, or pruner.scaler=false"
            )

    def warns(self, run: RunFacts) -> tuple[str, ...]:
        dealt = super().warns(run)
        if not self.scaler or run.kinds is None or "norm" in run.kinds.values():
            return dealt
        return (
            *dealt,
            "pruner.scaler is True and this model normalises nothing: each hidden layer of a client with rate r makes "
            "its outputs 1 / r times as large; take a model with batch normalisation, or pruner.scaler=false",
        )

    def held(self, structure: Structure, rate: float, ctx: Context) -> Kept:
        return window(structure, rate)

    def begin(self, message: Message, job: Job, memory: None, ctx: Context) -> tuple[Message, Job, None]:
        message, job, memory = super().begin(message, job, memory, ctx)
        assert ctx.client is not None
        if self.scaler:
            job = replace(job, scaler=self.rate(ctx))
        if self.masked_loss:
            zeroed = tuple(label for label, count in enumerate(ctx.client.label_counts) if not count)
            job = replace(job, loss=replace(job.loss, zeroed=zeroed))
        return message, job, memory

    def end(self, fit: Fit, message: Message, memory: None, ctx: Context) -> tuple[Fit, Message, None]:
        fit, message, memory = super().end(fit, message, memory, ctx)
        assert ctx.client is not None
        assert ctx.structure is not None
        if self.own_labels and 0 in ctx.client.label_counts:
            mask = owned_outputs(ctx.structure, torch.tensor(ctx.client.label_counts) > 0)
            fit = fit.cut(mask if fit.mask is None else mask & fit.mask)
        return fit, message, memory
