"""A task: a model with its loss, its metrics, and which of its tensors a pruner may cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.tree import Layout, Tree

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
Kind = Literal["weight", "bias", "norm", "other"]


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
    """The kind of each parameter by name, in the module's order."""
    found: dict[str, Kind] = {}
    for prefix, child in module.named_modules():
        for local, _ in child.named_parameters(recurse=False):
            name = f"{prefix}.{local}" if prefix else local
            if isinstance(child, NORMS):
                found[name] = "norm"
            elif local.endswith("bias"):
                found[name] = "bias"
            elif isinstance(child, LAYERS) and local == "weight":
                found[name] = "weight"
            else:
                found[name] = "other"
    return {name: found[name] for name, _ in module.named_parameters()}


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


@dataclass(frozen=True, kw_only=True)
class Task:
    """Classification: cross-entropy on logits, accuracy.

    build: makes the module; called once in each process, its random initialisation is drawn under a key.
    """

    build: Callable[[], nn.Module]
    scope: Scope = Scope()
    metrics: tuple[str, ...] = ("accuracy", "loss")

    def module(self, key: Key) -> nn.Module:
        """A module with the initial parameters that belong to this key; the global generator is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key.seed)
            module = self.build()
        if not isinstance(module, nn.Module):
            raise ConfigError(f"model._target_ made a {type(module).__name__}; it must make a torch.nn.Module")
        if not list(module.parameters()):
            raise ConfigError(f"the model {type(module).__name__} has no parameters to train")
        return module

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over the batch; outputs (batch, num_classes), targets int64 (batch,)."""
        return F.cross_entropy(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """Each metric per sample, float32 (batch,)."""
        return {
            "accuracy": (outputs.argmax(1) == targets).float(),
            "loss": F.cross_entropy(outputs, targets, reduction="none"),
        }


def params_of(module: nn.Module) -> Tree:
    """A copy of the parameters in the module's order."""
    return Tree.of(dict(module.named_parameters()))


def buffers_of(module: nn.Module) -> Tree:
    """A copy of the floating-point buffers (running statistics); counters of integers stay at the client."""
    return Tree.of(float_buffers(module))


def float_buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}


def layouts(module: nn.Module) -> tuple[Layout, Layout]:
    """Of the parameters and of the floating-point buffers."""
    return Layout.of(dict(module.named_parameters())), Layout.of(float_buffers(module))
