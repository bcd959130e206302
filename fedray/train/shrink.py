"""A job on a smaller model, the fit that comes back from it, and steps on submodels.

The smaller model has of each tensor the positions that `Slices` says. What is not in it stays zero (parameters and
evidence) or as it was received (buffers).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedray.errors import ConfigError
from fedray.models.structure import shrunk
from fedray.models.task import LAYERS, Task
from fedray.prune.structure import Slices
from fedray.round import Fit, Job, Loss
from fedray.tree import Layout, Mask, Tree

if TYPE_CHECKING:
    from fedray.train.engine import Engine


def smaller_task(task: Task, module: nn.Module, slices: Slices) -> Task:
    """The task whose module is what `slices` leaves of this one."""
    return replace(task, build=lambda: shrunk(module, slices))


def hidden_tensors(module: nn.Module) -> frozenset[str]:
    """Names of weights and biases of all linear and convolutional layers but the last.

    To divide them divides the layers' outputs. Raises ConfigError where it would divide more, or cannot be done.
    """
    layers = [child for child in module.modules() if isinstance(child, LAYERS)][:-1]
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = [parameter for layer in layers for parameter in layer.parameters(recurse=False)]
    owners = [id(p) for child in module.modules() for p in child.parameters(recurse=False)]
    for parameter in found:
        if owners.count(id(parameter)) > 1 or not parameter.requires_grad:
            raise ConfigError(
                f"a job divides the outputs of hidden layers by a scaler, and {names[id(parameter)]} is constant or "
                "shared with another layer; switch the scaler off, as in pruner.scaler=false"
            )
    return frozenset(names[id(parameter)] for parameter in found)


def smaller_job(job: Job, slices: Slices) -> Job:
    """The same job on what `slices` leaves of every tensor. `submodels` are left to the caller."""
    mask = None if job.mask is None else slices.take_mask(job.mask)
    if mask is not None and bool(mask.flat.all()):
        mask = None
    return replace(
        job,
        params=slices.take(job.params),
        buffers=slices.take(job.buffers),
        mask=mask,
        local=_taken(slices, job.local),
        local_buffers=_taken(slices, job.local_buffers),
        drift=_taken(slices, job.drift),
        anchor=_taken(slices, job.anchor),
    )


def larger_fit(fit: Fit, job: Job, slices: Slices) -> Fit:
    """The fit of `job` from that of its smaller one."""
    evidence = {name: slices.put(Tree.zeros(job.params.layout), tree) for name, tree in fit.evidence.items()}
    return replace(
        fit,
        params=slices.put(Tree.zeros(job.params.layout), fit.params),
        buffers=slices.put(job.buffers, fit.buffers),
        local=_put(slices, job.local, fit.local),
        local_buffers=_put(slices, job.local_buffers, fit.local_buffers),
        mask=job.mask,
        evidence=evidence,
    )


def _taken(slices: Slices, tree: Tree | None) -> Tree | None:
    return None if tree is None else slices.take(tree)


def _put(slices: Slices, base: Tree | None, small: Tree | None) -> Tree | None:
    return base if base is None or small is None else slices.put(base, small)


@dataclass(frozen=True)
class Submodel:
    """A part of an engine's model, at the engine's weights.

    outer:  the engine that the part belongs to. engine: what computes, that of the smaller model or `outer` itself.
    places: where the weights of `engine` lie among those of `outer`, int64; None if it is `outer`.
    within: which weights of `outer` belong to the part, 1.0 or 0.0; None for all.
    inner:  the same of the weights of `engine`.
    statistics: where the running statistics of the part lie among those of `outer`, int64.
    """

    outer: Engine
    engine: Engine
    places: Tensor | None
    within: Tensor | None
    inner: Tensor | None
    statistics: Tensor

    @classmethod
    def of(
        cls, outer: Engine, held: Slices | None, engine: Engine, slices: Slices | None, mask: Mask, buffers: Layout
    ) -> Submodel:
        """mask: of the part, over the whole model. held, slices: what `outer` and the part have of the whole model;
        None for all of it. buffers: of the whole model. `engine` has `slices`, or is `outer`."""
        within = _flags(outer, held, mask)
        statistics = torch.searchsorted(_positions(held, buffers), _positions(slices, buffers)).to(outer.device)
        if engine is outer:
            return cls(outer, engine, None, within, within, statistics)
        places = torch.searchsorted(_positions(held, mask.layout), _positions(slices, mask.layout))
        # From logical order to that of the working buffers, on both sides.
        order = outer.arrangement.arranged(torch.arange(outer.params_layout.size))
        lies = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
        own = engine.arrangement.arranged(places)
        return cls(outer, engine, lies[own], within, _flags(engine, slices, mask), statistics)

    def gradient(self, x: Tensor, y: Tensor, loss: Loss) -> Tensor:
        """Fill the gradient of `outer`, zero outside the part; returns the mean loss."""
        with self.lent():
            value = self.engine.gradient(x, y, loss)
        self._hand_over()
        return value

    def teach(self, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """As `gradient`, and the outputs."""
        engine = self.engine
        with self.lent(), engine.rescaled():
            engine.grads.zero_()
            outputs = engine.module(x)
            value: Tensor = engine.task.objective.loss(outputs, y, loss)
            value.backward()  # type: ignore[no-untyped-call]
        self._hand_over()
        return value.detach(), outputs.detach()

    def learn(self, x: Tensor, outputs: Tensor) -> Tensor:
        """Add the gradient of the cross-entropy with the softmax of a teacher's outputs to that of `outer`; returns the
        mean loss. Running statistics stay."""
        outer, engine = self.outer, self.engine
        before = outer.grads.clone() if self.places is None else None
        with self.lent(counts=False), engine.rescaled():
            engine.grads.zero_()
            logs = F.log_softmax(engine.module(x), -1)
            value = -(outputs.softmax(-1) * logs).sum(-1).mean()
            value.backward()  # type: ignore[no-untyped-call]
        if self.inner is not None:
            engine.grads.mul_(self.inner)
        if self.places is not None:
            outer.grads.index_add_(0, self.places, engine.grads)
        elif before is not None:
            outer.grads.add_(before)
        return value.detach()

    @contextmanager
    def lent(self, *, counts: bool = True) -> Iterator[None]:
        """Inside, `engine` has the weights of the part and its running statistics. counts: whether these move."""
        outer, engine = self.outer, self.engine
        statistics = outer.buffers_flat() if outer.has_buffers else None
        here = outer.weights.clone() if self.places is None and self.inner is not None else None
        if self.places is not None:
            torch.index_select(outer.weights, 0, self.places, out=engine.weights)
            if statistics is not None:
                engine.set_buffers(statistics[self.statistics])
        if self.inner is not None:
            engine.weights.mul_(self.inner)
        yield
        if here is not None:
            outer.weights.copy_(here)
        if statistics is not None:
            if counts:
                moved = engine.buffers_flat()
                statistics[self.statistics] = moved if self.places is not None else moved[self.statistics]
            outer.set_buffers(statistics)

    def _hand_over(self) -> None:
        """The gradient of `engine` to `outer`."""
        if self.inner is not None:
            self.engine.grads.mul_(self.inner)
        if self.places is not None:
            self.outer.grads.zero_().index_copy_(0, self.places, self.engine.grads)


def part_job(job: Job, mask: Mask, slices: Slices) -> Job:
    """What a step of `job` on a part of the model is on a model that has nothing else. mask: of the part."""
    anchor = job.anchor if job.anchor is not None or not job.prox else job.params
    return smaller_job(replace(job, mask=mask, anchor=anchor, submodels=(), distils=False), slices)


def _flags(engine: Engine, slices: Slices | None, mask: Mask) -> Tensor | None:
    """Which weights of an engine that has `slices` of the whole model a mask keeps, 1.0 or 0.0; None for all."""
    inside = mask if slices is None else slices.take_mask(mask)
    return None if bool(inside.flat.all()) else engine.arrangement.arranged(inside.flat.float())


def _positions(slices: Slices | None, whole: Layout) -> Tensor:
    return torch.arange(whole.size) if slices is None else slices.positions(whole)
