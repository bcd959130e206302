"""The run directory: the durable record of a run, one line of JSON per round, client and transfer.

    config.yaml      the resolved configuration
    manifest.json    what ran where, and `status`, `started`, `ended`, `error`, which belong to the store
    rounds.jsonl     one row per finished round; keys are the metric names of the project, plus `round`
    clients.jsonl    one row per client of a round: `round`, `client` and metrics
    transfers.jsonl  one row per part of a transfer: `round`, `client`, `direction` ("up" or "down"), `part`,
                     `params` (a count), `value_bytes`, `mask_bytes`, `header_bytes` (bytes)

A round is finished when its row is in rounds.jsonl. Its clients and transfers are written before the row, so a
finished round always has them, and the readers leave out those of a round that was cut off.

JSON has no NaN and no infinity: both are written as null and read back as None.

What a crash can cost: nothing of a finished round when the process dies (kill -9 included). When the machine dies,
the rows themselves are on the disk, the lines of the last few rounds in the other two files may not be.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from fedray.errors import ConfigError, RunError

CONFIG_FILE = "config.yaml"
MANIFEST_FILE = "manifest.json"
ROUNDS_FILE = "rounds.jsonl"
CLIENTS_FILE = "clients.jsonl"
TRANSFERS_FILE = "transfers.jsonl"

Status = Literal["finished", "failed", "interrupted"]
"""How a run ended. The manifest says "running" until then, and for ever if the process was killed."""

Row = dict[str, Any]

# One encoder for all lines: json.dumps with these arguments would build a new one for each of hundreds of lines.
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class Store:
    """Writes one run directory; made by `create` or `resume`, used as a context manager.

    Leaving the block by an exception before `finish` marks the run "failed", or "interrupted" for KeyboardInterrupt
    and SystemExit. Leaving it quietly without `finish` keeps the status "running".
    """

    def __init__(self, folder: Path, manifest: Row, last_round: int | None) -> None:
        """Open the three files of `folder` for append; use `create` or `resume` instead.

        last_round: the round of the last row that is in the folder; None if there is none.
        """
        self.folder = folder
        self._manifest = manifest
        self._last_round = last_round
        self._files = {name: _open_for_append(folder / name) for name in (TRANSFERS_FILE, CLIENTS_FILE, ROUNDS_FILE)}

    @classmethod
    def create(cls, folder: Path, *, config_yaml: str, manifest: Mapping[str, Any]) -> Store:
        """Start a run directory, made with its parents if need be; status "running".

        Raises ConfigError if `folder` holds finished rounds already. What an earlier run left there without
        finishing a round is cleared.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        finished = finished_rounds(folder)
        if finished:
            raise ConfigError(
                f"The run directory '{folder}' holds {len(finished)} finished rounds, and a new run must start in an "
                "empty one: resume that run, choose another folder, or delete this one."
            )
        for name in (ROUNDS_FILE, CLIENTS_FILE, TRANSFERS_FILE):
            (folder / name).write_bytes(b"")
        return cls._start(folder, config_yaml, {**manifest, "started": _now()}, last_round=None)

    @classmethod
    def resume(cls, folder: Path, *, last_round: int, config_yaml: str, manifest: Mapping[str, Any]) -> Store:
        """Go on with a run from its checkpoint of round `last_round`; what was written of later rounds is dropped.

        config_yaml, manifest: those of the run that goes on (a lengthened run has more rounds); `started` stays.
        Raises ConfigError if the folder is no run directory or its row of `last_round` is missing (0 needs none).
        """
        folder = Path(folder)
        started = read_manifest(folder)["started"]
        rows = [row for row in read_rows(folder) if row["round"] <= last_round]
        if last_round > 0 and (not rows or rows[-1]["round"] != last_round):
            raise ConfigError(
                f"The run directory '{folder}' has no row for round {last_round}, and a run can resume only after a "
                "finished round: resume from an earlier checkpoint or start the run afresh."
            )
        # Rows first: if this is cut off, what remains in the other files belongs to no finished round.
        _replace_file(folder / ROUNDS_FILE, _lines(rows))
        for name in (CLIENTS_FILE, TRANSFERS_FILE):
            kept = [line for line in _read_lines(folder / name) if line["round"] <= last_round]
            _replace_file(folder / name, _lines(kept))
        return cls._start(
            folder,
            config_yaml,
            {**manifest, "started": started, "resumed": _now(), "resumed_after_round": last_round},
            last_round=rows[-1]["round"] if rows else None,
        )

    @classmethod
    def _start(cls, folder: Path, config_yaml: str, manifest: Row, *, last_round: int | None) -> Store:
        manifest = {**manifest, "status": "running"}
        _replace_file(folder / CONFIG_FILE, config_yaml.encode())
        _replace_file(folder / MANIFEST_FILE, _manifest_bytes(manifest))
        return cls(folder, manifest, last_round)

    def write(
        self, row: Mapping[str, Any], clients: Sequence[Mapping[str, Any]], transfers: Sequence[Mapping[str, Any]]
    ) -> None:
        """Record a finished round: transfers and clients first, then the row, which is on the disk on return.

        row: metric values by name, with the integer `round`, greater than that of every earlier row.
        clients, transfers: as described at the top of this module; both may be empty.
        Raises RunError if a line is not of this round, holds what JSON cannot, or cannot be written.
        """
        number = row.get("round")
        if type(number) is not int:
            raise RunError(f"A row's 'round' is {number!r}, but it must be an integer: set it before writing the row.")
        if self._last_round is not None and number <= self._last_round:
            raise RunError(
                f"The row of round {number} comes after that of round {self._last_round}, but rounds are recorded once "
                "and in order: use Store.resume to go back to an earlier round."
            )
        for line in (*clients, *transfers):
            if line.get("round") != number:
                raise RunError(
                    f"A client or transfer line has round {line.get('round')!r} in the record of round {number}, but "
                    "all lines of a record must be of its round: set 'round' when the line is made."
                )
        # All three are encoded before the first is written, so that a bad value leaves no trace in the files.
        data = {TRANSFERS_FILE: _lines(transfers), CLIENTS_FILE: _lines(clients), ROUNDS_FILE: _lines([row])}
        if not self._files:
            raise RunError(f"The store of '{self.folder}' is closed, so round {number} cannot be written to it.")
        try:
            for name, lines in data.items():
                _write_all(self._files[name], lines)
            os.fsync(self._files[ROUNDS_FILE])
        except OSError as error:
            self.close()  # A line may be torn: nothing must be appended to it.
            raise RunError(
                f"Round {number} could not be written to '{self.folder}' ({error}): see to the disk and resume the run."
            ) from error
        self._last_round = number

    def finish(self, status: Status, **fields: Any) -> None:
        """Close the store and enter `status`, the time `ended` and `fields` (such as `error`) in the manifest."""
        self.close()
        self._manifest = {**self._manifest, **fields, "status": status, "ended": _now()}
        _replace_file(self.folder / MANIFEST_FILE, _manifest_bytes(self._manifest))

    def close(self) -> None:
        """Close the files; the manifest stays as it is. Closing twice is allowed."""
        files, self._files = self._files, {}
        for descriptor in files.values():
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and self._manifest["status"] == "running":
            interrupted = issubclass(kind, (KeyboardInterrupt, SystemExit))
            self.finish("interrupted" if interrupted else "failed", error=f"{kind.__name__}: {error}")
        self.close()


def end_run(folder: Path, status: Status, **fields: Any) -> None:
    """Enter in the manifest how a run ended whose own process cannot do it any more, and `fields` such as `error`.

    A run that has finished stays finished. Raises as `read_manifest` does.
    """
    manifest = read_manifest(folder)
    if manifest.get("status") != "finished":
        ended = {**manifest, **fields, "status": status, "ended": _now()}
        _replace_file(Path(folder) / MANIFEST_FILE, _manifest_bytes(ended))


def read_rows(folder: Path) -> list[Row]:
    """The rows of the finished rounds, in order; empty if none was finished. A torn last line is no row.

    Raises RunError if a line before the last cannot be read.
    """
    return _read_lines(Path(folder) / ROUNDS_FILE)


def read_clients(folder: Path) -> list[Row]:
    """The client lines of the finished rounds, in the order of writing. Raises RunError as `read_rows` does."""
    return _read_finished(Path(folder), CLIENTS_FILE)


def read_transfers(folder: Path) -> list[Row]:
    """The transfer lines of the finished rounds, in the order of writing. Raises RunError as `read_rows` does."""
    return _read_finished(Path(folder), TRANSFERS_FILE)


def read_manifest(folder: Path) -> Row:
    """The manifest of the run in `folder`. Raises ConfigError if there is none, RunError if it cannot be read."""
    path = Path(folder) / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"'{folder}' is no run directory, because it has no {MANIFEST_FILE}: give the folder that a run wrote."
        ) from None
    except ValueError as error:
        raise RunError(f"'{path}' is not valid JSON ({error}): restore it from a copy.") from error
    if not isinstance(manifest, dict):
        raise RunError(f"'{path}' holds {type(manifest).__name__}, not an object: restore it from a copy.")
    return manifest


def finished_rounds(folder: Path) -> list[int]:
    """The numbers of the finished rounds, in order; empty if there is none."""
    return [row["round"] for row in read_rows(folder)]


def recorded(value: Any) -> Any:
    """`value` as it is read back: None for every NaN and infinity in it, lists for tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: recorded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [recorded(item) for item in value]
    return value


def _read_finished(folder: Path, name: str) -> list[Row]:
    finished = set(finished_rounds(folder))
    return [line for line in _read_lines(folder / name) if line["round"] in finished]


def _read_lines(path: Path) -> list[Row]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    rows = []
    for index, line in enumerate(lines):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or type(row.get("round")) is not int:
                raise ValueError("not an object with an integer 'round'")
        except ValueError as error:
            if index == len(lines) - 1:
                break  # The line that the process was writing when it died.
            raise RunError(
                f"Line {index + 1} of '{path}' cannot be read ({error}), and only the last line may be torn: repair or "
                "remove the line."
            ) from error
        rows.append(row)
    return rows


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The rows as lines of JSON, each with its line end."""
    try:
        try:
            lines = [_encode(row) for row in rows]
        except ValueError:  # A NaN or an infinity: rare, so only then is every value looked at.
            lines = [_encode(recorded(row)) for row in rows]
    except TypeError as error:
        raise _not_json(error) from error
    return "".join([line + "\n" for line in lines]).encode()


def _manifest_bytes(manifest: Row) -> bytes:
    try:
        return (json.dumps(recorded(manifest), indent=2, allow_nan=False) + "\n").encode()
    except TypeError as error:
        raise _not_json(error) from error


def _not_json(error: TypeError) -> RunError:
    return RunError(f"A value cannot be recorded ({error}): record numbers, strings, booleans, lists or None.")


def _open_for_append(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _write_all(descriptor: int, data: bytes) -> None:
    """Hand all of `data` to the operating system, where it outlives this process."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def _replace_file(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        _write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory)  # The new name too must be on the disk.
    finally:
        os.close(directory)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
