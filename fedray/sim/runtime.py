"""Where calls run. The inline runtime is here; the Ray runtime keeps the same promise in `ray_runtime`.

A runtime answers calls in any order: nothing that the driver does with the answers may depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fedray.round import Server, View
from fedray.sim.client import Broadcast, EvalReply, Record, TrainReply, Worker
from fedray.sim.population import Population
from fedray.sim.spec import RunSpec

Question = Literal["evaluate_clients", "statistics", "answer"]


@dataclass(frozen=True, kw_only=True)
class EvalWork:
    """Score test rows start to stop with the model behind `handle` (of a Server or a View). tag: for the driver."""

    handle: Any
    start: int
    stop: int
    batch_size: int
    tag: str


class Stopped(Exception):
    """The run was asked to stop."""


class Runtime(Protocol):
    """Runs the work of a round."""

    def wait_ready(self) -> tuple[str, str]:
        """Until clients can be trained; the training engine that they resolved to, and why."""
        ...

    def take_losses(self) -> list[str]:
        """One line for each process lost since the last call."""
        ...

    def put(self, value: Broadcast | Server | View) -> Any:
        """A handle to a value that many calls will read."""
        ...

    def snapshot(self) -> Any:
        """The clients' records as they are now, in a form that later rounds do not change."""
        ...

    def load(self, snapshot: Any) -> dict[int, Record]:
        """The records of a snapshot."""
        ...

    def restore(self, records: Mapping[int, Record], round: int) -> None:
        """Begin with these records, which are those of the end of `round`."""
        ...

    def start(
        self, broadcast: Any, clients: Sequence[tuple[int, float]], evaluations: Sequence[EvalWork]
    ) -> Iterator[TrainReply | EvalReply]:
        """Train clients, given as (client, cost), and evaluate; training goes first. Answers in any order.

        Where there are other processes they are at work when this returns, before the first answer is asked for.
        broadcast: the handle of this round's Broadcast; None if no client trains.
        """
        ...

    def ask(
        self, question: Question, broadcast: Any, clients: Sequence[tuple[int, float]], *arguments: Any
    ) -> Iterator[Any]:
        """Call a method of the worker for clients, given as (client, cost), with their records as they are now;
        nothing is remembered. Answers in any order."""
        ...


class InlineRuntime:
    """Everything in this process, one call for the whole cohort: for breakpoints, tests and tiny runs."""

    def __init__(self, spec: RunSpec, population: Population, worker: Worker | None = None) -> None:
        self.worker = worker if worker is not None else Worker(spec, population)
        self.records: dict[int, Record] = {}

    def wait_ready(self) -> tuple[str, str]:
        return self.worker.engine.kind, self.worker.engine.reason

    def take_losses(self) -> list[str]:
        return []

    def put(self, value: Broadcast | Server | View) -> Any:
        return value

    def snapshot(self) -> Any:
        return dict(self.records)

    def load(self, snapshot: Any) -> dict[int, Record]:
        return dict(snapshot)

    def restore(self, records: Mapping[int, Record], round: int) -> None:  # noqa: ARG002 - the protocol's
        self.records = dict(records)

    def start(
        self, broadcast: Any, clients: Sequence[tuple[int, float]], evaluations: Sequence[EvalWork]
    ) -> Iterator[TrainReply | EvalReply]:
        if clients:
            members = [client for client, _ in clients]
            reply, changed = self.worker.train(broadcast, members, {c: self.records.get(c) for c in members})
            self.records.update(changed)
            yield reply
        for work in evaluations:
            yield self.worker.evaluate(work.handle, work.start, work.stop, work.batch_size, work.tag)

    def ask(
        self, question: Question, broadcast: Any, clients: Sequence[tuple[int, float]], *arguments: Any
    ) -> Iterator[Any]:
        if clients:
            members = [client for client, _ in clients]
            yield getattr(self.worker, question)(broadcast, members, self.records, *arguments)
