"""Normalisation layers: group instead of batch, exact statistics over clients, and layers that no longer move."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedray.errors import ConfigError
from fedray.tree import Tree

Norm = Literal["none", "batch", "group"]
BatchNorm = nn.modules.batchnorm._BatchNorm


NO_BATCH_NORM = (
    "batch_norm is {!r} and this model has no batch normalisation; take one that has, such as model=batchnorm_cnn, or "
    "set batch_norm=average"
)


def norm_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The batch-normalisation layers by name, in the module's order."""
    return {name: child for name, child in module.named_modules() if isinstance(child, BatchNorm)}


def group_count(channels: int, groups: int) -> int:
    """The largest divisor of `channels` that is at most `groups`; both at least 1."""
    return max(count for count in range(1, min(channels, groups) + 1) if channels % count == 0)


def make_norm(kind: Norm, channels: int, groups: int) -> nn.Module:
    """A normalisation of `channels` channels of images; `groups` is an upper bound, see `group_count`."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(group_count(channels, groups), channels)
    return nn.Identity()


def check_norm(kind: str, groups: int) -> None:
    """Refuse what `make_norm` cannot make."""
    if kind not in ("none", "batch", "group"):
        raise ConfigError(f"model.norm is {kind!r}; choose none, batch or group")
    if groups < 1:
        raise ConfigError(f"model.groups is {groups}; it must be at least 1, such as 32")


def to_group_norm(module: nn.Module, groups: int = 32) -> nn.Module:
    """The same module with a GroupNorm of as many channels in the place of every BatchNorm; changed in place.

    Scale and shift are taken over, running statistics are dropped. groups: an upper bound; each layer gets the largest
    divisor of its channels that is at most it. Wu & He 2018; in federated learning Hsieh et al. 2020.
    """
    if groups < 1:
        raise ConfigError(f"the number of groups is {groups}; it must be at least 1, such as 32")
    return _replaced(module, lambda norm: _grouped(norm, groups))


def group_normed(build: Callable[[], nn.Module], groups: int = 32) -> nn.Module:
    """What `build` makes, by `to_group_norm`; bound with partial it is a maker that can be pickled.

    Raises ConfigError where there is nothing to replace.
    """
    module = build()
    if not norm_layers(module):
        raise ConfigError(NO_BATCH_NORM.format("group"))
    return to_group_norm(module, groups)


def freeze_statistics(module: nn.Module) -> nn.Module:
    """The same module with a FrozenBatchNorm in the place of every BatchNorm whose scale is constant; changed in place.

    Else the running statistics of a frozen backbone would go on moving, and cross the wire in every round.
    """
    return _replaced(module, lambda norm: FrozenBatchNorm(norm) if _is_constant(norm) else None)


class FrozenBatchNorm(nn.Module):
    """A batch normalisation by fixed statistics. Its tensors have the names of the original's and are constants."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.eps = float(getattr(norm, "eps", 1e-5))
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(norm, name)
            fixed = None if value is None else nn.Parameter(value.detach().clone(), requires_grad=False)
            self.register_parameter(name, fixed)

    def forward(self, x: Tensor) -> Tensor:
        mean, variance, weight, bias = (getattr(self, n) for n in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, self.eps)


def _is_constant(norm: nn.Module) -> bool:
    tracked = getattr(norm, "running_mean", None) is not None
    return tracked and not any(parameter.requires_grad for parameter in norm.parameters())


def _grouped(norm: Any, groups: int) -> nn.Module:
    channels = norm.num_features
    replacement = nn.GroupNorm(group_count(channels, groups), channels, eps=norm.eps, affine=norm.affine)
    if norm.affine:
        replacement.weight, replacement.bias = norm.weight, norm.bias
    return replacement


def _replaced(module: nn.Module, make: Any) -> nn.Module:
    if isinstance(module, BatchNorm):
        return make(module) or module
    for name, child in module.named_children():
        setattr(module, name, _replaced(child, make))
    return module


def statistics(module: nn.Module, batches: Iterable[Tensor]) -> tuple[Tree, int]:
    """What every batch normalisation sees of these inputs: means and biased variances, and the number of samples.

    The tree has the layout of the floating-point buffers; those that belong to no batch normalisation are as they
    were. Layers normalise each batch by its own statistics meanwhile, dropout is off, and the module is left as it was.
    The first layer's statistics are those of all inputs at once, whatever the batches; a later layer's are those of
    what it is given. Batches have one size of image, so that each sample counts alike in every layer.
    HeteroFL (Diao et al. 2021), section 3, static batch normalisation.
    """
    layers = norm_layers(module)
    sums: dict[str, list[Any]] = {name: [0, 0.0, 0.0] for name in layers}
    num_samples = 0

    def watch(name: str) -> Any:
        def seen(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0].detach().double().transpose(0, 1).flatten(1)
            total = sums[name]
            # Sums about a running mean: squares of values far from zero would swallow their variance.
            count, mean = values.shape[1], values.mean(1)
            spread = (values - mean[:, None]).square().sum(1)
            before, shift = total[0], mean - total[1]
            total[0] = before + count
            total[1] = total[1] + shift * (count / total[0])
            total[2] = total[2] + spread + shift.square() * (before * count / total[0])

        return seen

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with _left_alone(module), torch.no_grad():
            module.eval()
            for layer in layers.values():
                layer.train()
            for x in batches:
                module(x)
                num_samples += len(x)
    finally:
        for handle in handles:
            handle.remove()
    found = {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    for name, (count, mean, spread) in sums.items():
        if count:
            prefix = f"{name}." if name else ""
            found[f"{prefix}running_mean"], found[f"{prefix}running_var"] = mean, spread / count
    return Tree.of({name: found[name] for name in found}), num_samples


@contextmanager
def _left_alone(module: nn.Module) -> Iterator[None]:
    modes = [(child, child.training) for child in module.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def second_moments(statistics: Tree) -> Tree:
    """Means and mean squares from means and variances: what may be averaged over clients, coordinate by coordinate."""
    return _with_variances(statistics, lambda mean, variance: variance + mean.square())


def from_second_moments(moments: Tree) -> Tree:
    """Means and variances from averaged means and mean squares: sum p (v_k + m_k^2) - m^2, at least 0."""
    return _with_variances(moments, lambda mean, square: (square - mean.square()).clamp(min=0.0))


def pooled(parts: Iterable[tuple[Tree, float]]) -> Tree:
    """The statistics of the union of samples from those of its parts with their weights, at least one above 0.

    m = sum p_k m_k and v = sum p_k (v_k + m_k^2) - m^2, in the form sum p_k (v_k + (m_k - m)^2), which loses nothing.
    """
    given = list(parts)
    total = math.fsum(weight for _, weight in given)
    if not given or total <= 0:
        raise ValueError("pooled statistics need at least one part with a weight above 0")
    layout = given[0][0].layout
    mean = sum((tree.flat.double() * (weight / total) for tree, weight in given), torch.zeros(layout.size).double())
    result = Tree(layout, mean.float())
    for at_mean, at_variance in _pairs(result):
        center = mean[at_mean]
        result.flat[at_variance] = sum(
            (
                (tree.flat[at_variance].double() + (tree.flat[at_mean].double() - center).square()) * (weight / total)
                for tree, weight in given
            ),
            torch.zeros_like(center),
        ).float()
    return result


def _pairs(tree: Tree) -> Iterator[tuple[slice, slice]]:
    """Where the means and the variances of each layer lie."""
    spans = tree.layout.spans
    for name, span in spans.items():
        if name.rpartition(".")[2] == "running_mean":
            yield span, spans[name.removesuffix("mean") + "var"]


def _with_variances(tree: Tree, change: Any) -> Tree:
    flat = tree.flat.double()
    for at_mean, at_variance in _pairs(tree):
        flat[at_variance] = change(flat[at_mean], flat[at_variance])
    return Tree(tree.layout, flat.float())
