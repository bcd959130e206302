"""What W&B shows of a run besides its rows: labels, tables and files. Made from the run directory, without wandb."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedray.track.store import CONFIG_FILE, Row, read_clients, read_transfers

LAYER_PREFIX = "model/layer_sparsity/"
# What decides a result; the others are where, how long and under which name it ran.
UNGROUPED = ("seed", "name", "rounds", "checkpoint", "runtime", "tracker")
METHOD = ("pruner", "strategy", "correction", "personal")
PLAIN_STRATEGY = "fedavg"


@dataclass(frozen=True, kw_only=True)
class Labels:
    """How a run is found among others. group: runs that differ only in their seed share it."""

    name: str
    group: str
    tags: tuple[str, ...]


def labels_of(manifest: Mapping[str, Any]) -> Labels:
    """The labels that a manifest gives: name "feddst 0.9 alpha=0.3 seed=1", group "grid-1a2b3c4d", tags of what was
    chosen. Manifests without choices, as of older runs, give the last names of the components."""
    config = manifest["config"]
    chosen = {group: _choice(manifest, group) for group in METHOD}
    data = manifest.get("data", {})
    tags = [chosen["pruner"], chosen["strategy"], data.get("name"), chosen["correction"], chosen["personal"]]
    return Labels(
        name=_name(chosen, config),
        group=f"{config.get('name', 'run')}-{_hash(config, data.get('digest'))}",
        tags=tuple(dict.fromkeys(part for tag in tags if tag not in (None, "none") for part in str(tag).split("+"))),
    )


def _choice(manifest: Mapping[str, Any], group: str) -> str:
    known = manifest.get("choices", {}).get(group)
    if known is not None:
        return str(known)
    node = manifest["config"].get(group) or {}
    nodes = [node] if "_target_" in node else [one for one in node.values() if isinstance(one, Mapping)]
    return "+".join(str(one["_target_"]).rsplit(".", 1)[-1].lower() for one in nodes if "_target_" in one) or "none"


def _name(chosen: Mapping[str, str], config: Mapping[str, Any]) -> str:
    said = [chosen[group] for group in METHOD if chosen[group] != "none"]
    if len(said) > 1:  # averaging goes without saying beside any other method
        said = [name for name in said if name != PLAIN_STRATEGY]
    words = ["+".join(said)] if said else []
    pruner = config.get("pruner") or {}
    sparsity = pruner.get("sparsity", pruner.get("target_sparsity"))
    if isinstance(sparsity, int | float) and chosen["pruner"] != "none":
        words.append(f"{sparsity:g}")
    alpha = (config.get("partition") or {}).get("alpha")
    if isinstance(alpha, int | float):
        words.append(f"alpha={alpha:g}")
    if "seed" in config:
        words.append(f"seed={config['seed']}")
    return " ".join(words)


def _hash(config: Mapping[str, Any], data_digest: str | None) -> str:
    kept = {key: value for key, value in config.items() if key not in UNGROUPED}
    # The same data may lie elsewhere, and other data in the same place.
    kept["data"] = {key: value for key, value in (config.get("data") or {}).items() if key != "path"}
    text = json.dumps([kept, data_digest], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


# -- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Table:
    """columns: names; rows: one value a column, None where nothing is known."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def layer_table(folder: Path, row: Mapping[str, Any]) -> Table:
    """One line a tensor: its shape, how many parameters it has and keeps, its sparsity.

    From `final/` where the run has finished; else from `row`, the last one, which knows the sparsity of masked tensors.
    """
    columns = ("layer", "shape", "params", "kept", "sparsity")
    model, mask = folder / "final" / "model.safetensors", folder / "final" / "mask.safetensors"
    if not model.is_file():
        known = {key.removeprefix(LAYER_PREFIX): value for key, value in row.items() if key.startswith(LAYER_PREFIX)}
        return Table(columns=columns, rows=tuple((name, None, None, None, value) for name, value in known.items()))
    from safetensors import safe_open
    from safetensors.numpy import load_file

    kept = {name: int(value.sum()) for name, value in load_file(mask).items()} if mask.is_file() else {}
    rows = []
    with safe_open(model, framework="numpy") as tensors:
        for name in tensors.keys():
            shape = tensors.get_slice(name).get_shape()
            params = 1
            for size in shape:
                params *= size
            left = kept.get(name, params)
            rows.append((name, "x".join(map(str, shape)), params, left, 1 - left / params if params else 0.0))
    return Table(columns=columns, rows=tuple(rows))


def client_table(folder: Path) -> Table:
    """One line a client over the whole run: sums of what it did and sent, the last of what was measured.

    Bytes count values, mask and header; time/train_s is in seconds.
    """
    lines: dict[int, Row] = defaultdict(dict)
    tests: dict[str, None] = {}
    for line in read_clients(folder):
        own = lines[line["client"]]
        if line.get("num_steps") is not None:
            own["rounds"] = own.get("rounds", 0) + 1
        for key in ("train_flops", "time/train_s"):
            if line.get(key) is not None:
                own[key] = own.get(key, 0) + line[key]
        for key, value in line.items():
            if key.startswith("test/"):
                tests[key] = None
            if key in ("num_examples", "sparsity", "train/loss") or key.startswith("test/"):
                own[key] = value
    for line in read_transfers(folder):
        key = f"{line['direction']}_bytes"
        sent = line["value_bytes"] + line["mask_bytes"] + line["header_bytes"]
        lines[line["client"]][key] = lines[line["client"]].get(key, 0) + sent
    columns = ("rounds", "num_examples", *tests, "train/loss", "sparsity", "up_bytes", "down_bytes", "train_flops",
               "time/train_s")  # fmt: skip
    rows = tuple((client, *(lines[client].get(key) for key in columns)) for client in sorted(lines))
    return Table(columns=("client", *columns), rows=rows)


def client_scores(lines: Sequence[Row], metric: str) -> dict[int, list[float]]:
    """The clients' values of a metric of client lines, by round; what is not finite is left out."""
    found: dict[int, list[float]] = defaultdict(list)
    for line in lines:
        if line.get(metric) is not None:
            found[line["round"]].append(line[metric])
    return found


# -- files -----------------------------------------------------------------------------------------------------------


def artifact_files(folder: Path, which: str) -> dict[str, list[Path]]:
    """Files of the finished run by kind of artifact: "mask", and with `which` "final" also "model". Without a file, no
    artifact: a run that prunes nothing has no mask."""
    final, files = folder / "final", {}
    if which in ("masks", "final"):
        files["mask"] = [final / "mask.safetensors"]
    if which == "final":
        files["model"] = [final / "model.safetensors"]
    return {kind: [*paths, folder / CONFIG_FILE] for kind, paths in files.items() if all(p.is_file() for p in paths)}
