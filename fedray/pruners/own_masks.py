"""What pruners share whose clients have masks of their own: how such a mask travels and lasts, and what it needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from fedray.errors import ConfigError
from fedray.prune.unit_scores import read_by
from fedray.round import Context, Message, Policy, RunFacts, Server, View
from fedray.tree import Layout, Mask, restrict


class OwnMask:
    """A client's mask lasts in its memory, None while nothing is cut; a policy names this before `Policy`.

    The server has no mask and keeps every weight. A client is sent the weights on the mask that it last sent, so a
    download brings no mask, and it runs the server's weights under its own. What the server makes of differences that
    cover different coordinates is the strategy's affair (`strategy.average`).
    """

    sends_each: ClassVar[bool] = True

    def send(self, server: Server, message: Message, memory: None, ctx: Context) -> Message:
        return message if ctx.known is None else replace(message, mask=ctx.known)

    def view(self, view: View, memory: Mask | None, ctx: Context) -> View:
        return view if memory is None else replace(view, params=restrict(view.params, memory), mask=memory)


def check_differences(pruner: str, run: RunFacts) -> None:
    """Refuse a strategy without part "delta": masks may differ in that one."""
    none = Layout((), ())
    if not any("delta" in policy.parts(none, none) for _, policy in run.policies):
        raise ConfigError(
            f"pruner is {pruner}; it needs a strategy that sends part 'delta', in which each client has a mask of its "
            "own: set strategy=fedavg"
        )


def check_gate(pruner: str, run: RunFacts) -> None:
    """Refuse a run in which a client cannot tell how accurate its model is: it must look at data that it neither
    trains on nor is tested on, with all of the model at hand."""
    if not run.validation:
        raise ConfigError(
            f"validation is {run.validation:g}; pruner {pruner} prunes where a client's model is accurate on a part of "
            "its training data that is set apart for it: set validation above 0, such as validation=0.2"
        )
    if run.objective == "regression":
        raise ConfigError(
            f"pruner is {pruner}; it asks for an accuracy, and these data have numbers for labels: use data with "
            "classes, or another pruner"
        )
    for name, policy in run.policies:
        if policy.recomputes_statistics or _keeps_weights(policy, run):
            raise ConfigError(
                f"{name} keeps tensors at the clients; pruner {pruner} looks at the model before they are in their "
                "place, and would judge another one: leave one of the two out (batch_norm=affine, which keeps running "
                "statistics alone, may stay)"
            )
    if run.unjudged:
        others = f", like {len(run.unjudged) - 1} others," if len(run.unjudged) > 1 else ""
        raise ConfigError(
            f"client {run.unjudged[0]}{others} has one training example, so nothing can be set apart of it; pruner "
            f"{pruner} prunes where a client's model is accurate on such data: give each client two or more, as with "
            "partition.min_size=2, or take another pruner"
        )


SOME_KINDS = {"norm.weight": "norm", "norm.bias": "norm", "fc.weight": "weight", "fc.bias": "bias"}


def _keeps_weights(policy: Policy[Any, Any], run: RunFacts) -> bool:
    """Whether a policy keeps more at clients than running statistics, which decide nothing in training."""
    if type(policy).keeps is Policy.keeps:
        return False
    by_kind = SOME_KINDS if run.kinds is None else run.kinds
    layers = dict.fromkeys(name.rpartition(".")[0] for name, kind in by_kind.items() if kind == "norm")
    names = tuple(f"{layer}.{local}" for layer in layers for local in ("running_mean", "running_var"))
    return not policy.keeps(by_kind, Layout(names, ((1,),) * len(names))) <= set(names)


def check_steps(pruner: str, run: RunFacts) -> None:
    """Refuse what takes a client's difference for the way of its steps, where a client is set back on the way."""
    none = Layout((), ())
    for name, policy in run.policies:
        if {"control", "effective_steps"} & set(policy.parts(none, none)):
            raise ConfigError(
                f"{name} is {type(policy).__name__}; it divides a client's difference by its steps, and pruner "
                f"{pruner} sets clients back to the initial weights without one: set strategy=fedavg and leave out "
                "correction=scaffold"
            )


def check_epochs(pruner: str, run: RunFacts) -> None:
    """Refuse local training that has no first and last epoch to compare."""
    if run.epochs is None or run.epochs < 2:
        value = f"trainer.steps is {run.steps}" if run.epochs is None else f"trainer.epochs is {run.epochs:g}"
        raise ConfigError(
            f"{value}; pruner {pruner} compares masks after the first local epoch and after the last: set "
            "trainer.steps=null and trainer.epochs to at least 2 (the authors have 5)"
        )


def check_scales(pruner: str, run: RunFacts) -> None:
    """Refuse a model whose channels have no scales to be ranked by."""
    lack = "this model has none" if run.has_statistics is False else None
    if run.structure is not None:
        filters = [group for group in run.structure.groups if group.kind == "filter"]
        bare = [group.name for group in filters if not read_by("norm_scale", group, run.structure.layout)]
        lack = f"the channels of {bare[0]} have none" if bare else lack if filters else "no channels here can be cut"
    if lack is not None:
        raise ConfigError(
            f"pruner is {pruner}; it ranks channels by the scales of batch normalisation, and {lack}: set "
            "model=batchnorm_cnn, or pruner=subfedavg"
        )
