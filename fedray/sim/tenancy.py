"""What a run changes of the process that it lives in, and how it is undone before the next one moves in.

A process with torch loaded costs seconds, so it is lent to one run after another. A tenant may change whatever Python
code can; what a run is known to touch is put back, and the process of a run that failed is not used again.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path


@dataclass
class Tenancy:
    """The tenant of this process: made when torch is loaded and before the first run moves in.

    environment, folder: what processes that are started here inherit. generators: how to put back the state of the
    global random generators, that a run of its own process would find. code: the user's modules, unpacked.
    limit: the ceiling of memory as it was, in bytes; None while it is not lowered. added: to where Python imports from,
    for the run alone. modules: that were loaded before it.
    """

    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    folder: str = field(default_factory=os.getcwd)
    generators: list[Callable[[], None]] = field(default_factory=lambda: _generators())
    code: str | None = None
    limit: tuple[int, int] | None = None
    added: list[str] = field(default_factory=list)
    modules: set[str] = field(default_factory=set)

    def move_in(
        self, code: bytes, memory_bytes: int | None, path: Sequence[str] = (), folder: str | None = None
    ) -> None:
        """Make the user's modules importable, from a zip file of them, and lower the ceiling of memory.

        memory_bytes: what the tenant may take beyond what the process has now; None for no ceiling. path: where the
        one who started the run imports from; what is missing here is added. folder: where that process works.
        """
        if folder is not None:
            with contextlib.suppress(OSError):  # on another machine it may not be there
                os.chdir(folder)
        self.added = [entry for entry in dict.fromkeys(path) if entry not in sys.path]
        self.modules = set(sys.modules) if self.added else set()
        sys.path += self.added
        if code:
            self.code = tempfile.mkdtemp(prefix="fedray-code-")
            with zipfile.ZipFile(BytesIO(code)) as archive:
                archive.extractall(self.code)
            sys.path.insert(0, self.code)
        if memory_bytes is not None:
            self.limit = _lower_ceiling(memory_bytes)

    def move_out(self) -> None:
        """Put everything back; what the tenant left in memory is collected."""
        if self.limit is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_DATA, self.limit)
            self.limit = None
        if self.code is not None:
            _forget(self.code)
            self.code = None
        self._forget_added()
        for name in set(os.environ) - set(self.environment):
            del os.environ[name]
        for name, value in self.environment.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
        with contextlib.suppress(OSError):  # somebody has removed it
            os.chdir(self.folder)
        for put_back in self.generators:
            put_back()
        import torch

        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        torch.set_num_threads(1)
        gc.unfreeze()
        gc.collect()

    def _forget_added(self) -> None:
        """Unload what was imported from the folders that the tenant added: it may be other code by the next one."""
        for name in set(sys.modules) - self.modules if self.added else ():
            file = getattr(sys.modules[name], "__file__", None)
            above = [entry for entry in sys.path if isinstance(file, str) and file.startswith(entry + os.sep)]
            # A library below such a folder, as in a virtual environment there, is nobody's own code.
            if above and max(above, key=len) in self.added:
                del sys.modules[name]
        for entry in self.added:
            with contextlib.suppress(ValueError):
                sys.path.remove(entry)
            sys.path_importer_cache.pop(entry, None)
        self.added = []


def _generators() -> list[Callable[[], None]]:
    """What puts the global random generators back to where they are now."""
    import numpy as np
    import torch

    of_torch, of_numpy, of_python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    return [
        lambda: torch.set_rng_state(of_torch),
        lambda: np.random.set_state(of_numpy),
        lambda: random.setstate(of_python),
    ]


def _forget(folder: str) -> None:
    """Unload the modules that came from this folder and remove it."""
    with contextlib.suppress(ValueError):
        sys.path.remove(folder)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
        if isinstance(file, str) and file.startswith(folder + os.sep):
            del sys.modules[name]
    sys.path_importer_cache.pop(folder, None)
    shutil.rmtree(folder, ignore_errors=True)


def _lower_ceiling(memory_bytes: int) -> tuple[int, int] | None:
    """Allow this process so many bytes of private memory more; the limits that were. Only Linux counts them."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    import resource

    now = next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmData"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = now + memory_bytes
    highest = wanted if before[1] == resource.RLIM_INFINITY else min(wanted, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (highest, before[1]))
    return before


def node_memory_bytes() -> int:
    """The memory of this machine, or what its control group leaves of it."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # none here, or "max"
            found.append(int(Path(path).read_text()))
    return min(found)
