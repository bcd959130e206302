"""`fedray up`: a local Ray cluster that outlives the command, with processes that have torch and fedray loaded.

A process costs seconds to start and a run is often shorter, so a pool keeps some and lends them to one run after
another. The pool is an actor of the cluster; which cluster there is stands in a file, $FEDRAY_CLUSTER or
~/.cache/fedray/cluster-MACHINE.json. This module imports ray only where it is needed: whoever looks for a cluster may
have to set Ray's environment first.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import getpass
import hashlib
import json
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedray.errors import ConfigError, RunError

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

    from fedray.sim.hosts import Team
    from fedray.sim.plan import Plan

STATE_VARIABLE = "FEDRAY_CLUSTER"
NAMESPACE, POOL = "fedray", "pool"
START_SECONDS = 90.0
END_SECONDS = 10.0
LOOK_SECONDS = 2.0
"""How often the pool looks whether those who borrowed are still there."""
HOST_BYTES = 400_000_000
"""Of a host, a driver's process and a client's, both with torch loaded."""
HOST_MEMORY_SHARE = 0.5
"""Of the machine's memory, how much the hosts that `up` starts by itself may take."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process of this machine. began: its start in the system's ticks, since numbers are given out again; "" where
    the system does not tell."""

    pid: int
    began: str

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has this number now; None if there is none, or only its remains."""
        stat = Path(f"/proc/{pid}/stat")
        if Path("/proc/self/stat").is_file():
            try:
                words = stat.read_text().rpartition(")")[2].split()
            except OSError:
                return None
            return None if words[0] == "Z" else cls(pid=pid, began=words[19])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return cls(pid=pid, began="")

    @property
    def lives(self) -> bool:
        return Process.of(self.pid) == self

    def send(self, sign: signal.Signals) -> None:
        """A signal, unless the number is another process's by now."""
        if self.lives:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sign)


@dataclass(frozen=True, kw_only=True)
class Up:
    """A cluster that `fedray up` started, as its file has it.

    address: HOST:PORT. head: the process that started Ray's own. processes: all others of the cluster when it was up.
    hosts: runs that can borrow at a time. token_path: of the file with the cluster's secret; None where it has none.
    code: a digest of fedray's modules as its processes loaded them. folder: of Ray's files.
    """

    address: str
    head: Process
    processes: tuple[Process, ...]
    cpus: int
    hosts: int
    folder: str
    token_path: str | None
    machine: str
    user: str
    python: str
    ray: str
    code: str
    started: str

    @classmethod
    def read(cls, text: str) -> Up:
        """Raises ValueError for what is no such file."""
        found = json.loads(text)
        names = {one.name for one in fields(cls)}
        if not isinstance(found, dict) or set(found) != names:
            raise ValueError("it has other fields")
        processes = tuple(Process(**one) for one in found["processes"])
        return cls(**{**found, "head": Process(**found["head"]), "processes": processes})


def state_file() -> Path:
    """Where the cluster of this user is written down."""
    named = os.environ.get(STATE_VARIABLE)
    # Machines may share a home folder, and each has a cluster of its own.
    return Path(named or f"~/.cache/fedray/cluster-{platform.node()}.json").expanduser()


def find_cluster() -> Up | None:
    """The cluster that `fedray up` started, if a run of this process may use it; see `look_for_cluster`."""
    return look_for_cluster()[0]


def look_for_cluster() -> tuple[Up | None, str | None]:
    """The cluster that `fedray up` started, or None; and where there is one that cannot be used, why, in a sentence."""
    path = state_file()
    try:
        up = Up.read(path.read_text())
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, TypeError) as error:
        return None, f"{path} is no file of fedray up ({error}) and is ignored; delete it"
    if (up.machine, up.user) != (platform.node(), _user()):
        return None, f"the cluster in {path} is {up.user}'s on {up.machine} and is ignored; fedray up starts one here"
    if not up.head.lives:
        return None, f"the cluster in {path} is gone and is ignored; fedray up starts another"
    for what, its, ours in (("Python", up.python, sys.executable), ("Ray", up.ray, version("ray"))):
        if its != ours:
            return None, f"the cluster that is up has {what} {its}, not {ours}, and is ignored; fedray down ends it"
    if up.code != code_digest():
        return None, "the cluster that is up has loaded other code of fedray and is ignored; fedray down, then up"
    return up, None


def code_digest() -> str:
    """A digest of what fedray's modules are now, by path, size and time of change."""
    package = Path(__file__).parent.parent
    found = [
        (str(path.relative_to(package)), path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(package.rglob("*.py"))
    ]
    return hashlib.blake2b(json.dumps([str(package), found]).encode(), digest_size=8).hexdigest()


def admit(up: Up) -> None:
    """Give this process what the cluster's authentication asks for. Before Ray is joined."""
    os.environ["RAY_AUTH_MODE"] = "disabled" if up.token_path is None else "token"
    if up.token_path is not None:
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ["RAY_AUTH_TOKEN_PATH"] = up.token_path


# -- lending ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Lease:
    """Processes that are lent. driver: of one actor, clients: of others; their handles."""

    number: int
    driver: Any
    clients: tuple[Any, ...]


@dataclass
class _Lent:
    lease: Lease
    borrower: Process


class Pool:
    """Keeps processes with torch loaded and lends them; an actor that belongs to no run.

    They take no CPUs of the cluster's: a borrower reserves the room that it needs as any run does, and they work
    there. What comes back from a run that failed, or from a borrower that is gone, is ended and replaced.
    """

    def __init__(self, hosts: int) -> None:
        self.hosts = hosts
        self.lock = threading.RLock()
        self.drivers: list[Any] = []
        self.clients: list[Any] = []
        self.lent: dict[int, _Lent] = {}
        self.count = 0
        self._fill()
        threading.Thread(target=self._look, name="look", daemon=True).start()

    def process_ids(self) -> list[int]:
        """Of this process and of all that it keeps, when every one has loaded torch."""
        import ray

        with self.lock:
            waiting = [driver.warm.remote() for driver in self.drivers]
            waiting += [client.process.remote() for client in self.clients]
        found = [os.getpid()]
        for answer in ray.get(waiting):
            found += answer if isinstance(answer, list) else [answer]
        return found

    def free(self) -> tuple[int, int]:
        """Drivers and clients that nobody has."""
        with self.lock:
            return len(self.drivers), len(self.clients)

    def borrow(self, clients: int, borrower: Process) -> Lease | None:
        """A driver and so many clients for a process of this machine; None where there are not enough."""
        with self.lock:
            if not self.drivers or len(self.clients) < clients:
                return None
            self.count += 1
            # Those that came back last: what a run loads on first use, they have.
            taken = tuple(self.clients.pop() for _ in range(clients))
            lease = Lease(number=self.count, driver=self.drivers.pop(), clients=taken)
            self.lent[lease.number] = _Lent(lease, borrower)
            return lease

    def give_back(self, number: int, good: bool) -> None:
        """Take a lease back; good: whether its run ended well and its processes can have another."""
        with self.lock:
            lent = self.lent.pop(number, None)
            if lent is None:
                return
            if good:
                self.drivers.append(lent.lease.driver)
                self.clients += lent.lease.clients
                return
            import ray

            for actor in (lent.lease.driver, *lent.lease.clients):
                with contextlib.suppress(Exception):  # it is gone already
                    ray.kill(actor)
            self._fill()

    def _fill(self) -> None:
        import ray

        from fedray.sim.ray_runtime import ClientActor, lone_driver

        lent_clients = sum(len(lent.lease.clients) for lent in self.lent.values())
        while len(self.drivers) + len(self.lent) < self.hosts:
            self.drivers.insert(0, lone_driver())
            self.drivers[0].warm.remote()
        while len(self.clients) + lent_clients < self.hosts:
            client = ray.remote(ClientActor).options(num_cpus=0, max_restarts=-1, max_task_retries=0)
            self.clients.insert(0, client.remote())
            self.clients[0].rehearse.remote()

    def _look(self) -> None:
        """See who is gone without having given back, for instance after kill -9."""
        while True:
            time.sleep(LOOK_SECONDS)
            with self.lock:
                for number in [number for number, lent in self.lent.items() if not lent.borrower.lives]:
                    self.give_back(number, False)


class Lender:
    """Borrows from the pool of the cluster that this process has joined."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._leases: dict[int, int] = {}

    @classmethod
    def here(cls) -> Lender | None:
        """None where the cluster has no pool: nobody gave `fedray up` for it."""
        import ray

        try:
            return cls(ray.get_actor(POOL, namespace=NAMESPACE))
        except ValueError:
            return None

    def free(self) -> tuple[int, int]:
        """Drivers and clients that could be borrowed now."""
        import ray

        free: tuple[int, int] = ray.get(self._pool.free.remote())
        return free

    def team(self, plan: Plan, group: PlacementGroup) -> Team | None:
        """A warm team for a run that has its room; None where there are too few processes, or they lack the GPU."""
        import ray

        from fedray.sim.hosts import Team

        if plan.device != "cpu":
            return None
        me = Process.of(os.getpid())
        assert me is not None
        lease: Lease | None = ray.get(self._pool.borrow.remote(plan.actors, me))
        if lease is None:
            return None
        try:
            ray.get(lease.driver.adopt.remote(plan, group, list(lease.clients)))
        except ray.exceptions.RayError:  # it has died while nobody used it: the pool starts another
            ray.get(self._pool.give_back.remote(lease.number, False))
            return None
        team = Team(plan, group, lease.driver, lender=self._take_back)
        self._leases[id(team)] = lease.number
        return team

    def _take_back(self, team: Team, good: bool) -> None:
        import ray

        number = self._leases.pop(id(team), None)
        if number is not None:
            ray.get(self._pool.give_back.remote(number, good))


# -- up and down ------------------------------------------------------------------------------------------------------


def up_command(arguments: Sequence[str], *, parser: Callable[..., argparse.ArgumentParser]) -> None:
    """`fedray up`."""
    known = parser(
        prog="fedray up",
        description="Start a Ray cluster on this machine that stays, with processes that have torch loaded; runs and "
        "sweeps that name no other find it by themselves.",
    )
    known.add_argument("--cpus", type=int, help="CPUs of the cluster; all of this machine without")
    known.add_argument("--hosts", type=int, help="warm processes, one driver and one client each; one per CPU without")
    options = known.parse_args(list(arguments))
    for name in ("cpus", "hosts"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} is {value}; it must be at least 1")
    with _locked():
        found, why = look_for_cluster()
        if found is not None:
            _check_same(found, options.cpus, options.hosts)
            print(f"up already: {_told(found)}")
            return
        if why is not None:
            _make_room(why)
        began = time.monotonic()
        cpus = options.cpus or _cpus_here()
        found = start(cpus=cpus, hosts=options.hosts or _hosts_for(cpus))
    print(f"up after {time.monotonic() - began:.0f} s: {_told(found)}")


def down_command(arguments: Sequence[str], *, parser: Callable[..., argparse.ArgumentParser]) -> None:
    """`fedray down`."""
    known = parser(prog="fedray down", description="End the cluster that fedray up started, and nothing else.")
    known.parse_args(list(arguments))
    with _locked():
        path = state_file()
        try:
            up = Up.read(path.read_text())
        except FileNotFoundError:
            print("nothing is up")
            return
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{path} is no file of fedray up ({error}); delete it") from error
        if (up.machine, up.user) != (platform.node(), _user()):
            raise ConfigError(f"the cluster in {path} is {up.user}'s on {up.machine}; give fedray down there")
        left = end(up)
        path.unlink(missing_ok=True)
    if left:
        raise RunError(f"processes {', '.join(map(str, left))} of the cluster do not end; see to them")
    print(f"down: {up.address}")


def start(*, cpus: int, hosts: int) -> Up:
    """Start a cluster and its pool and write its file; returns when every process is warm. Raises RunError."""
    # A socket's path has at most 107 bytes, of which Ray needs about 60: not below the user's cache.
    folder = Path(tempfile.mkdtemp(prefix="fedray-up-"))
    token_path = _token(folder)
    environment = {**os.environ, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # nobody has to be warned before fedray down
    environment.pop("RAY_ADDRESS", None)
    environment["RAY_AUTH_MODE"] = "disabled" if token_path is None else "token"
    if token_path is not None:
        environment.pop("RAY_AUTH_TOKEN", None)
        environment["RAY_AUTH_TOKEN_PATH"] = token_path
    log = folder / "up.log"
    command = ["-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0"]
    # With its fixed ports it could not stand beside another Ray of this machine.
    command += [f"--ray-client-server-port={_free_port()}", "--dashboard-agent-listen-port=0"]
    command += [f"--num-cpus={cpus}", "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}"]
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C in this terminal is not for it
            cwd="/",
        )
    head = Process.of(child.pid)
    try:
        if head is None:
            raise RunError(f"Ray could not be started; {_last_words(log)}")
        address = _address(folder, child, log)
        os.environ |= {name: environment[name] for name in ("RAY_AUTH_MODE", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")}
        if token_path is not None:
            os.environ["RAY_AUTH_TOKEN_PATH"] = token_path
        warm_ids = _start_pool(address, hosts)
        members = sorted({*_descendants(child.pid), *warm_ids} - {child.pid})
        up = Up(
            address=address,
            head=head,
            processes=tuple(found for found in map(Process.of, members) if found is not None),
            cpus=cpus,
            hosts=hosts,
            folder=str(folder),
            token_path=token_path,
            machine=platform.node(),
            user=_user(),
            python=sys.executable,
            ray=version("ray"),
            code=code_digest(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        _write(up)
    except BaseException:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(END_SECONDS)
        child.kill()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return up


def end(up: Up) -> list[int]:
    """End the processes of a cluster, and those alone; the numbers of those that did not go."""
    everyone = (up.head, *up.processes)
    up.head.send(signal.SIGTERM)  # it ends Ray's own, and those end their workers
    deadline = time.monotonic() + END_SECONDS
    while any(process.lives for process in everyone) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in everyone:
        process.send(signal.SIGKILL)
    deadline = time.monotonic() + END_SECONDS
    while any(process.lives for process in everyone) and time.monotonic() < deadline:
        time.sleep(0.1)
    if Path(up.folder).name.startswith("fedray-up-"):
        shutil.rmtree(up.folder, ignore_errors=True)
    return [process.pid for process in everyone if process.lives]


def _start_pool(address: str, hosts: int) -> list[int]:
    """Start the pool of a new cluster; the process ids of all that it keeps, once they are warm."""
    import ray

    from fedray.sim import ray_runtime

    ray_runtime.connect(address, num_cpus=None, temp_dir=None, dashboard=False)
    try:
        remote: Any = ray.remote
        pool = (
            remote(Pool)
            # Threads, because the answer of those who load torch shall not keep others waiting.
            .options(name=POOL, namespace=NAMESPACE, lifetime="detached", num_cpus=0, max_concurrency=4)
            .remote(hosts)
        )
        found: list[int] = ray.get(pool.process_ids.remote(), timeout=START_SECONDS)
        return found
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise RunError(f"the warm processes could not be started ({ray_runtime.last_line(str(error))})") from error
    finally:
        ray.shutdown()


def _address(folder: Path, child: subprocess.Popen[bytes], log: Path) -> str:
    """HOST:PORT of a cluster that is being started, as soon as it says so."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise RunError(f"Ray ended with exit code {child.returncode} instead of starting; {_last_words(log)}")
        with contextlib.suppress(OSError):
            found = (folder / "ray_current_cluster").read_text().strip()
            # The file is written when Ray's processes have been started, and they need a moment more.
            if found:
                return found
        time.sleep(0.05)
    raise RunError(f"Ray did not start within {START_SECONDS:.0f} s; {_last_words(log)}")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        port: int = found.getsockname()[1]
        return port


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"its last words: {lines[-1]}" if lines else "it said nothing"


def _token(folder: Path) -> str | None:
    """The file with a new secret that only this user can read; None where the user has switched tokens off."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return None
    path = folder / "token"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, secrets.token_hex(32).encode())
    finally:
        os.close(descriptor)
    return str(path)


def _write(up: Up) -> None:
    path = state_file()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(up), indent=1) + "\n")
    temporary.replace(path)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Two that go up or down at once do it one after the other."""
    path = state_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"{STATE_VARIABLE} is {str(path)!r}, where the cluster is written down; it cannot be written ({error})"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make_room(why: str) -> None:
    """Before a new cluster takes the place of one that cannot be used: it must be gone."""
    path = state_file()
    try:
        before: Up | None = Up.read(path.read_text())
    except (OSError, ValueError, TypeError):
        before = None
    if before is None or (before.machine, before.user) != (platform.node(), _user()):
        raise ConfigError(
            f"{why.split(' and is ignored', maxsplit=1)[0]}; fedray up leaves it alone: give fedray down there, or "
            f"name another file in {STATE_VARIABLE}"
        )
    if before.head.lives:
        raise ConfigError(f"{why} again")
    print(why.split(" and is ignored", maxsplit=1)[0])
    end(before)
    path.unlink(missing_ok=True)


def _check_same(up: Up, cpus: int | None, hosts: int | None) -> None:
    for name, wanted, has in (("cpus", cpus, up.cpus), ("hosts", hosts, up.hosts)):
        if wanted is not None and wanted != has:
            raise ConfigError(f"--{name} is {wanted}; the cluster that is up has {has}: give fedray down first")


def _told(up: Up) -> str:
    return f"{up.address}, {up.cpus} CPUs, {up.hosts} warm hosts; fedray down ends it"


def _cpus_here() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _hosts_for(cpus: int) -> int:
    from fedray.sim.tenancy import node_memory_bytes

    return max(1, min(cpus, int(node_memory_bytes() * HOST_MEMORY_SHARE // HOST_BYTES)))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user without a name, as in a container
        return str(os.getuid())


def _descendants(pid: int) -> list[int]:
    """The processes below this one, by Linux's table of them; empty elsewhere."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, waiting = [], list(children.get(pid, ()))
    while waiting:
        found.append(waiting.pop())
        waiting += children.get(found[-1], ())
    return found
