"""What strategies share: the model on its way down, the buffers both ways, and a client's vote."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from fedray.round import Fit, Job, Message, Part, PartSpec, Server
from fedray.sums import Sums
from fedray.tree import Layout, Tree, restrict

Weighting = Literal["examples", "uniform"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)


def model_specs(params: Layout, buffers: Layout) -> dict[str, PartSpec]:
    """`params` down, and `buffers` both ways if the model has any (batch-norm statistics)."""
    specs = {"params": PartSpec(layout=params, direction="down", absolute=True)}
    if not buffers.size:
        return specs
    # A running variance that a code turns negative or zero breaks the layer for good, and buffers are small.
    return specs | {"buffers": PartSpec(layout=buffers, direction="both", lossy=False, absolute=True)}


def send_model(server: Server, message: Message) -> Message:
    """The message with the server's parameters under its mask, and the buffers whole. A policy further in that sends
    each client a mask of its own has put it into the message: then the parameters are those under that one."""
    own = message.mask is not None
    mask = message.mask if own else server.mask
    params = restrict(server.params, mask) if own else server.params
    message = replace(message.put("params", Part(value=params, support=mask)), mask=mask)
    return put_buffers(message, server.buffers, weight=1.0)


def receive_model(message: Message, job: Job) -> Job:
    """The job that starts from the decoded message, under the mask that came with it."""
    buffers = message["buffers"] if "buffers" in message else job.buffers
    return replace(job, params=message["params"], buffers=buffers, mask=message.mask)


def put_buffers(message: Message, buffers: Tree, *, weight: float) -> Message:
    """Buffers travel as absolute values, never masked: a running mean of a pruned channel is still a mean.

    So a narrow client is sent those of the whole model, and sends as many.
    """
    return message.put("buffers", Part(value=buffers, weight=weight)) if buffers.layout.size else message


def settle_buffers(server: Server, sums: Sums) -> Server:
    """The server with the weighted mean of the buffers; its own where nobody sent any."""
    if "buffers" not in sums:
        return server
    return replace(server, buffers=sums.mean("buffers", otherwise=server.buffers))


def vote(fit: Fit, weight_by: Weighting) -> float:
    """A client's weight in the mean."""
    return float(fit.num_examples) if weight_by == "examples" else 1.0
