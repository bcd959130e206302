"""What pruners share that give each client a narrow version of the model, by its capacity."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from itertools import pairwise
from typing import ClassVar, Literal

from fedray.prune.structure import Kept, Structure
from fedray.prune.widths import assigned, held_buffers, warnings_of
from fedray.round import Context, Fit, Job, Message, RunFacts, Server, View, refuse
from fedray.tree import Mask, restrict

Assignment = Literal["fixed", "dynamic"]


class TrainsWidths(ABC):
    """Clients are sent, train and are evaluated on the units that they hold; the server's model stays as it started,
    whole or under the mask of the run that it comes from, which is theirs too.

    A policy that names this before `Policy` adds which units a rate holds (`held`), and reads its fields from here:

    rates:  fractions of each group's units, from the largest to the smallest, in (0, 1].
    shares: of each rate among clients, relative to their sum; clients are dealt to rates in exact counts.
    assignment: "fixed" deals once, "dynamic" anew in each round. It is a pure function of the run's key.
    shrink: train the physically smaller model; if not, the whole model under a mask. The same but for rounding.
    """

    cuts: ClassVar[Literal["none", "weights", "structures", "both"]] = "structures"
    sends_each: ClassVar[bool] = True
    regrown: ClassVar[Literal["zero", "held"]] = "held"

    rates: tuple[float, ...]
    shares: tuple[float, ...]
    assignment: Assignment
    shrink: bool

    @abstractmethod
    def held(self, structure: Structure, rate: float, ctx: Context) -> Kept:
        """Which units of each group a client with this rate holds in this round."""

    def refuse_widths(self) -> None:
        """Refuse values of the fields that are named above; a list, as from a file, becomes a tuple."""
        rates, shares = tuple(self.rates), tuple(self.shares)
        for field, value in (("rates", rates), ("shares", shares)):
            object.__setattr__(self, field, value)
        falling = all(a > b for a, b in pairwise(rates)) and bool(rates)
        good = falling and 0.0 < rates[-1] and rates[0] <= 1.0
        refuse(not good, "rates", rates, "they fall from at most 1 to above 0, such as [1.0, 0.5, 0.25]")
        fits = len(shares) == len(rates) and min(shares) >= 0.0 and 0.0 < sum(shares) < float("inf")
        rule = f"it has one number for each of the {len(rates)} rates, none below 0 and not all 0"
        refuse(not fits, "shares", shares, rule)
        refuse(self.assignment not in ("fixed", "dynamic"), "assignment", self.assignment, "choose fixed or dynamic")

    def warns(self, run: RunFacts) -> tuple[str, ...]:
        return warnings_of(self.rates, self.shares, run.num_clients)

    def changes_masks(self, round: int) -> bool | None:
        return round > 0 and self.assignment == "dynamic" and len(set(self.rates)) > 1

    def rate(self, ctx: Context) -> float:
        """The rate of the client whose turn it is."""
        assert ctx.client is not None
        key = ctx.run_key.fold("widths")
        key = key.fold("round", ctx.round) if self.assignment == "dynamic" else key
        return self.rates[assigned(key, ctx.num_clients, self.shares)[ctx.client.id]]

    def kept(self, ctx: Context) -> Kept | None:
        """The units of the client whose turn it is; None for all."""
        assert ctx.structure is not None
        rate = self.rate(ctx)
        return None if rate == 1.0 else self.held(ctx.structure, rate, ctx)

    def mask(self, ctx: Context, among: Mask | None) -> Mask | None:
        """Of these coordinates (None for all) those of the client whose turn it is; `among` itself where it has all."""
        kept = self.kept(ctx)
        if kept is None:
            return among
        assert ctx.structure is not None
        own = ctx.structure.mask(kept)
        return own if among is None else own & among

    def send(self, server: Server, message: Message, memory: None, ctx: Context) -> Message:
        mask = self.mask(ctx, server.mask)
        return message if mask is server.mask else replace(message, mask=mask)

    def begin(self, message: Message, job: Job, memory: None, ctx: Context) -> tuple[Message, Job, None]:
        return message, replace(job, shrink=self.shrink and job.mask is not None), memory

    def end(self, fit: Fit, message: Message, memory: None, ctx: Context) -> tuple[Fit, Message, None]:
        # Statistics of channels that a client does not hold are those of no data: it votes for the server's own.
        kept = self.kept(ctx)
        if kept is not None and "buffers" in fit.received:
            assert ctx.structure is not None
            buffers = held_buffers(ctx.structure, kept, fit.buffers, fit.received["buffers"])
            fit = replace(fit, buffers=buffers)
        return fit, message, memory

    def view(self, view: View, memory: None, ctx: Context) -> View:
        mask = self.mask(ctx, view.mask)
        return view if mask is view.mask else replace(view, params=restrict(view.params, mask), mask=mask)
