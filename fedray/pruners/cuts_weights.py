"""What pruners share by which the server cuts single weights of the averaged model at certain rounds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar, Literal

from fedray.round import Context, Job, Message, Server
from fedray.sums import Sums
from fedray.tree import Mask


class CutsWeights(ABC):
    """Events, and what clients train in the rounds that end with one.

    A policy that names this before `Policy` adds when events are (`changes_masks`) and what one keeps (`chosen`), and
    has this field:

    sticky: what is pruned stays pruned: each mask lies within the one before. Otherwise clients train densely in a
            round that ends with an event, their upload is dense too, and pruned weights compete again.
    """

    cuts: ClassVar[Literal["none", "weights", "structures", "both"]] = "weights"
    regrown: ClassVar[Literal["zero", "held"]] = "held"

    sticky: bool

    @abstractmethod
    def changes_masks(self, round: int) -> bool:
        """Whether this round ends with an event; round 0 prunes the initial weights."""

    @abstractmethod
    def chosen(self, server: Server, within: Mask | None, ctx: Context) -> Mask:
        """What an event keeps. within: only these coordinates may be kept; None for all."""

    def init_server(self, server: Server, ctx: Context) -> tuple[Server, None]:
        return self._prune(server, ctx), None

    def begin(self, message: Message, job: Job, memory: None, ctx: Context) -> tuple[Message, Job, None]:
        return message, job if self.sticky or not self.changes_masks(ctx.round) else replace(job, mask=None), memory

    def settle(self, server: Server, sums: Sums, memory: None, ctx: Context) -> tuple[Server, Sums, None]:
        return self._prune(server, ctx), sums, memory

    def _prune(self, server: Server, ctx: Context) -> Server:
        if not self.changes_masks(ctx.round):
            return server
        # Before any training nothing has grown where a model that comes with a mask has zeros.
        within = server.mask if self.sticky or ctx.round == 0 else None
        return server.cut(self.chosen(server, within, ctx))
