"""What policies share that keep tensors at the clients: which they are, and how they last from round to round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from fedray.errors import ConfigError
from fedray.round import Context, Fit, Job, Message, RunFacts, View, refuse
from fedray.tree import Layout, Tree

Kept = tuple[Tree | None, Tree | None]
"""The parameters and the buffers that a client keeps, all of them: policies that keep tensors beside each other share
the objects, so they cost one copy."""


class KeepsTensors:
    """A client's tensors last in its memory; a policy that names this before `Policy` adds which they are (`keeps`).

    The first round starts them from the model's initial values.
    """

    def begin(self, message: Message, job: Job, memory: Kept | None, ctx: Context) -> tuple[Message, Job, Kept | None]:
        return message, place(job, memory, ctx), memory

    def end(self, fit: Fit, message: Message, memory: Kept | None, ctx: Context) -> tuple[Fit, Message, Kept | None]:
        return fit, message, memory if fit.num_steps == 0 else (fit.local, fit.local_buffers)

    def view(self, view: View, memory: Kept | None, ctx: Context) -> View:
        return view if memory is None else replace(view, local=memory[0], local_buffers=memory[1])


def place(job: Job, memory: Kept | None, ctx: Context) -> Job:
    """The job with the kept tensors as they were after the last round, unless another keeper has seen to it."""
    assert ctx.job is not None
    if memory is None or job.local is not ctx.job.local or job.local_buffers is not ctx.job.local_buffers:
        return job
    return replace(job, local=memory[0], local_buffers=memory[1])


def check_steps(group: str, run: RunFacts) -> None:
    """Refuse a strategy whose clients stay where they are: what they keep would never be trained."""
    sent = [name for _, policy in run.policies for name in policy.parts(Layout((), ()), Layout((), ()))]
    if "delta" not in sent:
        raise ConfigError(
            f"{group} keeps tensors at clients; it needs a strategy whose clients take local steps and send part "
            "'delta': set strategy=fedavg"
        )


def refuse_head(layers: int, names: tuple[str, ...] | None) -> None:
    """Refuse values of the settings that say which tensors are the head."""
    refuse(layers < 1, "layers", layers, "it is a number of layers, counted from the last, at least 1")
    empty = "it is a list of patterns such as 'fc2.*', or null for the last `layers` layers"
    refuse(names is not None and not names, "names", names, empty)


def head(kinds: Mapping[str, str], buffers: Layout, layers: int, names: tuple[str, ...] | None) -> frozenset[str]:
    """Names of the parameters and buffers of the head.

    kinds:  of every trainable parameter, in layout order. layers: the head begins with the first tensor of this
            layer, counted from the last among those that have a weight matrix, and goes on to the end.
    names:  patterns (`fnmatch`) of parameters and buffers to take instead; None for none.
    """
    if names is not None:
        return frozenset(
            name for name in (*kinds, *buffers.names) if any(fnmatchcase(name, pattern) for pattern in names)
        )
    order = list(kinds)
    weights = [name for name in order if kinds[name] == "weight"]
    if len(weights) < layers:
        return frozenset()
    first = _module(weights[-layers])
    start = next(at for at, name in enumerate(order) if _module(name) == first)
    modules = {_module(name) for name in order[start:]}
    return frozenset(order[start:]) | {name for name in buffers.names if _module(name) in modules}


def check_head(group: str, run: RunFacts, layers: int, names: tuple[str, ...] | None) -> None:
    """Refuse bad company, and a head that is nothing or everything once the model is known."""
    check_steps(group, run)
    kinds = run.kinds
    if kinds is None:
        return
    found = head(kinds, Layout((), ()), layers, names)
    if found and found < set(kinds):
        return
    field, value = ("layers", layers) if names is None else ("names", list(names))
    how_many = "every parameter" if found else "no parameter"
    some = ", ".join(_shown(list(kinds)))
    refuse(True, field, value, f"that is {how_many} of this model, and a head is some of them: choose among {some}")


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _shown(names: list[str]) -> list[str]:
    return names if len(names) <= 12 else [*names[:4], "...", *names[-8:]]
