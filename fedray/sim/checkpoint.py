"""The whole state of a run at the end of a round, to disk and back.

A checkpoint is a folder of its own, written under another name, synced and renamed: it is complete or not there.
Trees and masks go to safetensors, everything else to JSON; nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedray.errors import RunError
from fedray.round import Server
from fedray.sim.client import Record
from fedray.tree import Layout, Mask, Tree
from fedray.wire import Downlink

FORMAT = 3
KEPT = 2  # a checkpoint that turns out unreadable has one before it


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything that the next round depends on.

    totals: of the ledger; records: of clients that have one; downlink: what the server remembers of its downloads.
    progress: towards the goals; empty at the start. statistics: of batch normalisation in this very model, if known.
    """

    run_id: str
    round: int
    server: Server
    memories: tuple[Any, ...]
    records: Mapping[int, Record]
    totals: Mapping[str, int]
    train_flops: float
    elapsed_s: float
    simulated_s: float = 0.0
    simulated_j: float = 0.0
    downlink: Downlink = field(default_factory=Downlink)
    progress: Mapping[str, Any] = field(default_factory=dict)
    statistics: Tree | None = None


def save(folder: Path, state: State) -> Path:
    """Write `folder/round-000012/` and drop the oldest ones; returns its path."""
    tensors: dict[str, Tensor] = {}
    plain = {
        "format": FORMAT,
        "run_id": state.run_id,
        "round": state.round,
        "server": _pack((state.server.params, state.server.buffers, state.server.mask), tensors),
        "memories": _pack(state.memories, tensors),
        "records": {
            str(client): _pack((record.memories, record.known, record.residuals, record.warm, record.version), tensors)
            for client, record in state.records.items()
        },
        "simulated": [state.simulated_s, state.simulated_j],
        "downlink": _pack(state.downlink.plain(), tensors),
        "progress": dict(state.progress),
        "statistics": _pack(state.statistics, tensors),
        "totals": dict(state.totals),
        "train_flops": state.train_flops,
        "elapsed_s": state.elapsed_s,
    }
    final = folder / f"round-{state.round:06d}"
    temporary = folder / f"tmp-{state.round:06d}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(tensors, temporary / "state.safetensors")
    (temporary / "state.json").write_text(json.dumps(plain))
    for path in (temporary / "state.safetensors", temporary / "state.json", temporary):
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _sync(folder)
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("round-*"))


def load(path: Path) -> State:
    """Read one checkpoint. Raises RunError where it cannot be read."""
    try:
        tensors = load_file(path / "state.safetensors")
        plain = json.loads((path / "state.json").read_text())
        if plain["format"] != FORMAT:
            raise ValueError(f"format {plain['format']}, and this version reads {FORMAT}")
        params, buffers, mask = _unpack(plain["server"], tensors)
        records = {}
        for client, packed in plain["records"].items():
            memories, known, residuals, warm, version = _unpack(packed, tensors)
            records[int(client)] = Record(
                memories=memories, known=known, residuals=residuals, warm=warm, version=version
            )
        return State(
            run_id=plain["run_id"],
            round=plain["round"],
            server=Server(params=params, buffers=buffers, mask=mask),
            memories=_unpack(plain["memories"], tensors),
            records=records,
            totals=plain["totals"],
            train_flops=plain["train_flops"],
            elapsed_s=plain["elapsed_s"],
            simulated_s=plain["simulated"][0],
            simulated_j=plain["simulated"][1],
            progress=plain["progress"],
            statistics=_unpack(plain["statistics"], tensors),
            downlink=Downlink.of_plain(_unpack(plain["downlink"], tensors)),
        )
    except Exception as error:
        raise RunError(
            f"checkpoint {path} cannot be read ({type(error).__name__}: {error}); delete the folder to fall back to "
            "the one before it"
        ) from error


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A JSON value; trees and masks move to `tensors` (each object once) and leave their key and layout behind."""
    if value is None or isinstance(value, bool | int | float | str):
        return {"plain": value}
    if isinstance(value, Tree | Mask):
        name = f"t{id(value)}"
        if name not in tensors:
            tensors[name] = value.flat.detach().cpu().clone()
        packed = {"kind": type(value).__name__, "at": name, "names": value.layout.names, "shapes": value.layout.shapes}
        if isinstance(value, Mask) and value.seed is not None:
            digest, counts, names = value.seed
            packed["seed"] = [digest.hex(), counts, names]
        return packed
    if isinstance(value, tuple | list):
        return {"kind": type(value).__name__, "items": [_pack(item, tensors) for item in value]}
    if isinstance(value, Mapping):
        return {"kind": "dict", "keys": list(value), "items": [_pack(item, tensors) for item in value.values()]}
    raise RunError(
        f"a policy's memory holds a {type(value).__name__}; it may hold None, numbers, text, Tree, Mask, tuples, lists "
        "and dicts of such, or set checkpoint.every=0"
    )


def _unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    if "plain" in packed:
        return packed["plain"]
    if packed["kind"] in ("Tree", "Mask"):
        layout = Layout(tuple(packed["names"]), tuple(tuple(shape) for shape in packed["shapes"]))
        flat = tensors[packed["at"]]
        if packed["kind"] == "Tree":
            return Tree(layout, flat)
        seed = packed.get("seed")
        known_seed = None if seed is None else (bytes.fromhex(seed[0]), tuple(seed[1]), tuple(seed[2]))
        return Mask(layout, flat.to(torch.bool), known_seed)
    items = [_unpack(item, tensors) for item in packed["items"]]
    if packed["kind"] == "dict":
        return dict(zip(packed["keys"], items, strict=True))
    return tuple(items) if packed["kind"] == "tuple" else items


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
