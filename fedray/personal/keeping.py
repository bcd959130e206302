"""What policies share that keep tensors at the clients: which they are, and how they last from round to round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from fedray.errors import ConfigError
from fedray.round import Context, Fit, Job, Message, RunFacts, View, refuse
from fedray.tree import Layout, Tree, put, take

Kept = tuple[Tree, Tree]
"""The parameters that a client keeps, all of them (policies that keep some beside each other share the object), and
the buffers of its layers."""


class KeepsTensors:
    """A client's tensors last in its memory; a policy that names this before `Policy` adds which they are (`keeps`).

    The first round starts them from the model's initial values.
    """

    def owns(self, local: Layout, buffers: Layout) -> list[str]:
        """Which of the buffers that stay with clients last: those of layers with a kept parameter."""
        layers = {_module(name) for name in local.names}
        return [name for name in buffers.names if _module(name) in layers]

    def begin(self, message: Message, job: Job, memory: Kept | None, ctx: Context) -> tuple[Message, Job, Kept | None]:
        return message, place(job, memory, ctx), memory

    def end(self, fit: Fit, message: Message, memory: Kept | None, ctx: Context) -> tuple[Fit, Message, Kept | None]:
        if fit.num_steps == 0:
            return fit, message, memory
        assert fit.local is not None
        assert fit.local_buffers is not None
        own = take(fit.local_buffers, self.owns(fit.local.layout, fit.local_buffers.layout))
        return fit, message, (fit.local, own)

    def view(self, view: View, memory: Kept | None, ctx: Context) -> View:
        if memory is None:
            return view
        assert view.local_buffers is not None
        return replace(view, local=memory[0], local_buffers=put(view.local_buffers, memory[1]))


def place(job: Job, memory: Kept | None, ctx: Context) -> Job:
    """The job with the kept tensors as they were after the last round, unless another keeper has seen to them."""
    if memory is None:
        return job
    assert ctx.job is not None
    assert job.local_buffers is not None
    local = memory[0] if job.local is ctx.job.local else job.local
    return replace(job, local=local, local_buffers=put(job.local_buffers, memory[1]))


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
    """Names of the parameters of the head, and of the buffers of their layers.

    kinds:  of every trainable parameter, in layout order. layers: the head begins with the first tensor of this
            layer, counted from the last among those that have a weight matrix, and goes on to the end.
    names:  patterns (`fnmatch`) of the parameters to take instead; None for none.
    """
    order = list(kinds)
    weights = [name for name in order if kinds[name] == "weight"]
    if names is not None:
        chosen = [name for name in order if any(fnmatchcase(name, pattern) for pattern in names)]
    elif len(weights) < layers:
        chosen = []
    else:
        first = _module(weights[-layers])
        chosen = order[next(at for at, name in enumerate(order) if _module(name) == first) :]
    modules = {_module(name) for name in chosen}
    return frozenset(chosen) | {name for name in buffers.names if _module(name) in modules}


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
