"""The state of a sweep on disk: sweep.json for readers, claims so that two launchers do not run one cell twice.

Both may be on a folder that several machines share, so a file is taken by creating it, and times are those of the
folder's own clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedray.errors import RunError

SWEEP_FILE = "sweep.json"
CLAIMS = ".claims"
BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
"""A claim that has not been renewed for so long is of a launcher that is gone."""
LOCK_SECONDS = 10.0

Row = dict[str, Any]


def read_sweep(folder: Path) -> Row:
    """The content of sweep.json; {} where there is none. Raises RunError if it cannot be read."""
    path = Path(folder) / SWEEP_FILE
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RunError(f"'{path}' is not valid JSON ({error}): delete it; the next sweep writes it anew") from error
    if not isinstance(found, dict):
        raise RunError(f"'{path}' holds no object: delete it; the next sweep writes it anew")
    return found


def write_sweep(folder: Path, facts: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Enter facts and rows of cells; rows of other commands, and of launchers elsewhere, stay.

    A row is {"id", "folder", "overrides", "status", "error", "seconds", "tries"}; folder: below this one.
    """
    path = folder / SWEEP_FILE
    with _locked(folder / f".{SWEEP_FILE}.lock"):
        before = read_sweep(folder)
        # What another launcher is at, or what is done, is more than that this one waits for it or has passed it over.
        told = {r["folder"] for r in before.get("cells", ()) if r["status"] in ("running", "done")}
        rows = [row for row in rows if row["status"] not in ("waiting", "skipped") or row["folder"] not in told]
        # A cell that was refused has no id; when it is mended it has one, and so another folder.
        known = {row["folder"] for row in rows}, [row["overrides"] for row in rows]
        others = [r for r in before.get("cells", ()) if r["folder"] not in known[0] and r["overrides"] not in known[1]]
        digests = {**before.get("digests", {}), **facts.get("digests", {})}
        whole = {**before, **facts, "digests": digests, "cells": [*others, *rows]}
        temporary = path.with_name(f".{SWEEP_FILE}.{platform.node()}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(whole, indent=1) + "\n")
        temporary.replace(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock for a moment; one that was left behind is broken: the same one must have been there all the time."""
    mine, seen, since = uuid.uuid4().hex, None, time.monotonic()
    while not _take(path, mine):
        now, there = time.monotonic(), _text(path)
        if there is None or there != seen:
            seen, since = there, now
        elif now - since > LOCK_SECONDS:
            # Of several that wait, one removes it: a second name is given to a file only once.
            aside = path.with_name(f"{path.name}.{mine}")
            with contextlib.suppress(FileNotFoundError):
                path.rename(aside)
            aside.unlink(missing_ok=True)
            seen = None
        time.sleep(0.02)
    try:
        yield
    finally:
        if _text(path) == mine:
            path.unlink(missing_ok=True)


class Claims:
    """The cells that this launcher works at, as files beside their folders; a context manager that renews them.

    A claim is taken over from a launcher on this machine that is gone, or from one elsewhere that has not renewed it
    for a minute.
    """

    def __init__(self, root: Path) -> None:
        self.folder = root / CLAIMS
        self.folder.mkdir(parents=True, exist_ok=True)
        self.held: set[Path] = set()
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        for path in list(self.held):
            self.release(path.name)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def take(self, name: str) -> str | None:
        """Claim the cell of this folder's name; None if it is ours now, else who has it."""
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # a launcher that ended has removed the folder meanwhile
                return self._claim(name)

    def _claim(self, name: str) -> str | None:
        path, mine = self.folder / name, json.dumps(_me())
        if not _take(path, mine):
            with _locked(path.with_name(f"{name}.lock")):
                holder = self._holder(path)
                if holder is not None:
                    return holder
                path.unlink(missing_ok=True)
                if not _take(path, mine):
                    return "another launcher"
        with self._lock:
            self.held.add(path)
        return None

    def release(self, name: str) -> None:
        path = self.folder / name
        with self._lock:
            self.held.discard(path)
        if _holder_of(_text(path)) == _me():
            path.unlink(missing_ok=True)

    def _holder(self, path: Path) -> str | None:
        """Who has this claim; None if nobody is behind it any more."""
        try:
            age = self._now() - path.stat().st_mtime
            holder = _holder_of(path.read_text())
        except FileNotFoundError:
            return None
        who = f"process {holder.get('pid')} on {holder.get('host')}"
        if holder and (holder.get("host"), holder.get("space", _space())) == (platform.node(), _space()):
            # It may be stopped and renew nothing; its runs go on all the same.
            return who if _lives(holder) else None
        return None if age > STALE_SECONDS else who

    def _now(self) -> float:
        """The time by the clock of the folder, which may be another machine's."""
        clock = self.folder / f".clock-{platform.node()}-{os.getpid()}"
        clock.write_text("")
        now = clock.stat().st_mtime
        clock.unlink(missing_ok=True)
        return now

    def _beat(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            with self._lock:
                for path in self.held:
                    with contextlib.suppress(OSError):
                        if _holder_of(_text(path)) == _me():  # else somebody took us for gone
                            os.utime(path)


def _take(path: Path, text: str) -> bool:
    """Create a file with this text; False if it is there already."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
    return True


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _holder_of(text: str | None) -> Row:
    """What a claim says; {} where it is being written, or a crash has cut it off."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _me() -> Row:
    return {"host": platform.node(), "space": _space(), "pid": os.getpid(), "began": _began(os.getpid())}


def _space() -> str:
    """Where process numbers mean the same: this start of this machine, and in a container this one. "" if not told."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _lives(holder: Mapping[str, Any]) -> bool:
    """Whether a process of this machine is still the one that made a claim: numbers are given out again."""
    began = _began(holder.get("pid", 0))
    return began is not None and began == holder.get("began", began)


def _began(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; None if there is none, "" where it is not told."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        words = stat.read_text().rpartition(")")[2].split()
        return None if words[0] == "Z" else words[19]  # a zombie has only its parent left to tell
    except OSError:
        pass
    if Path("/proc/self/stat").is_file():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return ""
    return ""
