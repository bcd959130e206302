"""What strategies share whose clients train for a while and send what changed: all but the server's step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Generic, Literal, TypeVar, get_args

import torch

from fedray import tree
from fedray.round import Context, Fit, Job, Message, Part, PartSpec, Server
from fedray.strategies.model_parts import model_specs, put_buffers, receive_model, send_model, settle_buffers
from fedray.sums import Sums
from fedray.tree import Layout, Tree

M = TypeVar("M")
C = TypeVar("C")
Average = Literal["holders", "all"]
"""Over whom a coordinate is averaged: the clients that vouch for it, or all that answered, where the others count as
no difference."""
AVERAGES: tuple[str, ...] = get_args(Average)
VOTES = "votes"
ONE = Layout((VOTES,), ((),))


class SendsDifferences(ABC, Generic[M, C]):
    """The model down, a weighted difference up in part "delta", buffers both ways.

    A policy that names this before `Policy` among its bases adds how much a client counts (`weight`) and what the
    server makes of the sum (`step`). Each coordinate is averaged over the clients that vouch for it; buffers are
    averaged as values.
    """

    @abstractmethod
    def weight(self, fit: Fit) -> float:
        """A client's weight in the mean, above 0."""

    @abstractmethod
    def step(self, server: Server, sums: Sums, memory: M, ctx: Context) -> tuple[Tree, M]:
        """The server's parameters after the step, and its memory; called where somebody sent a difference."""

    def parts(self, params: Layout, buffers: Layout) -> Mapping[str, PartSpec]:
        return {**model_specs(params, buffers), "delta": PartSpec(layout=params, direction="up")}

    def send(self, server: Server, message: Message, memory: M, ctx: Context) -> Message:
        return send_model(server, message)

    def begin(self, message: Message, job: Job, memory: C, ctx: Context) -> tuple[Message, Job, C]:
        return message, receive_model(message, job), memory

    def end(self, fit: Fit, message: Message, memory: C, ctx: Context) -> tuple[Fit, Message, C]:
        return fit, self.upload(fit, message, difference(fit)), memory

    def upload(self, fit: Fit, message: Message, delta: Tree) -> Message:
        """The message with a difference and the buffers, under the mask of the fit."""
        weight = self.weight(fit)
        message = message.put("delta", Part(value=delta, weight=weight, support=fit.mask))
        return put_buffers(replace(message, mask=fit.mask), fit.buffers, weight=weight)

    def settle(self, server: Server, sums: Sums, memory: M, ctx: Context) -> tuple[Server, Sums, M]:
        if "delta" not in sums:
            return server, sums, memory
        params, memory = self.step(server, sums, memory, ctx)
        return settle_buffers(replace(server, params=params), sums), sums, memory


def votes_spec(average: Average) -> dict[str, PartSpec]:
    """The part that says how much all clients count, where a mean over all of them needs it: nobody vouches for
    everything that others vouch for, so the weights of differences do not tell."""
    return {VOTES: PartSpec(layout=ONE, direction="up", lossy=False)} if average == "all" else {}


def put_vote(message: Message, average: Average, *, weight: float) -> Message:
    """The message with this client's vote, where the mean needs it."""
    if average == "holders":
        return message
    return message.put(VOTES, Part(value=Tree(ONE, torch.ones(1)), weight=weight))


def mean_difference(sums: Sums, average: Average) -> Tree:
    """The weighted mean of the differences by coordinate, zero where nobody vouches; in any order the same bits.

    Over all it is the mean over holders times their share of the weight, which is exactly 1 where all are holders.
    """
    mean = sums.mean("delta", otherwise=0.0)
    if average == "holders":
        return mean
    return Tree(mean.layout, mean.flat * (sums.weight("delta") / sums.weight(VOTES)))


def difference(fit: Fit) -> Tree:
    """What training changed, against what was received, so that a lossy download changes nothing here; and only
    where the client vouches, for a weight that it dropped is no difference to average."""
    return tree.restrict(tree.sub(fit.params, fit.received["params"]), fit.mask)
