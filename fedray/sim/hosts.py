"""Many runs at once on one cluster: teams of processes, each in a placement group, that runs are lent to.

A team is a driver and its client actors. A run that finished leaves its team to the next run of the same shape; the
team of a run that failed, or was stopped, ends with it. Groups come whole or not at all, so that runs of several
sweeps on one cluster cannot wait for each other in a circle.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from fedray.errors import FedrayError, RunError
from fedray.sim.plan import Plan
from fedray.sim.ray_runtime import LOST, Order, last_line, start_host
from fedray.sim.warm import Lender

Event = dict[str, Any]
EVENTS_AT_ONCE = 64  # of each run, before somebody looks whether another can start
WAIT_SECONDS = 15.0  # how long a group is waited for before somebody is told why


@dataclass(eq=False)
class Team:
    """A driver and its clients. driver: handle of a DriverActor. lender: takes its processes back, and is told whether
    they can be lent again; None if they are ours.

    runs: how many it has had.
    """

    plan: Plan
    group: PlacementGroup
    driver: Any
    lender: Callable[[Team, bool], None] | None = None
    runs: int = 0

    @classmethod
    def start(cls, plan: Plan, group: PlacementGroup) -> Team:
        """A new one in a group that is placed."""
        return cls(plan, group, start_host(plan, group))

    def begin(self, order: Order) -> Any:
        """Let it run this; the stream of events."""
        self.runs += 1
        return self.driver.rounds.options(num_returns="streaming").remote(order)

    def ask_to_stop(self) -> None:
        self.driver.stop.options(concurrency_group="control").remote()

    def release(self) -> None:
        """Free its place; what is borrowed goes back, what is ours ends."""
        if self.lender is None:
            self.end()
            return
        with contextlib.suppress(*LOST):
            self.lender(self, True)
        remove_placement_group(self.group)

    def end(self) -> None:
        """End its processes and free their place; a borrowed one ends too, so that nobody gets it."""
        with contextlib.suppress(*LOST):
            if self.lender is not None:
                self.lender(self, False)
            ray.kill(self.driver)
        remove_placement_group(self.group)


def start_team(plan: Plan, group: PlacementGroup, lender: Lender | None) -> Team:
    """A team in a group that is placed: a borrowed one where there is one to borrow."""
    borrowed = None if lender is None else lender.team(plan, group)
    return Team.start(plan, group) if borrowed is None else borrowed


@dataclass(eq=False)
class _Running:
    """A run: its name, its team, its stream, and how it ended, once it said so."""

    name: str
    team: Team
    stream: Any
    end: Event | None = None


@dataclass(eq=False)
class _Wanted:
    """A group that is waited for."""

    plan: Plan
    group: PlacementGroup
    since: float
    told: float


class Hosts:
    """As many runs at once as fit; used as a context manager, which ends what is left."""

    def __init__(self, *, lease: bool = True, note: Callable[[str], None], lender: Lender | None = None) -> None:
        """lease: whether a team has more than one run. note: is told what is waited for. lender: of warm processes."""
        self.lease = lease
        self.lender = lender if lease else None
        self.note = note
        self.idle: list[Team] = []
        self.running: dict[str, _Running] = {}
        self.wanted: dict[tuple[Any, ...], _Wanted] = {}

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- places --------------------------------------------------------------------------------------------------

    def place(self, plan: Plan) -> Team | None:
        """A team for a run of this plan; None while the cluster has no room, which is then waited for."""
        for team in self.idle:
            if team.plan.shape == plan.shape:
                self.idle.remove(team)
                return team
        wanted = self.wanted.get(plan.shape)
        if wanted is None:
            group = placement_group([dict(plan.bundle) for _ in range(plan.slots)], strategy="PACK")
            now = time.monotonic()
            wanted = self.wanted[plan.shape] = _Wanted(plan, group, now, now)
            here = group.wait(timeout_seconds=0.2)
        else:
            here = wanted.group.wait(timeout_seconds=0.001)
        if not here:
            self._tell(wanted)
            return None
        del self.wanted[plan.shape]
        try:
            return start_team(plan, wanted.group, self.lender)
        except BaseException:
            remove_placement_group(wanted.group)
            raise

    def put_back(self, team: Team) -> None:
        """Take back a team that `place` gave and no run needs."""
        self.idle.append(team)

    def keep_only(self, plans: Iterable[Plan]) -> None:
        """Give back what no run of these plans needs: others may be waiting for it."""
        shapes = {plan.shape for plan in plans}
        for team in [team for team in self.idle if team.plan.shape not in shapes]:
            self.idle.remove(team)
            team.release()
        for shape in [shape for shape in self.wanted if shape not in shapes]:
            remove_placement_group(self.wanted.pop(shape).group)

    def _tell(self, wanted: _Wanted) -> None:
        """Say what is missing, where nothing of this sweep runs and it looks as if nothing happened."""
        now = time.monotonic()
        if self.running or now - wanted.told < WAIT_SECONDS:
            return
        wanted.told = now
        free = ray.available_resources()
        self.note(
            f"waiting for {wanted.plan.slots} x {wanted.plan.bundle}: free now {free.get('CPU', 0):g} CPU, "
            f"{free.get('GPU', 0):g} GPU ({now - wanted.since:.0f} s); other runs hold the rest"
        )

    # -- runs ----------------------------------------------------------------------------------------------------

    def start(self, name: str, team: Team, order: Order) -> None:
        """Begin a run under a name that no other has."""
        self.running[name] = _Running(name, team, team.begin(order))

    def poll(self, timeout_s: float) -> list[tuple[str, Event]]:
        """What happened since the last call, waiting at most so long for the first of it.

        Events are those of `drive`; the last one of a run, {"end": ...}, comes when its team is free again. A run
        whose process died ends with {"end": "failed", "error": RunError, "died": True}.
        """
        if not self.running:
            time.sleep(timeout_s)
            return []
        found: list[tuple[str, Event]] = []
        for turn in range(EVENTS_AT_ONCE):
            streams = {run.stream: run for run in self.running.values()}
            some = list(streams)
            ready, _ = ray.wait(some, num_returns=len(some), timeout=0, fetch_local=False) if some else ([], [])
            if not ready and turn == 0:
                ready, _ = ray.wait(some, num_returns=1, timeout=timeout_s, fetch_local=False)
            if not ready:
                break
            for stream in ready:
                run = streams[stream]
                event = self._next(run)
                if event is not None:
                    found.append((run.name, event))
        return found

    def _next(self, run: _Running) -> Event | None:
        """The next event of a run of which something has come; None where that is not for others."""
        try:
            event: Event = ray.get(next(run.stream))
        except StopIteration:
            return self._ended(run, run.end or _died("its stream of events broke off"))
        except LOST as error:
            return self._ended(run, _died(last_line(str(error)), trace=str(error)))
        except RayTaskError as error:
            cause = getattr(error, "cause", None)
            ours = cause if isinstance(cause, FedrayError) else RunError(last_line(str(error)))
            return self._ended(run, {"end": "failed", "error": ours, "trace": str(error)})
        except RayError as error:  # a node, the room, the object store: whatever it was, this run has lost it
            return self._ended(run, _died(last_line(str(error)), trace=str(error)))
        if "end" not in event:
            return event
        run.end = event  # its process still tidies up
        return None

    def _ended(self, run: _Running, event: Event) -> Event:
        del self.running[run.name]
        if event["end"] == "finished" and self.lease:
            self.idle.append(run.team)
        else:
            run.team.end()
        return event

    def stop(self, seconds: float) -> list[tuple[str, Event]]:
        """Ask every run to end and wait so long at most; what happened. Those that did not end are not in it."""
        for run in self.running.values():
            with contextlib.suppress(*LOST):
                run.team.ask_to_stop()
        deadline = time.monotonic() + seconds
        found: list[tuple[str, Event]] = []
        while self.running and time.monotonic() < deadline:
            found += self.poll(max(deadline - time.monotonic(), 0.05))
        return found

    def close(self) -> None:
        """End every process and give every place back."""
        for run in self.running.values():
            run.team.end()
        for team in self.idle:
            team.release()
        for wanted in self.wanted.values():
            remove_placement_group(wanted.group)
        self.running, self.idle, self.wanted = {}, [], {}


def _died(reason: str, *, trace: str | None = None) -> Event:
    error = RunError(f"the driver's process died: {reason}")
    return {"end": "failed", "error": error, "died": True, "trace": trace or str(error)}
