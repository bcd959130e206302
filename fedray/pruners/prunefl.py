"""PruneFL: the mask that learns most per second of a round, found at one client first and adapted as rounds pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

import torch

from fedray.pruners.by_time import Flops
from fedray.pruners.fields import moves, refuse_fields, warn_moves
from fedray.pruners.one_client import PrunesAtOneClient, squared
from fedray.round import Context, Fit, Job, Message, Part, PartSpec, Policy, RunFacts, Server, refuse
from fedray.sums import Sums
from fedray.tree import Layout, Mask, Tree, add

ONE = Layout(("num_seen",), ((1,),))


@final
@dataclass(frozen=True, kw_only=True)
class PruneFL(PrunesAtOneClient, Policy[Flops, Tree | None]):
    """PruneFL (Jiang et al. 2022, sections III and IV). How many weights stay is an outcome.

    Importance is the squared sum of a round's batch gradients, also where the mask cuts. A reconfiguration takes the
    smallest magnitudes of each tensor out and puts in, of all that are out, what learns most per second of a round: see
    `prune.search`. One client does so before the first round: see `pruners.one_client`. Then the server does, in round
    r if r % every == 0 and r < until, by what clients have added up since they last sent it, weighted by their
    examples; all of it is sent, for what is kept counts too and may be taken out. Nothing is sticky: weights return, at
    zero unless they are put back at once; a model that comes with a mask begins with it. Deviations from the authors'
    code (jiangyuang/PruneFL): a client that is not in the cohort keeps what it has added up, where theirs belongs to a
    place in the cohort; examples are those that a client has, not those that it stepped on.

    until: None for no end, as in the paper; what comes back in the last round of a run is never trained.
    The other settings are explained in `pruners.by_time` (removal to flops_per_second) and `pruners.one_client`.
    """

    cuts: ClassVar[Literal["none", "weights", "structures", "both"]] = "weights"

    every: int = 50
    until: int | None = None

    def __post_init__(self) -> None:
        refuse_fields(self)
        rule = "it is a round, 0 for the mask of the initial client alone, or null for no end"
        refuse(self.until is not None and self.until < 0, "until", self.until, rule)
        super().__post_init__()

    def warns(self, run: RunFacts) -> tuple[str, ...]:
        return warn_moves(self, run)

    def changes_masks(self, round: int) -> bool:
        return moves(self, round) or (round == 1 and self.initial_rounds > 0)

    def parts(self, params: Layout, buffers: Layout) -> Mapping[str, PartSpec]:
        layouts = {"importance": params, "num_seen": ONE}
        return {name: PartSpec(layout=layout, direction="up", lossy=False) for name, layout in layouts.items()}

    def init_server(self, server: Server, ctx: Context) -> tuple[Server, Flops]:
        return server if server.mask is not None else server.cut(Mask.full(server.params.layout)), dict(ctx.flops)

    def begin(self, message: Message, job: Job, memory: Tree | None, ctx: Context) -> tuple[Message, Job, Tree | None]:
        if self.until is not None and ctx.round >= self.until:
            return message, job, None
        return message, replace(job, wants=job.wants | {"grad_sum"}), memory

    def end(self, fit: Fit, message: Message, memory: Tree | None, ctx: Context) -> tuple[Fit, Message, Tree | None]:
        if self.until is not None and ctx.round >= self.until:
            return fit, message, None
        if fit.num_steps:
            square = squared(fit.evidence["grad_sum"])
            memory = square if memory is None else add(memory, square)
        if not moves(self, ctx.round) or memory is None:
            return fit, message, memory
        message = message.put("importance", Part(value=memory, weight=float(fit.num_examples)))
        return fit, message.put("num_seen", Part(value=Tree(ONE, torch.tensor([float(fit.num_seen)])))), None

    def settle(self, server: Server, sums: Sums, memory: Flops, ctx: Context) -> tuple[Server, Sums, Flops]:
        if not moves(self, ctx.round) or "importance" not in sums:
            return server, sums, memory
        assert server.mask is not None
        importance, seen = (sums.mean(name, otherwise=0.0) for name in ("importance", "num_seen"))
        mask = self.next_mask(server.params, server.mask, importance, memory, float(seen.flat), ctx.round, ctx)
        return server.cut(mask), sums, memory
