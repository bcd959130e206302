"""A task: a model with its loss, its metrics, and which of its tensors a pruner may cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.round import ABSENT_SHIFT, Loss
from fedray.tree import Layout, Tree

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
Kind = Literal["weight", "bias", "norm", "other"]
PLAIN = Loss()


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Which tensors are prunable, and so the denominator of `model/sparsity`.

    Weights of linear and convolutional layers always are, but for the first and last layer where switched off.
    """

    first_layer: bool = True
    last_layer: bool = True
    biases: bool = False
    norms: bool = False


def kinds(module: nn.Module) -> dict[str, Kind]:
    """The kind of each parameter by name, in the module's order.

    "weight": matrices and kernels of linear, convolutional, recurrent and attention layers, and of any other layer that
    calls one `weight`; embeddings and loose parameters are "other". A shared tensor is what its first owner
    makes of it.
    """
    found: dict[str, Kind] = {}
    for prefix, child in module.named_modules():
        for local, parameter in child.named_parameters(recurse=False):
            name = f"{prefix}.{local}" if prefix else local
            found[name] = _kind(child, local, parameter)
    return {name: found[name] for name in trainable(module)}


def _kind(owner: nn.Module, local: str, parameter: Tensor) -> Kind:
    if isinstance(owner, NORMS) or (parameter.dim() == 1 and "Norm" in type(owner).__name__):
        return "norm"
    if local.endswith("bias") or (isinstance(owner, (*RECURRENT, nn.MultiheadAttention)) and local.startswith("bias")):
        return "bias"
    if isinstance(owner, RECURRENT):
        return "weight"
    if isinstance(owner, nn.MultiheadAttention) and local.endswith("proj_weight"):
        return "weight"
    # By its name and shape, so that linear layers of other packages (Conv1D of transformers) count as well.
    if local == "weight" and parameter.dim() > 1 and not isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return "weight"
    return "other"


def prunable_names(module: nn.Module, scope: Scope) -> tuple[str, ...]:
    """Names of the prunable tensors in layout order."""
    by_kind = kinds(module)
    weights = [name for name, kind in by_kind.items() if kind == "weight"]
    left_out = set()
    if not scope.first_layer:
        left_out.update(weights[:1])
    if not scope.last_layer:
        left_out.update(weights[-1:])
    wanted = {"weight", *(["bias"] if scope.biases else []), *(["norm"] if scope.norms else [])}
    return tuple(name for name, kind in by_kind.items() if kind in wanted and name not in left_out)


class Objective(Protocol):
    """What a model is trained for.

    metrics: names of what `score` gives, the main one first; `larger_is_better` is about that one.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    larger_is_better: ClassVar[bool]

    def targets(self, count: int, num_outputs: int, sample_shape: tuple[int, ...]) -> Tensor:
        """Valid targets for `count` samples, to try a model with."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor, loss: Loss = PLAIN) -> Tensor:
        """The mean over the batch."""
        ...

    def score(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """Each metric per sample, float32 (batch,)."""
        ...

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        """Metrics that are a function of the means of others, such as the perplexity."""
        ...


@final
@dataclass(frozen=True)
class Classification:
    """Cross-entropy on logits (batch, num_classes), targets int64 (batch,)."""

    name: ClassVar[str] = "classification"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss")
    larger_is_better: ClassVar[bool] = True

    def targets(self, count: int, num_outputs: int, sample_shape: tuple[int, ...]) -> Tensor:  # noqa: ARG002
        return torch.arange(count) % num_outputs

    def loss(self, outputs: Tensor, targets: Tensor, loss: Loss = PLAIN) -> Tensor:
        return _cross_entropy(outputs, targets, loss)

    def score(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        return {
            "accuracy": (outputs.argmax(1) == targets).float(),
            "loss": F.cross_entropy(outputs, targets, reduction="none"),
        }

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:  # noqa: ARG002
        return {}


@final
@dataclass(frozen=True)
class Regression:
    """Mean squared error, outputs and targets float32 (batch, num_outputs)."""

    name: ClassVar[str] = "regression"
    metrics: ClassVar[tuple[str, ...]] = ("mse", "mae")
    larger_is_better: ClassVar[bool] = False

    def targets(self, count: int, num_outputs: int, sample_shape: tuple[int, ...]) -> Tensor:  # noqa: ARG002
        return torch.linspace(-1.0, 1.0, count * num_outputs).view(count, num_outputs)

    def loss(self, outputs: Tensor, targets: Tensor, loss: Loss = PLAIN) -> Tensor:  # noqa: ARG002
        return F.mse_loss(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        difference = outputs - targets
        return {"mse": difference.square().mean(1), "mae": difference.abs().mean(1)}

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:  # noqa: ARG002
        return {}


@final
@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token at every position: logits (batch, length, vocabulary), targets (batch, length).

    The main metric is the accuracy of the next token, as LEAF reports it; the perplexity is exp(mean loss).
    """

    name: ClassVar[str] = "next_token"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss")
    larger_is_better: ClassVar[bool] = True

    def targets(self, count: int, num_outputs: int, sample_shape: tuple[int, ...]) -> Tensor:
        length = sample_shape[0]
        return (torch.arange(count * length) % num_outputs).view(count, length)

    def loss(self, outputs: Tensor, targets: Tensor, loss: Loss = PLAIN) -> Tensor:
        return _cross_entropy(outputs.flatten(0, 1), targets.flatten(), loss)

    def score(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        each = F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")
        return {"accuracy": (outputs.argmax(2) == targets).float().mean(1), "loss": each.mean(1)}

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        return {"perplexity": math.exp(min(means["loss"], 700.0))}


def _cross_entropy(outputs: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    if loss.zeroed:
        outputs = outputs.index_fill(1, torch.tensor(loss.zeroed, device=outputs.device), 0.0)
    if loss.temperature != 1.0:
        outputs = outputs / loss.temperature
    if loss.logit_shift is None:
        return F.cross_entropy(outputs, targets, label_smoothing=loss.smoothing)
    shift = outputs.new_tensor(loss.logit_shift)
    logs = F.log_softmax(outputs - shift, 1)
    hit = F.nll_loss(logs, targets)
    if not loss.smoothing:
        return hit
    # Over the classes that take part alone: a share for one that is not there would pull its logit without end.
    present = shift < ABSENT_SHIFT
    spread = -torch.where(present, logs, 0.0).sum(1).mean() / present.sum().clamp(min=1)
    return (1 - loss.smoothing) * hit + loss.smoothing * spread


OBJECTIVES: Mapping[str, Objective] = {kind.name: kind() for kind in (Classification, Regression, NextToken)}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model and what it is trained for.

    build: makes the module; called once in each process, its random initialisation is drawn under a key. Parameters
           that do not require a gradient are constants: they are neither trained nor sent nor pruned.
    """

    build: Callable[[], nn.Module]
    scope: Scope = Scope()
    objective: Objective = Classification()

    @property
    def metrics(self) -> tuple[str, ...]:
        return self.objective.metrics

    def module(self, key: Key) -> nn.Module:
        """A module with the initial parameters that belong to this key; the global generator is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key.seed)
            module = self.build()
        if not isinstance(module, nn.Module):
            raise ConfigError(f"model._target_ made a {type(module).__name__}; it must make a torch.nn.Module")
        if not trainable(module):
            raise ConfigError(f"the model {type(module).__name__} has no parameters to train")
        return module

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over the batch."""
        return self.objective.loss(outputs, targets)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name in the module's order; the others are constants."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def constants(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that nothing moves (a frozen backbone), by name."""
    return {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}


def params_of(module: nn.Module) -> Tree:
    """A copy of the parameters in the module's order."""
    return Tree.of(dict(trainable(module)))


def buffers_of(module: nn.Module) -> Tree:
    """A copy of the floating-point buffers (running statistics); counters of integers stay at the client."""
    return Tree.of(float_buffers(module))


def float_buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}


def layouts(module: nn.Module) -> tuple[Layout, Layout]:
    """Of the parameters and of the floating-point buffers."""
    return Layout.of(dict(trainable(module))), Layout.of(float_buffers(module))
