"""Finding run directories, and Markdown tables of what is in them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedray.errors import ConfigError
from fedray.track.store import MANIFEST_FILE, ROUNDS_FILE, read_manifest


def find_runs(folder: Path) -> list[Path]:
    """`folder` itself if it is a run directory, else those in it at any depth, in order of their paths.

    Raises ConfigError if there is none.
    """
    folder = Path(folder)
    found = []
    for place, inside, files in os.walk(folder):
        inside.sort(key=natural)
        if {MANIFEST_FILE, ROUNDS_FILE} <= set(files):
            found.append(Path(place))
            inside.clear()  # what lies in a run belongs to it
    if not found:
        raise ConfigError(f"'{folder}' holds no run directory at any depth; give the folder of a run or of a sweep")
    return found


def manifest_of(run: Path) -> dict[str, Any]:
    """The manifest of a run, with all that tables read of it. Raises ConfigError, or RunError as `read_manifest`."""
    manifest = read_manifest(run)
    config = manifest.get("config")
    if not isinstance(config, Mapping) or type(config.get("seed")) is not int or "status" not in manifest:
        raise ConfigError(f"'{run / MANIFEST_FILE}' does not say what ran; restore it from a copy, or run again")
    choices, data = manifest.get("choices", {}), manifest.get("data", {"digest": ""})
    if not isinstance(choices, Mapping) or not isinstance(data, Mapping) or "digest" not in data:
        raise ConfigError(
            f"'{run / MANIFEST_FILE}' has choices or data as no run writes them; restore it from a copy, or run again"
        )
    return manifest


def natural(name: str) -> tuple[int, int, str]:
    """Sweeps number their cells: 10 comes after 9."""
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)


def shown(run: Path, under: Sequence[Path]) -> str:
    """A run's path as short as it is clear: from the folder that was asked for, if that is one and holds it."""
    if len(under) == 1 and run != under[0]:
        return str(run.relative_to(under[0]))
    return str(run)


def sentence(error: object) -> str:
    """The text of an error with one full stop: some end in one, some do not."""
    return f"{str(error).rstrip('.')}."


def sized(value: float) -> str:
    """Two decimals, more for a small value: it has three significant digits, and only 0 is shown as 0."""
    decimals = 2 if value == 0 or abs(value) >= 1 else 2 - math.floor(math.log10(abs(value)))
    return f"{value:,.{decimals}f}"


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted key; `a._target_` becomes `a`, with the last name of the path as its value.

    An empty mapping is a leaf too ("none" of a group).
    """
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            leaves |= flattened(value, f"{name}.")
        elif key == "_target_" and prefix:
            leaves[prefix[:-1]] = str(value).rsplit(".", 1)[-1]
        else:
            leaves[name] = "none" if isinstance(value, Mapping) else value
    return leaves


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], *, text: int = 1) -> str:
    """A Markdown table that can be read as it stands. text: columns from the left that hold words, not numbers."""
    # A line's end would end the row, and a browser takes what is in angle brackets for its own.
    lines = [
        [" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in line] for line in (header, *rows)
    ]
    widths = [max(3, *(len(line[at]) for line in lines)) for at in range(len(header))]
    ruler = ["-" * width if at < text else "-" * (width - 1) + ":" for at, width in enumerate(widths)]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if at < text else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in (lines[0], ruler, *lines[1:])
    )
