"""Tiny federations: synthetic data, a few clients, and runs in this process with everything observed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedray.keys import Key
from fedray.models import Task
from fedray.models.task import kinds
from fedray.round import Context, Exchange, Fit, Job, Message, Optim, Policy, Server
from fedray.sim.checkpoint import State
from fedray.sim.client import Broadcast, Worker, who
from fedray.sim.driver import Driver, RoundRecord
from fedray.sim.population import Population
from fedray.sim.runtime import InlineRuntime, Runtime
from fedray.sim.spec import EvalSpec, RunSpec, TrainerSpec
from fedray.train import LearningRate
from fedray.tree import Mask, Tree
from fedray.wire import Wire


def synthetic(
    shape: tuple[int, ...],
    *,
    sizes: Sequence[int],
    num_classes: int,
    key: Key,
    num_test: int = 20,
    held: int = 0,
    public: int = 0,
    alike: bool = False,
) -> Population:
    """Clients of these sizes with skewed labels; every class has a direction of its own.

    held:   examples that each client sets apart for validation, beside its size.
    public: examples that the server has to itself.
    alike:  whether all examples are one and the same, so that no order of them changes a bit.
    """
    random = key.numpy()
    owns = [size + held for size in sizes]
    total = sum(owns) + public
    dealt = [(random.random(size) * 1.7 + client).astype(np.int64) % num_classes for client, size in enumerate(owns)]
    y = np.concatenate([*dealt, np.arange(public, dtype=np.int64) % num_classes])
    test_y = np.arange(num_test, dtype=np.int64) % num_classes
    means = random.normal(size=(num_classes, *shape))
    x = means[y] + random.normal(size=(total, *shape))
    test_x = means[test_y] + random.normal(size=(num_test, *shape))
    if alike:
        x[:], y[:] = x[0], y[0]
    bounds = np.cumsum([0, *owns])
    rows = [np.arange(a, b - held) for a, b in itertools.pairwise(bounds)]
    apart = [np.arange(b - held, b) for b in bounds[1:]]
    more: dict[str, Any] = {}
    if held:
        more |= {"held_rows": np.concatenate(apart), "held_starts": np.arange(len(sizes) + 1) * held}
    if public:
        more["public_rows"] = np.arange(total - public, total)
    return Population(
        train_x=x.astype(np.float32),
        train_y=y,
        test_x=test_x.astype(np.float32),
        test_y=test_y,
        rows=np.concatenate(rows),
        starts=np.cumsum([0, *sizes]),
        local_rows=np.concatenate([np.arange(c, c + 4) % num_test for c in range(len(sizes))]),
        local_starts=np.arange(len(sizes) + 1) * 4,
        label_counts=np.array([np.bincount(y[own], minlength=num_classes) for own in rows]),
        mean=np.array([0.1], np.float32),
        std=np.array([1.5], np.float32),
        scale=1.0,
        **more,
    )


def run_spec(policies: Sequence[tuple[str, Policy[Any, Any]]], task: Task, **changes: Any) -> RunSpec:
    """A run of these policies, inner to outer, on a tiny federation; changes: fields of the spec or of its trainer."""
    trainer: dict[str, Any] = {
        "learning_rate": LearningRate(lr=0.1),
        "batch_size": 4,
        "epochs": 1,
        "steps": None,
        "optim": Optim(),
        "engine": "eager",
    }
    trainer |= {name: changes.pop(name) for name in list(changes) if name in trainer}
    facts: dict[str, Any] = {
        "run_id": "law",
        "name": "law",
        "seed": 0,
        "rounds": 4,
        "num_clients": 6,
        "cohort": 4,
        "task": task,
        "policies": tuple(policies),
        "wire": Wire(),
        "trainer": TrainerSpec(**trainer),
        "evaluation": EvalSpec(every=0, clients="cohort", batch_size=16),
    }
    return RunSpec(**facts | changes)


def accept(spec: RunSpec) -> None:
    """Ask every policy what it refuses, as before a run: first without the model, then with it. Raises ConfigError."""
    module = spec.task.module(spec.key.fold("model"))
    statistics = any(name.endswith("running_mean") for name, _ in module.named_buffers())
    known = replace(spec.facts(), kinds=kinds(module), objective="classification", has_statistics=statistics)
    for facts in (spec.facts(), known):
        for _, policy in spec.policies:
            policy.check(facts)


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What a client sent. message: as the server decodes it. wanted: as it was before the wire.
    sent: the mask that the client was sent. job, fit: what it trained, and what came of it before any `end`."""

    client: int
    round: int
    message: Message
    wanted: Message
    sent: Mask | None
    job: Job
    fit: Fit


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a client answered in an exchange. message: as the server decodes it. wanted: as it was before the wire."""

    client: int
    round: int
    exchange: str
    message: Message
    wanted: Message


@dataclass
class Ran:
    """An observed run. servers: the start, then one a round. broadcasts: the server that clients are sent, by round.
    heard: what they sent after their training. answers: what they sent in exchanges."""

    driver: Driver
    records: list[RoundRecord] = field(default_factory=list)
    servers: list[Server] = field(default_factory=list)
    broadcasts: dict[int, Server] = field(default_factory=dict)
    heard: list[Upload] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [record.row for record in self.records]

    @property
    def digests(self) -> list[str]:
        return [row["digest"] for row in self.rows]

    @property
    def bytes(self) -> list[tuple[int, int]]:
        return [(row["wire/up_bytes"], row["wire/down_bytes"]) for row in self.rows]

    @property
    def uploads(self) -> list[list[tuple[Message, Mask | None]]]:
        """Per round: (message, mask that was sent)."""
        by_round: dict[int, list[tuple[Message, Mask | None]]] = {row["round"]: [] for row in self.rows}
        for upload in self.heard:
            by_round[upload.round].append((upload.message, upload.sent))
        return list(by_round.values())


class _Noting:
    """Stands for an object whose method it watches: note(arguments, answer) is called after each call."""

    def __init__(self, inner: Any, method: str, note: Callable[[tuple[Any, ...], dict[str, Any], Any], None]) -> None:
        self._inner, self._method, self._note = inner, method, note

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name != self._method:
            return found

        def noted(*arguments: Any, **options: Any) -> Any:
            answer = found(*arguments, **options)
            self._note(arguments, options, answer)
            return answer

        return noted


class Watching(Worker):
    """A worker that notes what its clients train and every upload that the server's side decodes."""

    def __init__(self, spec: RunSpec, population: Population) -> None:
        super().__init__(spec, population)
        self.heard: list[Upload] = []
        self.answers: list[Answer] = []
        self.broadcasts: dict[int, Server] = {}
        self._names = {who(c, r): (c, r) for c in range(spec.num_clients) for r in range(1, spec.rounds + 1)}
        self._trained: tuple[Job, Fit] | None = None
        self._wanted: list[Message] = []
        self._asked = ""
        self.engine: Any = _Noting(self.engine, "fit", self._note_training)
        self.codec: Any = _Noting(self.codec, "encode", self._note_encoding)

    def _note_training(self, given: tuple[Any, ...], _: dict[str, Any], fit: Fit) -> None:
        # Only the training of the round has received a message; what hooks train besides is sent nowhere.
        job, received = given[:2]
        if received.parts:
            self._trained = job, fit

    def _note_encoding(self, given: tuple[Any, ...], options: dict[str, Any], _: Any) -> None:
        if options["direction"] == "up":
            self._wanted.append(given[0])

    def answer(self, broadcast: Any, clients: Any, records: Any, at: int, exchange: Exchange) -> Any:
        self._asked = exchange.name
        return super().answer(broadcast, clients, records, at, exchange)

    def _cross(self, codec: Any, message: Message, direction: Any, known: Mask | None, ctx: Context, *more: Any) -> Any:
        received, transfer = super()._cross(codec, message, direction, known, ctx, *more)
        if direction == "up":
            assert ctx.client is not None
            self.answers.append(
                Answer(client=ctx.client.id, round=ctx.round, exchange=self._asked, message=received, wanted=message)
            )
        return received, transfer

    def train(self, broadcast: Broadcast, *more: Any, **options: Any) -> Any:
        self.broadcasts[broadcast.round] = broadcast.server
        return super().train(broadcast, *more, **options)

    def receive(self, payload: bytes, sent_mask: Mask | None, whose: str, *more: Any) -> Message:
        message = super().receive(payload, sent_mask, whose, *more)
        # Where other workers train, this one decodes what it has not seen made.
        if whose in self._names and self._trained is not None:
            client, round = self._names[whose]
            (job, fit), wanted = self._trained, self._wanted.pop(0)
            upload = Upload(
                client=client, round=round, message=message, wanted=wanted, sent=sent_mask, job=job, fit=fit
            )
            self.heard.append(upload)
        return message


class Following(Driver):
    """A driver that notes its server after each round: a row may be written when the next round has been settled."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.servers = [self.server]

    def _settle(self, *given: Any) -> Any:
        settled = super()._settle(*given)
        self.servers.append(self.server)
        return settled


def run(spec: RunSpec, population: Population, runtime: Runtime | None = None, state: State | None = None) -> Ran:
    """Drive a run to its end; `runtime` without one is inline with an observed worker. state: where to go on."""
    worker = Watching(spec, population)
    driver = Following(spec, population, runtime or InlineRuntime(spec, population, worker), worker, state)
    ran = Ran(driver, servers=driver.servers, broadcasts=worker.broadcasts, heard=worker.heard, answers=worker.answers)
    ran.records.extend(driver.rounds())
    return ran


class Packed:
    """A runtime that deals the cohort to several workers in chunks, moves homes every round and shuffles answers.

    through: what every value goes through on its way to a worker and back, as a copy by pickle; None for nothing. Each
             worker has the spec, and so the policies, by the same way.
    """

    def __init__(
        self,
        spec: RunSpec,
        population: Population,
        *,
        chunk: int,
        workers: int = 1,
        shuffle: Key | None = None,
        through: Callable[[Any], Any] | None = None,
    ) -> None:
        self.through = through or (lambda value: value)
        self.workers = [Worker(self.through(spec), population) for _ in range(workers)]
        self.chunk, self.shuffle, self.calls = chunk, shuffle, 0
        self.records: dict[int, Any] = {}

    def wait_ready(self) -> tuple[str, str]:
        return "eager", "a test"

    def take_losses(self) -> list[str]:
        return []

    def put(self, value: Any) -> Any:
        return self.through(value)

    def snapshot(self) -> Any:
        return dict(self.records)

    def load(self, snapshot: Any) -> dict[int, Any]:
        return dict(snapshot)

    def restore(self, records: Mapping[int, Any], round: int) -> None:  # noqa: ARG002 - the protocol's
        self.records = dict(records)

    def start(self, broadcast: Any, clients: Sequence[tuple[int, float]], evaluations: Sequence[Any]) -> Iterator[Any]:
        members = [client for client, _ in clients]
        if self.shuffle is not None:
            members = [members[i] for i in self.shuffle.fold("members", self.calls).permutation(len(members)).tolist()]
        replies = []
        for start in range(0, len(members), self.chunk):
            chunk = members[start : start + self.chunk]
            worker = self.workers[(self.calls + start // self.chunk) % len(self.workers)]
            records = self.through({client: self.records.get(client) for client in chunk})
            reply, changed = self.through(worker.train(broadcast, chunk, records))
            self.records.update(changed)
            replies.append(reply)
        replies += [self.workers[-1].evaluate(w.handle, w.start, w.stop, w.batch_size, w.tag) for w in evaluations]
        self.calls += 1
        if self.shuffle is not None:
            replies = [replies[i] for i in self.shuffle.fold("replies", self.calls).permutation(len(replies)).tolist()]
        yield from replies

    def ask(
        self, question: str, broadcast: Any, clients: Sequence[tuple[int, float]], *arguments: Any
    ) -> Iterator[Any]:
        for at, (client, _) in enumerate(clients):
            worker = self.workers[at % len(self.workers)]
            yield getattr(worker, question)(broadcast, [client], self.records, *arguments)


__all__ = ["Answer", "Packed", "Ran", "Tree", "Upload", "Watching", "accept", "run", "run_spec", "synthetic"]
