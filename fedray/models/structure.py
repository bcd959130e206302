"""What a model is made of: its head, its units that can be cut whole, and the smaller model without them."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.models.task import LAYERS, layouts, trainable
from fedray.prune.structure import Group, Member, Slices, Structure, UnitKind

OVER_CHANNELS = (nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
PER_CHANNEL = (nn.modules.batchnorm._NormBase, nn.PReLU)
TOLERANCE = 1e-4
"""Of the largest output; rounding makes 1e-6, a unit too many or too few makes far more."""


def head_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of the last linear or convolutional layer, in the order of definition.

    It is what a transfer replaces. A tied head has the name of the tensor that it shares. Empty without such a layer.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    layers = [child for child in module.modules() if isinstance(child, LAYERS)]
    if not layers:
        return ()
    return tuple(names[id(parameter)] for parameter in layers[-1].parameters(recurse=False))


class Logits(nn.Module):
    """The tensor `.logits` of a module that returns an object, as those of transformers do.

    A module that returns a tensor is taken as it is. Its tensors have the names `module.<name>`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        outputs: Any = self.module(x)
        if isinstance(outputs, Tensor):
            return outputs
        if not hasattr(outputs, "logits"):
            raise ConfigError(
                f"the model {type(self.module).__name__} returns a {type(outputs).__name__} without logits; choose one "
                "with a head, such as AutoModelForSequenceClassification"
            )
        return outputs.logits  # type: ignore[no-any-return]


# -- units that can be cut whole --------------------------------------------------------------------------------------


def find_structure(module: nn.Module, sample: Tensor) -> Structure:
    """Which units of a model can be cut whole, and what belongs to each. sample: an input, (1, *shape).

    Filters and neurons are coupled as torch-pruning's dependency graph says (Fang et al. 2023), residual streams as one
    group. Behind a GroupNorm the channels that are normalised together are one unit. Attention heads and residual
    blocks are those of modules that declare them, as ours do: `fused_attention`, the names of the linear layer of
    queries, keys and values and of the projection, with `head_width`; `residual_branch`, the names of the children that
    go with the block, whose `forward` does without them where `skipped` is true. Outputs and inputs never are units.

    A smaller model computes what the masked one does; groups for which that does not hold are left out, and
    `Structure.left_out` says why. `module` is left alone. Raises ConfigError where nothing is left, or without the
    package torch-pruning.
    """
    try:
        torch_pruning = importlib.import_module("torch_pruning")
    except ImportError as error:
        raise ConfigError(
            "this run cuts whole units out of the model, which are found by the package torch-pruning, and it is not "
            "installed; pip install 'fedray[prune]', or take a pruner of single weights, such as pruner=magnitude"
        ) from error
    params, buffers = layouts(module)
    usable = _Usable(module)
    reasons: list[str] = []
    with torch.inference_mode(False), torch.enable_grad():
        sample = sample.clone()  # a tensor of an inference could not be traced
        units = [*_heads(module, usable, reasons), *_coupled(module, sample, torch_pruning, usable, reasons)]
    blocks = [*_blocks(module, usable, reasons)]
    order = {name: at for at, (name, _) in enumerate(module.named_modules())}
    units.sort(key=lambda group: order[group.name])
    trial = _Trial(module, sample)
    whole = Structure(params, (*units, *blocks), (), buffers)
    groups = [*trial.faithful(whole, units, reasons), *trial.faithful(whole, blocks, reasons)]
    if not groups:
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise ConfigError(
            f"the model {type(module).__name__} has no units that can be cut whole{why}; take another, such as "
            "model=mlp or model=lenet, or a pruner of single weights, such as pruner=magnitude"
        )
    return Structure(params, tuple(groups), tuple(reasons), buffers)


class _Usable:
    """Which tensors a group may cut."""

    def __init__(self, module: nn.Module) -> None:
        self.params = frozenset(trainable(module))
        self.known = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
        owners: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        self.shared = {name: names for names in owners.values() if len(names) > 1 for name in names}

    def complaint(self, members: list[Member]) -> str | None:
        """Why these members cannot be cut; None if they can."""
        for member in members:
            if member.tensor in self.shared:
                return f"{' and '.join(self.shared[member.tensor])} are one tensor"
            if member.tensor in self.known and member.tensor not in self.params and not _is_statistic(member.tensor):
                return f"{member.tensor} is constant"
        return None


def _is_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in ("running_mean", "running_var")


class _Unfit(Exception):
    """Why the units of a layer cannot be cut whole."""


def _coupled(
    module: nn.Module, sample: Tensor, torch_pruning: Any, usable: _Usable, reasons: list[str]
) -> Iterator[Group]:
    """Filters and neurons, by the dependency graph; what cannot be is added to `reasons`."""
    model = copy.deepcopy(module).eval()
    for parameter in model.parameters():
        parameter.requires_grad_()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about loose parameters, which are handled
            graph = torch_pruning.DependencyGraph().build_dependency(model, sample, verbose=False)
    except Exception as error:  # whatever a user's module does under a tracer
        raise ConfigError(
            f"torch-pruning cannot trace the model {type(module).__name__} ({type(error).__name__}: {error}); take "
            "another model, or a pruner of single weights, such as pruner=magnitude"
        ) from error
    ends = _ends(model, sample)
    names = {id(child): name for name, child in model.named_modules()}
    names |= {id(parameter): name for name, parameter in model.named_parameters()}
    fused = {f"{prefix}.{child.fused_attention[0]}" for prefix, child in model.named_modules() if _has_heads(child)}
    done = set(fused)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.MultiheadAttention):
            done.update((name, f"{name}.out_proj"))
            reasons.append(f"{name}: the heads of nn.MultiheadAttention cannot be cut out of it")
        if name in done or not isinstance(layer, LAYERS) or layer not in graph.module2node:
            continue
        pruner = graph.get_pruner_of_module(layer)
        items = list(graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(_width(layer)))))
        made = [i.dep.target.module for i in items if graph.is_out_channel_pruning_fn(i.dep.handler)]
        done.update(names.get(id(target), "") for target in made)
        if any(target in ends or type(target).__name__ == "_OutputOp" for target in made):
            continue
        try:
            yield _group(name, layer, [i for i in items if id(i.dep.target.module) in names], graph, names, usable)
        except _Unfit as why:
            reasons.append(f"{name}: {why}")


def _ends(model: nn.Module, sample: Tensor) -> list[nn.Module]:
    """The layers whose output is the model's."""
    made: dict[nn.Module, Any] = {}

    def seen(layer: nn.Module, _: Any, output: Any) -> None:
        made[layer] = getattr(output, "grad_fn", None)

    handles = [layer.register_forward_hook(seen) for layer in model.modules() if isinstance(layer, LAYERS)]
    outputs = model(sample)
    for handle in handles:
        handle.remove()
    return [layer for layer, maker in made.items() if maker is not None and maker is outputs.grad_fn]


def _width(layer: nn.Module) -> int:
    return int(layer.out_channels if hasattr(layer, "out_channels") else layer.out_features)  # type: ignore[arg-type]


def _group(name: str, layer: nn.Module, items: list[Any], graph: Any, names: dict[int, str], usable: _Usable) -> Group:
    """The group of which `layer` is the first that computes it. Raises _Unfit."""
    size = _width(layer)
    members: list[Member] = []
    together = 1
    for item in items:
        target, own = item.dep.target.module, names[id(item.dep.target.module)]
        output = bool(graph.is_out_channel_pruning_fn(item.dep.handler))
        if isinstance(target, nn.GroupNorm):
            if target.num_groups == 1:
                raise _Unfit(f"its units pass through {own}, which normalises all of them together")
            together = max(together, target.num_channels // target.num_groups)
        places = _positions(own, list(item.idxs), list(item.root_idxs), size)
        members += [
            Member(f"{own}.{local}" if local else own, dim, places, output)
            for local, dim in _cut_by(target, own, output, item.dep.target.pruning_dim)
        ]
    if together > 1:
        members = _merged(members, size, together, items, names)
    complaint = usable.complaint(members)
    if complaint is not None:
        raise _Unfit(complaint)
    known = tuple(member for member in members if member.tensor in usable.known)
    kind: UnitKind = "filter" if isinstance(layer, nn.modules.conv._ConvNd) else "neuron"
    return Group(name, kind, size // together, known)


def _positions(own: str, places: list[int], roots: list[int], size: int) -> np.ndarray:
    """int64 (size, width): where each unit lies, from pairs of position and unit."""
    order = np.lexsort((places, roots))
    if len(order) % size or not (np.bincount(roots, minlength=size) == len(order) // size).all():
        raise _Unfit(f"its units do not have the same number of positions each in {own}")
    return np.asarray(places, dtype=np.int64)[order].reshape(size, -1)


def _cut_by(target: Any, own: str, output: bool, pruning_dim: int) -> list[tuple[str, int]]:
    """The tensors of a layer that go with a unit, and the dimension of each. Raises _Unfit."""
    if isinstance(target, nn.Parameter):
        return [("", pruning_dim % target.dim())]
    if isinstance(target, OVER_CHANNELS):
        raise _Unfit(f"its units pass through {own}, which normalises all of them together")
    if isinstance(target, nn.modules.conv._ConvNd):
        if target.transposed:
            raise _Unfit(f"its units pass through the transposed convolution {own}")
        if target.groups > 1:
            if not target.groups == target.in_channels == target.out_channels:
                raise _Unfit(f"its units pass through {own}, a convolution of {target.groups} groups")
            return [("weight", 0), ("bias", 0)]
    if isinstance(target, LAYERS):
        return [("weight", 0), ("bias", 0)] if output else [("weight", 1)]
    if isinstance(target, (*PER_CHANNEL, nn.GroupNorm)):
        return [(local, 0) for local in ("weight", "bias", "running_mean", "running_var")]
    if isinstance(target, nn.Embedding):
        return [("weight", 1)]
    raise _Unfit(f"its units pass through {own}, a {type(target).__name__}")


def _merged(members: list[Member], size: int, together: int, items: list[Any], names: dict[int, str]) -> list[Member]:
    """Members whose units are those that every GroupNorm normalises together. Raises _Unfit where they differ."""
    for item in items:
        target = item.dep.target.module
        if isinstance(target, nn.GroupNorm):
            own = names[id(target)]
            places = _positions(own, list(item.idxs), list(item.root_idxs), size).reshape(-1, together)
            runs = np.arange(target.num_channels).reshape(-1, together)
            if target.num_channels != together * target.num_groups or not np.array_equal(places, runs):
                raise _Unfit(f"its units pass through {own}, which groups them in a way of its own")
    return [Member(m.tensor, m.dim, m.positions.reshape(size // together, -1), m.output) for m in members]


def _has_heads(child: nn.Module) -> bool:
    return hasattr(child, "fused_attention")


def _heads(module: nn.Module, usable: _Usable, reasons: list[str]) -> Iterator[Group]:
    for prefix, child in module.named_modules():
        if not _has_heads(child):
            continue
        attention, projection = (f"{prefix}.{local}" if prefix else local for local in child.fused_attention)
        width = int(child.head_width)
        inner = _width(module.get_submodule(attention)) // 3
        own = np.arange(inner, dtype=np.int64).reshape(-1, width)
        rows = np.concatenate([own, own + inner, own + 2 * inner], 1)
        members = [
            Member(f"{attention}.weight", 0, rows, True),
            Member(f"{attention}.bias", 0, rows, True),
            Member(f"{projection}.weight", 1, own, False),
        ]
        members = [member for member in members if member.tensor in usable.known]
        complaint = usable.complaint(members)
        if complaint is None:
            yield Group(attention, "head", len(own), tuple(members))
        else:
            reasons.append(f"{attention}: {complaint}")


def _blocks(module: nn.Module, usable: _Usable, reasons: list[str]) -> Iterator[Group]:
    sizes = {n: t.shape[0] for n, t in (*module.named_parameters(), *module.named_buffers()) if t.dim()}
    for prefix, child in module.named_modules():
        if not prefix or not hasattr(child, "residual_branch"):
            continue
        branches = tuple(f"{prefix}.{local}." for local in child.residual_branch)
        members = [
            Member(name, 0, np.arange(size, dtype=np.int64)[None], True)
            for name, size in sizes.items()
            if name.startswith(branches)
        ]
        complaint = usable.complaint(members)
        if complaint is None:
            yield Group(prefix, "block", 1, tuple(members), 0)
        else:
            reasons.append(f"{prefix}: {complaint}")


class _Trial:
    """Tries groups on a model: whether it computes the same shrunk as masked."""

    def __init__(self, module: nn.Module, sample: Tensor) -> None:
        self.module = copy.deepcopy(module).eval()
        self.sample = sample
        generator = Key.of(0).torch()
        with torch.no_grad():
            # Fresh biases and statistics are zeros and ones, which would hide what is forgotten about them.
            for tensor in (*self.module.parameters(), *self.module.buffers()):
                if tensor.dim() == 1 and tensor.is_floating_point():
                    tensor.add_(0.2 * torch.rand(tensor.shape, generator=generator))

    def faithful(self, whole: Structure, groups: list[Group], reasons: list[str]) -> list[Group]:
        """Those of the groups that can be cut together; what is wrong with the others is added to `reasons`."""
        if not groups or self._complaint(whole, groups) is None:
            return groups
        found: list[Group] = []
        for group in groups:
            complaint = self._complaint(whole, [*found, group])
            if complaint is None:
                found.append(group)
            else:
                reasons.append(f"{group.name}: {complaint}")
        return found

    def _complaint(self, whole: Structure, groups: list[Group]) -> str | None:
        structure = Structure(whole.layout, tuple(groups), (), whole.buffers)
        half = {g.name: torch.arange(g.size) % 2 == (1 if g.least == 0 else 0) for g in groups}
        mask = structure.mask(half)
        slices = structure.slices(mask)
        if slices is None:
            return None
        weights = {name: tensor * mask[name] for name, tensor in trainable(self.module).items()}
        with torch.no_grad():
            wanted = torch.func.functional_call(self.module, weights, (self.sample,))
            try:
                found = shrunk(self.module, slices)(self.sample)
            except Exception as error:  # whatever a user's module does with sizes that it does not expect
                return f"the model does not work without some of its units ({type(error).__name__}: {error})"
        scale = float(wanted.abs().max())
        if found.shape != wanted.shape or not float((found - wanted).abs().max()) <= TOLERANCE * scale:
            return "the model without some of its units does not compute what it does with zeros in their place"
        return None


def shrunk(module: nn.Module, slices: Slices) -> nn.Module:
    """A copy of the model that has of each tensor what `slices` says, and computes what the masked one does.

    In evaluation mode the same but for rounding, and in training mode too, but for what dropout draws.
    """
    memo: dict[int, Any] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name not in slices.gone:
            left = slices.cut(name, tensor.detach()).clone()
            parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(left, tensor.requires_grad) if parameter else left
        else:
            memo[id(tensor)] = nn.Parameter(tensor.new_empty(0)) if isinstance(tensor, nn.Parameter) else None
    small: nn.Module = copy.deepcopy(module, memo)
    for name in slices.skipped:
        block: Any = small.get_submodule(name)
        block.skipped = True
        for local in block.residual_branch:
            delattr(block, local)
    for child in small.modules():
        _resize(child)
    return small


def _resize(layer: Any) -> None:
    """Make what a layer says of itself agree with its tensors."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.modules.conv._ConvNd):
        out = layer.weight.shape[1 if layer.transposed else 0]
        if layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels:
            layer.groups = layer.in_channels = layer.out_channels = out
        elif layer.groups == 1:
            layer.out_channels, layer.in_channels = out, layer.weight.shape[0 if layer.transposed else 1]
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        for tensor in (layer.weight, layer.running_mean):
            if tensor is not None:
                layer.num_features = len(tensor)
    elif isinstance(layer, nn.GroupNorm) and layer.affine:
        together = layer.num_channels // layer.num_groups
        layer.num_channels = len(layer.weight)
        layer.num_groups = layer.num_channels // together
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = layer.weight.shape
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(layer.weight)
