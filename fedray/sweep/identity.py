"""Which folder a cell of a sweep has, and what is left to do there; from overrides and manifests alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedray.errors import ConfigError
from fedray.launch import last_resumable
from fedray.track.store import MANIFEST_FILE, read_manifest, read_rows

ID_DIGITS = 8
"""Hex digits of a run's id in the name of its folder."""
LABEL_LENGTH = 100
"""Characters of the readable part of a folder's name."""
OUTSIDE = ("runtime", "tracker", "rounds", "name", "checkpoint", "hydra")
"""What a run's id leaves out: cells that differ only in these are told apart by their label."""


@dataclass(frozen=True, kw_only=True)
class Left:
    """What is left to do in a folder.

    what: "nothing"; "begin" a run where there is none; "go on" after `resume_round`, 0 for from the start; "repeat"
    a run that failed, from the start. why: a few words for the log.
    """

    what: Literal["nothing", "begin", "go on", "repeat"]
    resume_round: int | None = None
    why: str = ""


def varying(cells: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Of the overrides of each cell those that not all cells have, in their order."""
    common = set.intersection(*(set(overrides) for overrides in cells)) if len(cells) > 1 else set(*cells)
    return [tuple(override for override in overrides if override not in common) for overrides in cells]


def label(overrides: Sequence[str]) -> str:
    """What a cell differs in, for people: `pruner=magnitude, sparsity=0.5, seed=1`. Empty where there is nothing."""
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    ends = [key.rpartition(".")[2] for key in keys]
    shown = [end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)]
    values = [override.partition("=")[2] for override in overrides]
    return ", ".join(f"{key}={value}" if value else key for key, value in zip(shown, values, strict=True))


def folder_name(label: str, run_id: str) -> str:
    """`pruner-magnitude_sparsity-0.5_seed-1-0a1b2c3d`: nothing in it that a shell or an override has to quote."""
    words = [re.sub(r"[^A-Za-z0-9.+-]+", "-", word).strip("-") for word in label.split(", ")]
    readable = "_".join(word for word in words if word)
    if len(readable) > LABEL_LENGTH:
        # Cells whose labels differ only behind the cut have folders of their own.
        readable = f"{readable[: LABEL_LENGTH - 9].rstrip('-_.')}_{stand_in([label])[:8]}"
    readable = readable.rstrip("-_.")
    return f"{readable or 'run'}-{run_id[:ID_DIGITS]}"


def stand_in(overrides: Sequence[str]) -> str:
    """What stands for the id of a cell that was refused before it had one."""
    return hashlib.blake2b("\n".join(overrides).encode(), digest_size=8).hexdigest()


def place(root: Path, run_ids: Sequence[str], differences: Sequence[Sequence[str]]) -> list[Path]:
    """The folder of each cell below `root`: the one that already holds its run, else one by its label.

    The label of a cell changes with the sweep that it is in; its run keeps its folder. Cells that differ in something
    that a run's id leaves out, as in rounds=10,20, have one run each all the same, in folders by their labels; so
    where the same run is in several folders, or asked for more than once, none of them is taken for another.

    Raises ConfigError where two cells would have one folder.
    """
    there = {path.name for path in root.iterdir()} if root.is_dir() else set()
    by_id: dict[str, list[str]] = {}
    for name in sorted(there):
        by_id.setdefault(name.rpartition("-")[2], []).append(name)
    folders: list[Path] = []
    for run_id, differs in zip(run_ids, differences, strict=True):
        name = folder_name(label(differs), run_id)
        outside = any(_root(override) in OUTSIDE for override in differs)
        if name not in there and not outside and run_ids.count(run_id) == 1:
            olds = [old for old in by_id.get(run_id[:ID_DIGITS], ()) if _holds(root / old, run_id)]
            name = olds[0] if len(olds) == 1 else name
        if root / name in folders:
            raise ConfigError(
                f"two cells of the sweep would have the folder {name}: {', '.join(differs) or 'no override'} and "
                "another that its name does not tell from it; make a sweep of each"
            )
        folders.append(root / name)
    return folders


def distinct(run_ids: Sequence[str], differences: Sequence[Sequence[str]], rounds: Sequence[int]) -> list[int]:
    """Positions of the cells that are runs of their own: of equal ones, however they were written, the first."""
    seen: dict[tuple[object, ...], int] = {}
    for at, (run_id, differs, length) in enumerate(zip(run_ids, differences, rounds, strict=True)):
        outside = tuple(override for override in differs if _root(override) in OUTSIDE)
        seen.setdefault((run_id, outside, length), at)
    return list(seen.values())


def left_to_do(folder: Path, run_id: str, rounds: int) -> Left:
    """What a run of this id and so many rounds has still to do in `folder`.

    Raises ConfigError where the folder holds another run, RunError where its files cannot be read.
    """
    if not (folder / MANIFEST_FILE).is_file():
        return Left(what="begin")
    manifest = read_manifest(folder)
    if manifest.get("run_id") != run_id:
        raise ConfigError(
            f"{folder} holds run {manifest.get('run_id')}, and this cell is run {run_id}; choose another "
            "hydra.sweep.dir"
        )
    status = manifest.get("status")
    if status == "finished" and manifest.get("rounds", 0) >= rounds:
        return Left(what="nothing")
    if status == "failed" and not manifest.get("died"):
        # The code may have been mended since: what the old one left is no start for the new one.
        return Left(what="repeat", resume_round=0, why=f"it failed: {manifest.get('error')}")
    if not read_rows(folder) and status != "finished":
        return Left(what="repeat", resume_round=0, why="it had not finished a round")
    return Left(what="go on", resume_round=last_resumable(folder), why=f"it was {status}")


def _holds(folder: Path, run_id: str) -> bool:
    try:
        return bool(read_manifest(folder).get("run_id") == run_id)
    except Exception:  # whatever is wrong there is said when the folder is used
        return False


def _root(override: str) -> str:
    key: str = re.split(r"[.=@/]", override.lstrip("+~"), maxsplit=1)[0]
    return key
