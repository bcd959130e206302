"""The result of a run on disk, and out of it again as plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fedray.errors import ConfigError
from fedray.round import Server

MODEL_FILE = "model.safetensors"
MASK_FILE = "mask.safetensors"


def write_final(folder: str, server: Server, constants: Mapping[str, torch.Tensor]) -> None:
    """`final/model.safetensors` with parameters, constants and buffers, `final/mask.safetensors` if masked.

    What clients keep to themselves is not in it.
    """
    final = Path(folder) / "final"
    final.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.clone() for tree in (server.params, server.buffers) for name, value in tree.items()}
    tensors |= {name: value.detach().cpu().contiguous() for name, value in constants.items()}
    save_file(tensors, final / MODEL_FILE)
    if server.mask is not None:
        save_file({name: kept.clone() for name, kept in server.mask.items()}, final / MASK_FILE)


def read_final(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
    """Tensors by name and the mask by name. Raises ConfigError where the run has not finished."""
    model = run / "final" / MODEL_FILE
    if not model.is_file():
        raise ConfigError(f"{run} has no {model.relative_to(run)}; name the folder of a finished run")
    mask = run / "final" / MASK_FILE
    return load_file(model), load_file(mask) if mask.is_file() else None
