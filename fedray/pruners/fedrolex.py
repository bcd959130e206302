"""FedRolex: clients of different capacity train a window of the model that rolls from round to round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from fedray.prune.structure import Kept, Structure
from fedray.prune.widths import warnings_of, window
from fedray.pruners.by_capacity import Assignment, TrainsWidths
from fedray.pruners.own_masks import check_differences
from fedray.round import Context, Policy, RunFacts, refuse


@final
@dataclass(frozen=True, kw_only=True)
class FedRolex(TrainsWidths, Policy[None, None]):
    """Rolling sub-model extraction (Alam et al. 2022, section 3, algorithm 1).

    In round t = 1, 2, ... a client with rate r holds the ceil(r C) units of every group of C that follow unit
    (t - 1) * shift modulo C, past the last comes the first; and all outputs. So after C rounds at a shift of 1 each
    unit was held equally often, though no client may hold the whole. Coupled units, such as the channels of residual
    connections, are one group with one window. The strategy averages each coordinate over those who held it.
    Deviations from the authors' code (AIoT-MLSys-Lab/FedRolex): windows of coupled layers agree; every kind of tensor
    is averaged by the same weights; shares are exact counts of clients, also where they are dealt anew; a client votes
    for the server's statistics of channels that it does not hold; and there is neither scaler nor masked loss, which
    the authors took over from HeteroFL.

    rates:  fractions of each group's units, falling. shares: of each among clients, relative to their sum.
    assignment: "fixed" for the run, "dynamic" deals clients to rates anew in each round.
    shift:  how many units the window moves in a round, at least 0; at 0 windows are prefixes, as in HeteroFL.
    shrink: train the physically smaller model; if not, the whole one under a mask.
    """

    rates: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125, 0.0625)
    shares: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    assignment: Assignment = "fixed"
    shift: int = 1
    shrink: bool = True

    def __post_init__(self) -> None:
        self.refuse_widths()
        refuse(self.shift < 0, "shift", self.shift, "it is a number of units, at least 0")

    def check(self, run: RunFacts) -> None:
        check_differences("fedrolex", run)

    def warns(self, run: RunFacts) -> tuple[str, ...]:
        return warnings_of(self.rates, self.shares, run.num_clients, rolls=self.shift > 0)

    def changes_masks(self, round: int) -> bool | None:
        narrow = any(rate < 1.0 and share > 0.0 for rate, share in zip(self.rates, self.shares, strict=True))
        return super().changes_masks(round) or (round > 1 and self.shift > 0 and narrow)

    def held(self, structure: Structure, rate: float, ctx: Context) -> Kept:
        # The set-up is round 0; the first window is a prefix.
        return window(structure, rate, max(ctx.round - 1, 0) * self.shift)
