"""A finished run's model as a file that plain PyTorch loads, whole or without its dead units."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fedray.errors import ConfigError
from fedray.models.task import LAYERS
from fedray.sim.final import read_final

PROBES = 8  # random inputs on which the shrunk model must agree with the whole one


def export(
    run: Path, *, module: Any, sample_shape: tuple[int, ...], format: Literal["state_dict", "safetensors"],
    output: Path | None, shrink: bool,
) -> tuple[Path, str]:  # fmt: skip
    """Write the final model; returns the file and a line that says what is in it.

    module:       makes the run's model; only used to shrink.
    shrink:       leave out units that nothing reads (every outgoing weight is zero) and units that are always zero
                  (every incoming weight and the bias are zero). The file has the same names and smaller shapes.
    Raises ConfigError where the run has no final model, or where its layers do not form a plain chain.
    """
    tensors, _ = read_final(run)
    note = f"{sum(t.numel() for t in tensors.values()):,} parameters"
    if shrink:
        whole = module()
        whole.load_state_dict(tensors, strict=False)
        small = shrunk(whole.eval(), sample_shape)
        before = sum(t.numel() for t in tensors.values())
        tensors = {name: value for name, value in small.state_dict().items() if name in tensors}
        after = sum(t.numel() for t in tensors.values())
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items() if value.dim() > 1)
        note = f"{after:,} of {before:,} parameters: {shapes}"
    path = output or run / "final" / ("export.pt" if format == "state_dict" else "export.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if format == "state_dict":
            torch.save({name: value.clone() for name, value in tensors.items()}, path)
        else:
            save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path)
    except OSError as error:
        raise ConfigError(f"--output is {str(path)!r}; it cannot be written ({error.strerror})") from error
    return path, note


def shrunk(module: nn.Module, sample_shape: tuple[int, ...]) -> nn.Module:
    """A physically smaller module with the same outputs, for models whose layers follow one another.

    Layers are taken to form a chain in the order of their definition, with norms of matching size between them; the
    result is compared with the original on random inputs, so that a model of another shape is refused, not broken.
    """
    small = copy.deepcopy(module)
    chain = [m for m in small.modules() if isinstance(m, (*LAYERS, nn.modules.batchnorm._BatchNorm))]
    layers = [index for index, m in enumerate(chain) if isinstance(m, LAYERS)]
    for here, there in itertools.pairwise(layers):
        norms = [m for m in chain[here + 1 : there]]
        _shrink_pair(chain[here], norms, chain[there])
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(PROBES, *sample_shape, generator=generator)
    try:
        with torch.no_grad():
            agree = torch.allclose(small(probes), module(probes), rtol=1e-4, atol=1e-5)
    except RuntimeError:
        agree = False
    if not agree:
        raise ConfigError(
            f"--shrink is set; the layers of {type(module).__name__} do not form a plain chain, so its dead units "
            "cannot be cut out safely. Export without --shrink"
        )
    return small


def _shrink_pair(layer: Any, norms: list[Any], following: Any) -> None:
    """Cut the dead units between a layer and the one after it."""
    units = layer.weight.shape[0]
    if getattr(layer, "groups", 1) != 1 or getattr(following, "groups", 1) != 1 or following.weight.shape[1] % units:
        return
    per_unit = following.weight.shape[1] // units  # inputs of the next layer per unit: pixels, after flattening
    outgoing = following.weight.detach().transpose(0, 1).reshape(units, -1)
    read = (outgoing != 0).any(1)
    incoming = (layer.weight.detach().reshape(units, -1) != 0).any(1)
    if layer.bias is not None:
        incoming |= layer.bias.detach() != 0
    alive = read & (incoming | torch.tensor(bool(norms)))
    if alive.all() or not alive.any():
        return
    _keep(layer, "weight", alive)
    _keep(layer, "bias", alive)
    for norm in norms:
        for name in ("weight", "bias", "running_mean", "running_var"):
            _keep(norm, name, alive)
        norm.num_features = int(alive.sum())
    _keep(following, "weight", alive.repeat_interleave(per_unit), axis=1)
    for attribute, where, value in (
        ("out_features", layer, int(alive.sum())), ("out_channels", layer, int(alive.sum())),
        ("in_features", following, int(alive.sum()) * per_unit), ("in_channels", following, int(alive.sum())),
    ):  # fmt: skip
        if hasattr(where, attribute):
            setattr(where, attribute, value)


def _keep(module: Any, name: str, alive: Tensor, axis: int = 0) -> None:
    value = getattr(module, name, None)
    if value is None:
        return
    kept = value.detach()[alive] if axis == 0 else value.detach()[:, alive]
    setattr(module, name, nn.Parameter(kept.clone()) if isinstance(value, nn.Parameter) else kept.clone())
