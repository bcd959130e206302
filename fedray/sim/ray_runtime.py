"""Rounds on Ray: a driver actor per run, client actors in its placement group.

This module imports neither torch nor the model code at its top: actor processes load them in their constructors,
all at the same time.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import os
import pickle
import socket
import threading
import time
import traceback
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import (
    AuthenticationError,
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fedray.errors import ClientError, ConfigError, FedrayError, RunError
from fedray.sim.plan import Cluster, Plan
from fedray.sim.tenancy import Tenancy

if TYPE_CHECKING:
    from fedray.round import Server, View
    from fedray.sim.client import Broadcast, EvalReply, Record, TrainReply
    from fedray.sim.population import Population
    from fedray.sim.runtime import EvalWork, Question

LOST = (RayActorError, WorkerCrashedError, OwnerDiedError, ObjectLostError, OutOfMemoryError)
"""What a dead process looks like to whoever waits for it."""
MALLOPT_TRIM_THRESHOLD, MALLOPT_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
MAX_DEATHS = 3
MAX_RESTART_TRIES = 240  # half-second waits for a process that Ray is restarting
POLL_SECONDS = 0.5  # how soon a run that waits for an answer notices that it was asked to stop


@dataclass(frozen=True, kw_only=True)
class Sealed:
    """A run on its way to an actor. code: the user's own modules, zipped; they must be there before unpickling.

    memory_bytes: what each process of the run may take beyond what it has before; None for no ceiling. path,
    folder: where whoever starts the run imports from and works; a process that was lent may be used to others.
    """

    code: bytes
    spec: bytes
    memory_bytes: int | None = None
    path: tuple[str, ...] = ()
    folder: str | None = None

    def open(self, tenancy: Tenancy) -> Any:
        """Move in: make the user's modules importable in this process, and unpickle the specification."""
        tenancy.move_in(self.code, self.memory_bytes, self.path, self.folder)
        return pickle.loads(self.spec)


def zip_code(folder: str | None) -> bytes:
    """The Python files below a folder, so that code beside --config-dir can be imported in every actor."""
    if folder is None or not any(Path(folder).rglob("*.py")):
        return b""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted(Path(folder).rglob("*.py")):
            archive.write(path, path.relative_to(folder))
    return buffer.getvalue()


# -- joining and leaving a cluster -----------------------------------------------------------------------------------

TOKEN_HELP = (
    "If it wants a token: export RAY_AUTH_MODE=token here and on every node, with the same RAY_AUTH_TOKEN (or "
    "RAY_AUTH_TOKEN_PATH; `ray get-auth-token --generate` makes one). In a network that you trust: export "
    "RAY_AUTH_MODE=disabled on all of them"
)


def connect(address: str | None, *, num_cpus: int | None, temp_dir: str | None, dashboard: bool) -> bool:
    """Join the cluster at `address` (or RAY_ADDRESS), or start a local one; whether this call did it.

    address: "local" starts one whatever RAY_ADDRESS says.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    wanted = address or os.environ.get("RAY_ADDRESS")
    if wanted and wanted != "local":
        try:
            _knock(wanted)
            ray.init(address=wanted, **quiet)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"runtime.address is {wanted!r}; no Ray cluster lets us in there ({reason}). {TOKEN_HELP}"
            ) from error
        return True
    try:
        # The dashboard, with the state API, is ten processes that start beside ours and wake up all the time.
        shown = {"include_dashboard": True, "dashboard_port": 0} if dashboard else {"include_dashboard": False}
        ray.init(address="local", num_cpus=num_cpus, _temp_dir=temp_dir, **shown, **quiet)
    except OSError as error:
        # A socket's path has at most 107 bytes, of which Ray needs about 60.
        raise ConfigError(
            f"runtime.temp_dir is {temp_dir!r}; Ray cannot work there ({error}). Choose a short path"
        ) from error
    except AuthenticationError as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        raise ConfigError(f"Ray does not start here ({reason}). {TOKEN_HELP}") from error
    return True


def _knock(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()


def look_at_cluster() -> Cluster:
    """What the cluster has in all."""
    total = ray.cluster_resources()
    memory = 0.0
    gpu_bytes = 0
    for node in ray.nodes():
        if node["Alive"]:
            memory += node["Resources"].get("memory", 0.0)
    return Cluster(cpus=total.get("CPU", 0.0), gpus=total.get("GPU", 0.0), memory_bytes=memory, gpu_bytes=gpu_bytes)


def wait_for_group(group: PlacementGroup, plan: Plan, note: Callable[[str], None]) -> None:
    """Wait until the run's bundles are its own; says what is missing while others hold it."""
    waited = 0
    while not group.wait(timeout_seconds=15):
        waited += 15
        free = ray.available_resources()
        note(
            f"waiting for {plan.slots} x {plan.bundle}: free now {free.get('CPU', 0):g} CPU, "
            f"{free.get('GPU', 0):g} GPU ({waited} s); other runs hold the rest"
        )


# -- actors ----------------------------------------------------------------------------------------------------------


class ClientActor:
    """A process that hosts clients of one run after another. Holds their records between rounds; they are also what
    its calls return."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        import fedray.sim.client  # noqa: F401 - loaded now, while other processes do the same

        self.tenancy = Tenancy()
        self.tenant = ""
        self.worker: Any = None
        self.records: dict[int, tuple[int, Any]] = {}
        _keep_freed_memory()

    def process(self) -> int:
        """The process id, as soon as torch is loaded."""
        return os.getpid()

    def rehearse(self) -> int:
        """Load what the first run would load; the process id."""
        _rehearse()
        return os.getpid()

    def ready(self, tenant: str, sealed: Sealed, population: Any) -> tuple[int, str, str]:
        """Host the clients of this run, unless this process does so already; process id, the engine that was resolved,
        and why. tenant: names the run."""
        if tenant != self.tenant:
            from fedray.sim.client import Worker

            self.leave(self.tenant)
            spec = sealed.open(self.tenancy)
            whole = fetch(population)
            whole.touch()
            self.worker, self.tenant = Worker(spec, whole), tenant
            # Half a million objects of torch and its compiler never die: the collector need not look at them again.
            gc.collect()
            gc.freeze()
        return os.getpid(), self.worker.engine.kind, self.worker.engine.reason

    def leave(self, tenant: str) -> None:
        """Forget this run, unless the process has another by now."""
        if self.tenant and tenant == self.tenant:
            self.tenant, self.worker, self.records = "", None, {}
            self.tenancy.move_out()

    def train(
        self,
        broadcast: Broadcast,
        clients: Sequence[int],
        versions: Sequence[int],
        gone: Sequence[int],
        *held: tuple[int, Mapping[int, Any]],
    ) -> tuple[Any, tuple[int, Mapping[int, Any]]]:
        """Train clients. versions: the round of each one's committed record, 0 for none.

        gone: clients that live elsewhere now. held: (version, records by client), for clients whose committed version
        this process does not have.
        """
        try:
            for client in gone:
                self.records.pop(client, None)
            reply, changed = self.worker.train(broadcast, clients, self._records(clients, versions, held))
            for client, record in changed.items():
                self.records[client] = (broadcast.round, record)
            return reply, (broadcast.round, changed)
        except FedrayError as error:
            return Failure.of(error), (broadcast.round, {})

    def ask(
        self,
        question: Question,
        broadcast: Broadcast,
        clients: Sequence[int],
        versions: Sequence[int],
        arguments: Sequence[Any],
        *held: tuple[int, Mapping[int, Any]],
    ) -> Any:
        """Call this method of the worker; versions and held as in `train`."""
        try:
            records = self._records(clients, versions, held)
            return getattr(self.worker, question)(broadcast, clients, records, *arguments)
        except FedrayError as error:
            return Failure.of(error)

    def _records(self, clients: Sequence[int], versions: Sequence[int], held: Sequence[Any]) -> dict[int, Any]:
        mine: dict[int, Any] = {}
        for client, version in zip(clients, versions, strict=True):
            if version == 0:
                continue
            if self.records.get(client, (0, None))[0] != version:
                # An older bundle may hold the same client's earlier record: the version decides.
                (record,) = [records[client] for at, records in held if at == version and client in records]
                self.records[client] = (version, record)
            mine[client] = self.records[client][1]
        return mine

    def evaluate(self, server: Server, start: int, stop: int, batch_size: int, tag: str) -> Any:
        """Score test rows start to stop."""
        try:
            return self.worker.evaluate(server, start, stop, batch_size, tag)
        except FedrayError as error:
            return Failure.of(error)


def _rehearse() -> None:
    """Record the step of a tiny model and count its FLOPs: half of torch's compiler is loaded for either."""
    import torch
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

    from fedray.train.traced import TracedStep

    x, y = torch.zeros(3, 2), torch.zeros(3).long()
    with torch.random.fork_rng(devices=[]):
        module = nn.Linear(2, 2)
    TracedStep(module, nn.functional.cross_entropy, x, y)
    with FlopCounterMode(display=False):
        module(x).sum().backward()


def store(population: Population, stored: dict[tuple[int, ...], tuple[Any, Any]]) -> Any:
    """Put a population into the object store; its reference.

    The samples are an object of their own: populations that deal the same ones have it in common. stored: what was
    put there before, by the identity of the arrays; what is in it stays in memory.
    """
    names = ("train_x", "train_y", "test_x", "test_y")
    arrays = tuple(getattr(population, name) for name in names)
    which = tuple(id(array) for array in arrays)
    if which not in stored:
        stored[which] = (arrays, ray.put(arrays))
    kept: Any = dict.fromkeys(names, stored[which][1])
    return ray.put(replace(population, **kept))


def fetch(population: Population) -> Population:
    """A population from the object store with its samples, as views of shared memory."""
    samples: Any = population.train_x
    if not isinstance(samples, ray.ObjectRef):
        return population
    found: Any = ray.get(samples)
    train_x, train_y, test_x, test_y = found
    return replace(population, train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y)


def _keep_freed_memory() -> None:
    """Ask glibc to keep what is freed: buffers of a model's size come and go by the dozen in every call, and giving
    their pages back to the system means to fetch them again, one fault each."""
    with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to ask
        library = ctypes.CDLL(None)
        for option in (MALLOPT_TRIM_THRESHOLD, MALLOPT_MMAP_THRESHOLD):
            library.mallopt(option, 1 << 30)


@dataclass(frozen=True)
class Failure:
    """An error of ours as a value, so that it arrives as itself and not wrapped in Ray's."""

    error: FedrayError
    trace: str

    @classmethod
    def of(cls, error: FedrayError) -> Failure:
        return cls(error, traceback.format_exc())


@dataclass
class _Call:
    """One call in flight or waiting: training, an evaluation, or the wait for a restarted process. actor None: any.

    question: what clients are asked, and with which arguments; None where they train.
    """

    cost: float
    actor: int | None
    clients: tuple[int, ...] = ()
    evaluation: EvalWork | None = None
    restart: bool = False
    tries: int = 0
    question: tuple[Question, tuple[Any, ...]] | None = None


@dataclass
class _Work:
    """The calls of a round. flying: by reference, with the actor and the reference of the records."""

    broadcast: Any
    waiting: list[_Call]
    flying: dict[Any, tuple[_Call, int, Any]] = field(default_factory=dict)
    busy: set[int] = field(default_factory=set)


class RayRuntime:
    """Client actors in a placement group; lives in the driver process, which owns them."""

    def __init__(
        self,
        *,
        plan: Plan,
        sealed: Sealed,
        population: Any,
        group: PlacementGroup | None,
        seed: int,
        log_path: str,
        stop: threading.Event,
        actors: Sequence[Any] | None = None,
    ) -> None:
        """population: its reference. actors: processes that have no run now; None to start them."""
        self.plan = plan
        self.seed = seed
        self.log_path = log_path
        self.stop = stop
        self.homes: dict[int, int] = {}
        self.committed: dict[int, tuple[int, Any]] = {}
        self.held_by: dict[int, int] = {}  # the actor that has a client's committed record in its memory
        self.moved: dict[int, set[int]] = {}  # clients whose records an actor need not keep any more
        self.deaths: dict[int, int] = {}
        self.gone: set[int] = set()  # actors that died and have not said since that they host this run
        self.losses: list[str] = []  # for the log
        self.actors: list[Any] = list(start_clients(plan, group) if actors is None else actors)
        # What a process is told when it begins, and again when it was restarted.
        self.tenant = (uuid.uuid4().hex, ray.put(sealed), population)
        self.begun = [actor.ready.remote(*self.tenant) for actor in self.actors]

    def leave(self) -> None:
        """Tell the processes to forget this run."""
        for actor in self.actors:
            actor.leave.remote(self.tenant[0])

    def take_losses(self) -> list[str]:
        losses, self.losses = self.losses, []
        return losses

    def wait_ready(self) -> tuple[str, str]:
        """Until every actor has loaded its model."""
        waiting = {ref: (index, 0) for index, ref in enumerate(self.begun)}
        engine = ("", "")
        while waiting:
            for ref in self._wait(list(waiting)):
                index, tries = waiting.pop(ref)
                try:
                    _, *found = ray.get(ref)
                    engine = (found[0], found[1])
                except RayTaskError as error:
                    raise _cause(error) from error
                except LOST as error:
                    # A constructor that raises ends the actor for good; the reason is in the error.
                    if "creation task" in str(error) or tries >= MAX_DEATHS:
                        raise RunError(f"client actor {index} could not start: {last_line(str(error))}") from error
                    time.sleep(POLL_SECONDS)
                    waiting[self.actors[index].ready.remote(*self.tenant)] = (index, tries + 1)
        return engine

    def put(self, value: Broadcast | Server | View) -> Any:
        return ray.put(value)

    def start(
        self, broadcast: Any, clients: Sequence[tuple[int, float]], evaluations: Sequence[EvalWork]
    ) -> Iterator[TrainReply | EvalReply]:
        """At most one call in flight per slot and per actor; training first, the longest first."""
        waiting = sorted(self._train_calls(clients), key=lambda call: -call.cost)
        waiting += [_Call(cost=0.0, actor=None, evaluation=work) for work in evaluations]
        return self._answers(self._open(broadcast, waiting))

    def ask(
        self, question: Question, broadcast: Any, clients: Sequence[tuple[int, float]], *arguments: Any
    ) -> Iterator[Any]:
        """Each client is asked where it lives."""
        chunks: dict[int, list[int]] = {}
        for client, _ in clients:
            chunks.setdefault(self.homes.get(client, self.plan.home(client)), []).append(client)
        asked = (question, arguments)
        waiting = [
            _Call(cost=float(len(members)), actor=actor, clients=tuple(sorted(members)), question=asked)
            for actor, members in chunks.items()
        ]
        return self._answers(self._open(broadcast, waiting))

    def snapshot(self) -> Any:
        """The committed records as they are now; references, so that nothing is loaded or copied."""
        return dict(self.committed)

    def load(self, snapshot: Any) -> dict[int, Record]:
        bundles = {ref: ray.get(ref)[1] for ref in dict.fromkeys(ref for _, ref in snapshot.values())}
        return {client: bundles[ref][client] for client, (_, ref) in snapshot.items()}

    def restore(self, records: Mapping[int, Record], round: int) -> None:
        ref = ray.put((round, dict(records)))
        self.committed = {client: (round, ref) for client in records}
        self.held_by = {}

    # -- inside --------------------------------------------------------------------------------------------------

    def _open(self, broadcast: Any, waiting: list[_Call]) -> _Work:
        """Send the first calls. A process that died when another piece of work was given up has nothing of this run."""
        work = _Work(broadcast=broadcast, waiting=waiting)
        for actor in sorted(self.gone):
            work.busy.add(actor)
            self._restart(work, actor, tries=0)
        self._fill(work)
        return work

    def _restart(self, work: _Work, actor: int, tries: int) -> None:
        """Have a process that Ray starts again host this run, before anything else is sent to it."""
        call = _Call(cost=0.0, actor=actor, restart=True, tries=tries)
        work.flying[self.actors[actor].ready.remote(*self.tenant)] = (call, actor, None)

    def _answers(self, work: _Work) -> Iterator[Any]:
        while work.flying:
            for ref in self._wait(list(work.flying)):
                call, actor, records = work.flying.pop(ref)
                try:
                    reply = self._receive(ref, actor, records)
                except LOST as error:
                    # Nothing is sent to a process that is not back: a call that fails there is a death of its own.
                    self.gone.add(actor)
                    work.waiting[:0] = self._again(call, actor, error)
                    self._restart(work, actor, tries=call.tries + 1 if call.restart else 0)
                    continue
                if call.restart:
                    self.gone.discard(actor)
                work.busy.discard(actor)
                self._fill(work)  # before the answer is looked at: the slot shall not wait for the driver
                if not call.restart:
                    yield reply

    def _fill(self, work: _Work) -> None:
        """Send what the free slots can take."""
        while len(work.flying) < self.plan.slots:
            call = next((c for c in work.waiting if c.actor is None or c.actor not in work.busy), None)
            if call is None:
                return
            actor = call.actor if call.actor is not None else self._idle(work.busy)
            if actor is None:
                return
            work.waiting.remove(call)
            work.busy.add(actor)
            ref, records = self._submit(call, actor, work.broadcast)
            work.flying[ref] = (call, actor, records)

    def _train_calls(self, clients: Sequence[tuple[int, float]]) -> list[_Call]:
        """One call an actor. Where every slot has one actor, clients move so that the slots end together."""
        chunks: dict[int, list[tuple[int, float]]] = {}
        movable = self.plan.actors == self.plan.slots
        load = dict.fromkeys(range(self.plan.actors), 0.0)
        fair = sum(cost + 1 for _, cost in clients) / self.plan.slots
        for client, cost in sorted(clients, key=lambda pair: (-pair[1], pair[0])):
            actor = self.homes.get(client, self.plan.home(client))
            if movable and load[actor] + cost + 1 > fair * 1.02:
                actor = min(load, key=lambda index: (load[index], index))
            load[actor] += cost + 1
            self.homes[client] = actor
            chunks.setdefault(actor, []).append((client, cost))
        return [
            _Call(cost=sum(cost for _, cost in chunk), actor=actor, clients=tuple(sorted(c for c, _ in chunk)))
            for actor, chunk in chunks.items()
        ]

    def _idle(self, busy: set[int]) -> int | None:
        return next((index for index in range(len(self.actors)) if index not in busy), None)

    def _submit(self, call: _Call, actor: int, broadcast: Any) -> tuple[Any, Any]:
        handle = self.actors[actor]
        if call.evaluation is not None:
            work = call.evaluation
            return handle.evaluate.remote(work.handle, work.start, work.stop, work.batch_size, work.tag), None
        versions: list[int] = []
        held: dict[Any, None] = {}
        for client in call.clients:
            version, ref = self.committed.get(client, (0, None))
            versions.append(version)
            if ref is not None and self.held_by.get(client) != actor:
                held[ref] = None
        if call.question is not None:
            question, arguments = call.question
            return handle.ask.remote(question, broadcast, call.clients, versions, arguments, *held), None
        gone = tuple(self.moved.pop(actor, set()) - set(call.clients))
        reply, records = handle.train.options(num_returns=2).remote(broadcast, call.clients, versions, gone, *held)
        return reply, records

    def _receive(self, ref: Any, actor: int, records: Any) -> Any:
        try:
            reply = ray.get(ref)
        except RayTaskError as error:
            raise _cause(error) from error
        if isinstance(reply, Failure):
            reply.error.add_note(reply.trace)  # what happened there, for the log
            raise reply.error
        for result in getattr(reply, "results", ()):
            if result.record_changed:
                self.committed[result.client] = (result.transfers[0].round, records)
            before = self.held_by.get(result.client, actor)
            if before != actor:
                self.moved.setdefault(before, set()).add(result.client)
            self.held_by[result.client] = actor
        return reply

    def _again(self, call: _Call, actor: int, error: Exception) -> list[_Call]:
        """A process died under this call: what is to be repeated, one client at a time, so that a culprit is found."""
        for client in [c for c, holder in self.held_by.items() if holder == actor]:
            del self.held_by[client]
        if call.restart:
            if call.tries >= MAX_RESTART_TRIES:
                raise RunError(f"actor {actor} does not come back ({last_line(str(error))}); see {self.log_path}")
            time.sleep(POLL_SECONDS)
            return []
        work = f"clients {', '.join(map(str, call.clients))}" if call.clients else "an evaluation"
        self.losses.append(f"actor {actor} died under {work}; restarting it and repeating the call")
        if call.evaluation is not None:
            tries = self._count(call.tries, "an evaluation", error)
            return [_Call(cost=call.cost, actor=None, evaluation=call.evaluation, tries=tries)]
        for client in call.clients:
            self.deaths[client] = self._count(self.deaths.get(client, 0), f"client {client}", error)
        return [
            _Call(cost=call.cost, actor=actor, clients=(client,), question=call.question) for client in call.clients
        ]

    def _count(self, deaths: int, whose: str, error: Exception) -> int:
        if deaths + 1 >= MAX_DEATHS:
            raise ClientError(
                f"{whose} lost its actor {MAX_DEATHS} times ({last_line(str(error))}); seed {self.seed}, "
                f"log {self.log_path}"
            )
        return deaths + 1

    def _wait(self, refs: list[Any]) -> list[Any]:
        while True:
            if self.stop.is_set():
                from fedray.sim.runtime import Stopped

                raise Stopped
            ready, _ = ray.wait(refs, num_returns=1, timeout=POLL_SECONDS, fetch_local=False)
            if ready:
                return ready


def _cause(error: RayTaskError) -> Exception:
    """Our own error from inside a Ray task error; anything else as a RunError with its last line."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, FedrayError) else RunError(last_line(str(error)))


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


# -- the driver ------------------------------------------------------------------------------------------------------


def start_clients(plan: Plan, group: PlacementGroup | None) -> list[Any]:
    """The client actors of a plan, dealt out over its bundles; they load torch and wait for a run."""
    remote = ray.remote(ClientActor)
    return [
        remote.options(
            num_cpus=plan.actor_cpus,
            num_gpus=plan.actor_gpus,
            max_restarts=-1,
            max_task_retries=0,
            scheduling_strategy=None
            if group is None
            else PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index % plan.slots),
        ).remote()
        for index in range(plan.actors)
    ]


@dataclass(frozen=True, kw_only=True)
class Order:
    """A run for a driver. population: a list of one reference, which Ray therefore does not resolve; client actors get
    it as it is. recording: see track.recording."""

    sealed: Sealed
    population: list[Any]
    seed: int
    recording: Any


class DriverActor:
    """Runs one run after another, each from its first round to its last. Owns the client actors: they end with it."""

    def __init__(self, plan: Plan | None = None, group: PlacementGroup | None = None) -> None:
        """Without a plan it waits for one, and for its clients: see `adopt`."""
        self.plan, self.group = plan, group
        self.stopping = threading.Event()
        self.clients: list[Any] | None = None
        self.tenancy: Tenancy | None = None

    def adopt(self, plan: Plan, group: PlacementGroup, clients: list[Any]) -> None:
        """Take over client actors that somebody else has started, for the runs to come."""
        self.plan, self.group, self.clients = plan, group, clients

    def warm(self) -> list[int]:
        """Load what the first run would load, here and in the client actors; all process ids, this one's first."""
        found = [actor.rehearse.remote() for actor in self._clients()]
        self._load()
        _rehearse()
        return [os.getpid(), *ray.get(found)]

    def rounds(self, order: Order) -> Iterator[dict[str, Any]]:
        """The events of `drive`, for the main process."""
        runtime: Any = None
        assert self.plan is not None
        try:
            (population,) = order.population
            if self._clients():
                # They load torch and build their models while this process does the same.
                runtime = RayRuntime(
                    plan=self.plan,
                    sealed=order.sealed,
                    population=population,
                    group=self.group,
                    seed=order.seed,
                    log_path=order.recording.log_path,
                    stop=self.stopping,
                    actors=self._clients(),
                )
            tenancy = self._load()
            from fedray.sim.drive import drive
            from fedray.sim.runtime import InlineRuntime

            spec, whole = order.sealed.open(tenancy), fetch(ray.get(population))
            if runtime is None:
                runtime = InlineRuntime(spec, whole)
            stream = drive(spec, whole, runtime, order.recording, memory_bytes=order.sealed.memory_bytes)
            for event in stream:
                yield event
                if self.stopping.is_set() and not self.plan.actors and "end" not in event:
                    # Nothing in this process looks up from its work but here.
                    stream.close()
                    yield {"end": "interrupted"}
                    return
        finally:
            if isinstance(runtime, RayRuntime):
                runtime.leave()
            runtime = None
            self.stopping.clear()
            if self.tenancy is not None:
                self.tenancy.move_out()

    def stop(self) -> None:
        """Ask the run to end after what it is doing; called from the main process beside `rounds`."""
        self.stopping.set()

    def _clients(self) -> list[Any]:
        if self.clients is None:
            self.clients = [] if self.plan is None else start_clients(self.plan, self.group)
        return self.clients

    def _load(self) -> Tenancy:
        if self.tenancy is None:
            import torch

            torch.set_num_threads(1)
            import fedray.sim.drive  # noqa: F401 - so that the first run finds it loaded

            self.tenancy = Tenancy()
        return self.tenancy


def start_host(plan: Plan, group: PlacementGroup) -> Any:
    """A driver in the first bundle of its group, without a run."""
    remote: Any = ray.remote  # its overloads do not know concurrency_groups
    return (
        remote(concurrency_groups={"control": 1})(DriverActor)
        .options(
            num_cpus=plan.driver_cpus,
            num_gpus=plan.driver_gpus,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
        )
        .remote(plan, group)
    )


def lone_driver() -> Any:
    """A driver of nobody yet, that takes no CPU of the cluster's."""
    remote: Any = ray.remote
    return remote(concurrency_groups={"control": 1})(DriverActor).options(num_cpus=0, max_restarts=0).remote()


def events(stream: Any) -> Iterator[dict[str, Any]]:
    """What the driver reports, as it happens. Raises RunError if its process dies."""
    try:
        for ref in stream:
            yield ray.get(ref)
    except LOST as error:
        raise RunError(f"the driver's process died: {last_line(str(error))}") from error
    except RayTaskError as error:
        raise _cause(error) from error


def wind_down(driver: Any, stream: Any) -> None:
    """Ask an interrupted run to end and give it ten seconds to write what it has."""
    try:
        ray.get(driver.stop.options(concurrency_group="control").remote(), timeout=5)
        deadline = time.monotonic() + 10
        for ref in stream:
            ray.get(ref, timeout=max(deadline - time.monotonic(), 0.1))
    except (*LOST, RayTaskError, GetTimeoutError, StopIteration):
        pass  # it is being ended anyway; what was finished is on disk


def give_up(group: PlacementGroup) -> None:
    """Free the room of a run that has no processes yet."""
    remove_placement_group(group)


def reserve(plan: Plan, note: Callable[[str], None]) -> PlacementGroup:
    """The run's bundles, all or none, so that two runs cannot wait for each other."""
    group: PlacementGroup = placement_group([dict(plan.bundle) for _ in range(plan.slots)], strategy="PACK")
    try:
        wait_for_group(group, plan, note)
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def probe_gpu(sealed: Sealed, population: Any) -> tuple[int, int]:
    """(memory of a GPU, peak allocation of the largest client on it), in bytes, measured in a process of its own."""

    def measure(sealed: Sealed, population: Any) -> tuple[int, int]:
        import torch

        from fedray.sim.client import peak_gpu_bytes

        spec = sealed.open(Tenancy())
        return torch.cuda.get_device_properties(0).total_memory, peak_gpu_bytes(spec, fetch(population))

    answer = ray.get(
        ray.remote(measure).options(num_gpus=1, max_retries=0, max_calls=1).remote(sealed, ray.put(population))
    )
    return int(answer[0]), int(answer[1])
