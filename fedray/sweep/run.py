"""The cells of a sweep, run on one cluster: as many at once as fit, each failure a row of its own.

What decides which cells run are configurations and manifests alone: where nothing is left to do, no data are loaded
and no cluster starts.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from fedray.errors import ConfigError, FedrayError, RunError
from fedray.launch import Interrupted, environment, join
from fedray.sweep import identity
from fedray.sweep.record import Claims, read_sweep, write_sweep
from fedray.track import board as board_room
from fedray.track.recording import Recording
from fedray.track.store import MANIFEST_FILE, Store, end_run

if TYPE_CHECKING:
    from fedray.config import Assembly, Shared
    from fedray.sim.plan import Cluster, Plan
    from fedray.sim.ray_runtime import Order, Sealed

Status = Literal["waiting", "running", "done", "failed", "skipped", "interrupted"]

AHEAD = 4
"""Cells that are checked and packed while others run, so that a free place is not kept waiting."""
STOP_SECONDS = 10.0
"""What an interrupted sweep gives its runs to write what they have."""
SAVE_SECONDS = 1.0
"""Between two writings of sweep.json; an end of a cell is written at once."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A cell as it was asked for. config: resolved; None where that failed, and then `error` says why.

    overrides: all of them. choices: what was chosen of each group.
    """

    overrides: tuple[str, ...]
    config: dict[str, Any] | None
    choices: Mapping[str, str] = field(default_factory=dict)
    error: ConfigError | None = None


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of the launcher. lease: whether a run leaves its processes to the next. max_parallel: runs at a time; None for
    as many as fit. retries: of a run that failed. force: whether to run what is done again."""

    lease: bool = True
    max_parallel: int | None = None
    retries: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        if self.max_parallel is not None and self.max_parallel < 1:
            raise ConfigError(
                f"hydra.launcher.max_parallel is {self.max_parallel}; it must be at least 1, or null for as many as fit"
            )
        if self.retries < 0:
            raise ConfigError(f"hydra.launcher.retries is {self.retries}; it must be at least 0")


@dataclass(eq=False)
class _Cell:
    """A cell and what became of it.

    begun: when its run began, by time.monotonic(). elsewhere: whether another launcher has it. before: the manifest in
    its folder when the command was given; None where there was none.
    """

    request: Request
    label: str
    id: str = ""
    folder: Path = Path()
    rounds: int = 0
    status: Status = "waiting"
    error: FedrayError | None = None
    seconds: float = 0.0
    tries: int = 0
    begun: float = 0.0
    recording: Recording | None = None
    elsewhere: bool = False
    before: str | None = None
    shown: board_room.Cell | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    def row(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "folder": self.name,
            "overrides": list(self.request.overrides),
            "status": self.status,
            "error": None if self.error is None else str(self.error),
            "seconds": round(self.seconds, 3),
            "tries": self.tries,
        }


@dataclass(frozen=True)
class _Packed:
    """A cell that has passed every check, with what its processes need."""

    cell: _Cell
    plan: Plan
    order: Order


def run_sweep(requests: Sequence[Request], *, folder: Path, options: Options, code_folder: str | None = None) -> None:
    """Run what is left to do of these cells in folders below `folder`.

    Raises ConfigError where no cell can run, RunError when all have ended and some failed, Interrupted after Ctrl-C
    or SIGTERM.
    """
    if not requests:
        raise ConfigError("the sweep has no cells; give a setting several values, as in seed=0,1,2")
    folder.mkdir(parents=True, exist_ok=True)
    sweep = _Sweep(requests, folder=folder, options=options, code_folder=code_folder)
    sweep.identify()
    sweep.find_first()
    if all(cell.status == "failed" for cell in sweep.cells):
        raise sweep.all_refused()
    with sweep.board, _terminated_as_interrupted():
        try:
            sweep.work()
        except KeyboardInterrupt:
            raise sweep.interrupted() from None
        finally:
            sweep.save()
    sweep.conclude()


class _Sweep:
    """One command's cells, from what they are to how they ended."""

    def __init__(self, requests: Sequence[Request], *, folder: Path, options: Options, code_folder: str | None) -> None:
        from fedray.config import Shared

        self.folder, self.options, self.code_folder = folder, options, code_folder
        self.shared: Shared = Shared()
        differences = identity.varying([request.overrides for request in requests])
        self.cells = [
            _Cell(request, identity.label(differs) or "the run")
            for request, differs in zip(requests, differences, strict=True)
        ]
        self.differences = differences
        before = read_sweep(folder)
        self.digests: dict[str, str] = dict(before.get("digests", {}))
        self.facts = {"started": before.get("started") or _now(), "command": sys.argv, "digests": self.digests}
        self.saved = 0.0
        self.first: tuple[_Cell, Assembly] | None = None
        self.environment: dict[str, Any] = {}
        self.board = board_room.Board("none", ())
        self.stored: dict[tuple[int, ...], tuple[Any, Any]] = {}
        self.populations: dict[int, tuple[Any, Any]] = {}
        self.cards: dict[str, tuple[int, int] | FedrayError] = {}

    # -- before anything starts ----------------------------------------------------------------------------------

    def identify(self) -> None:
        """Find each cell's id and folder, and what is done already; refuse what cannot run."""
        from fedray import config as config_room

        for cell in self.cells:
            request = cell.request
            try:
                if request.config is None:
                    raise request.error or ConfigError("it cannot be composed")
                cell.id = config_room.identity(
                    request.config, digests=self.digests, shared=self.shared, code_folder=self.code_folder
                )
                cell.rounds = request.config["rounds"]
            except (FedrayError, OSError) as error:
                self._refuse(cell, error)
                cell.id = ""
        ids = [cell.id or identity.stand_in(cell.request.overrides) for cell in self.cells]
        kept = identity.distinct(ids, self.differences, [cell.rounds for cell in self.cells])
        self.cells = [self.cells[at] for at in kept]  # the same run twice is one run
        self.differences = [self.differences[at] for at in kept]
        folders = identity.place(self.folder, [ids[at] for at in kept], self.differences)
        for cell, path in zip(self.cells, folders, strict=True):
            cell.folder = path
            cell.before = _written(path)
        self._check_agreement()
        for cell in self.cells:
            if cell.status != "waiting" or self.options.force:
                continue
            try:
                if identity.left_to_do(cell.folder, cell.id, cell.rounds).what == "nothing":
                    cell.status = "skipped"
            except FedrayError as error:
                self._refuse(cell, error)
        for cell in self.cells:
            cell.shown = board_room.Cell(id=cell.name, label=cell.label, folder=cell.folder, rounds=cell.rounds)
        kinds = [cell.request.config["tracker"]["progress"] for cell in self.cells if cell.request.config is not None]
        shown = [cell.shown for cell in self.cells if cell.shown is not None]
        self.board = board_room.Board(kinds[0] if kinds else "auto", shown, f"sweep {self.folder}")

    def _check_agreement(self) -> None:
        """Cells share one cluster: refuse those that name different ones."""
        good = [cell.request.config for cell in self.cells if cell.status == "waiting" and cell.request.config]
        for key in ("address", "num_cpus", "temp_dir"):
            values = {config["runtime"][key] for config in good}
            if len(values) > 1:
                listed = ", ".join(sorted(map(str, values)))
                raise ConfigError(
                    f"runtime.{key} is {listed}; the runs of a sweep share one cluster, so give it one value, or make "
                    "a sweep of each"
                )

    def find_first(self) -> None:
        """The first cell that passes every check, before anything is started or shown for nothing."""
        for cell in self.cells:
            if cell.status == "waiting":
                try:
                    self.first = (cell, self._assemble(cell))
                    return
                except FedrayError as error:
                    self._refuse(cell, error)

    def _refuse(self, cell: _Cell, error: Exception) -> None:
        cell.status, cell.error = "failed", _ours(error)

    def all_refused(self) -> ConfigError:
        """The one sentence of cells that are all refused for the same reason, else a summary of several."""
        self._leave_no_empty_folder()
        sentences = {str(cell.error) for cell in self.cells}
        if len(sentences) == 1:
            return ConfigError(sentences.pop())
        for cell in self.cells:
            print(f"fedray: {cell.label}: {cell.error}", file=sys.stderr, flush=True)
        return ConfigError(f"none of the {len(self.cells)} cells can run; what is wrong with each is above")

    def _leave_no_empty_folder(self) -> None:
        """Nothing started: leave no folder behind that looks like a sweep."""
        with contextlib.suppress(OSError):
            if {path.name for path in self.folder.iterdir()} <= {"multirun.yaml", "sweep.json"}:
                for path in list(self.folder.iterdir()):
                    path.unlink()
                self.folder.rmdir()
                for above in self.folder.parents:  # ours by default; nobody else's folders
                    if not above.is_relative_to(Path.cwd() / "outputs"):
                        break
                    above.rmdir()  # only if nothing else is in it

    # -- the work ------------------------------------------------------------------------------------------------

    def work(self) -> None:
        """Run what is waiting; returns when nothing is left."""
        for cell in self.cells:
            if cell.status in ("skipped", "failed") and cell.shown is not None:
                self.board.ended(cell.shown, cell.status, None if cell.error is None else str(cell.error))
        self.waiting = deque(cell for cell in self.cells if cell.status == "waiting")
        if not self.waiting:
            return
        assert self.first is not None
        runtime = self.first[1].runtime
        # `auto` shows a dashboard for the sake of one run's actors; here are many.
        dashboard = "on" if runtime.dashboard == "on" else "off"
        lender = join(replace(runtime, dashboard=dashboard), self.board.note)
        from fedray.sim import ray_runtime
        from fedray.sim.hosts import Hosts

        self.by_name = {cell.name: cell for cell in self.cells}
        self.cluster = ray_runtime.look_at_cluster()
        self._look_at_cards()
        self.packed: deque[_Packed] = deque()
        hosts = Hosts(lease=self.options.lease, note=self.board.note, lender=lender)
        with Claims(self.folder) as self.claims, hosts as self.hosts:
            with _terminated_as_interrupted():  # Ray has put its own answer to SIGTERM in place
                try:
                    self._loop()
                except KeyboardInterrupt:
                    self._wind_down()
                    raise

    def _loop(self) -> None:
        while True:
            self._start_what_fits()
            if not self.hosts.running and not self.packed and not self.waiting:
                return
            ahead = bool(self.waiting) and len(self.packed) < AHEAD
            if ahead:
                self._pack_next()
            else:
                # What the next cells do not need may be what they wait for.
                self.hosts.keep_only([packed.plan for packed in self.packed])
            for name, event in self.hosts.poll(0.0 if ahead else 0.1 if self.hosts.wanted else 0.5):
                self._take(self.by_name[name], event)
            if time.monotonic() - self.saved > SAVE_SECONDS:
                self.save()

    def _start_what_fits(self) -> None:
        most = self.options.max_parallel
        while self.packed or self.waiting:
            if most is not None and len(self.hosts.running) >= most:
                return
            if not self.packed and not self._pack_next():
                continue
            if not self._start_one():
                return

    def _start_one(self) -> bool:
        """Start the first packed cell for which there is a place; whether there was one."""
        tried: set[tuple[Any, ...]] = set()
        for packed in list(self.packed):
            if packed.plan.shape in tried:
                continue
            tried.add(packed.plan.shape)
            team = self.hosts.place(packed.plan)
            if team is None:
                continue
            self.packed.remove(packed)
            left = self._claim(packed.cell)
            if left is None:
                self.hosts.put_back(team)
            else:
                self._begin(packed, team, left)
            return True
        return False

    def _claim(self, cell: _Cell) -> identity.Left | None:
        """What is left to do of a cell that is now ours; None where there is nothing, or it is not."""
        try:
            holder = self.claims.take(cell.name)
        except OSError as error:
            self._end(cell, "failed", _ours(error))
            return None
        if holder is not None:
            self.board.note(f"{cell.label} is being run by {holder}; it is left to that")
            cell.elsewhere = True
            self._end(cell, "skipped", None)
            return None
        left = self._left(cell)
        if left is None or left.what == "nothing":
            if left is not None:
                self._end(cell, "skipped", None)
            self.claims.release(cell.name)
            return None
        return left

    def _left(self, cell: _Cell) -> identity.Left | None:
        """What is left to do now that the cell is ours; None where its folder cannot be used."""
        try:
            # What another launcher has done since this command was given is as new as it was asked for.
            if self.options.force and cell.tries == 0 and _written(cell.folder) == cell.before:
                _clear(cell.folder)
            return identity.left_to_do(cell.folder, cell.id, cell.rounds)
        except (FedrayError, OSError) as error:
            self._end(cell, "failed", _ours(error))
            return None

    def _begin(self, packed: _Packed, team: Any, left: identity.Left) -> None:
        cell = packed.cell
        if left.what == "repeat":
            _clear_checkpoints(cell.folder)
        recording = replace(packed.order.recording, resume_round=left.resume_round)
        cell.recording, cell.status, cell.error = recording, "running", None
        cell.tries += 1
        cell.begun = time.monotonic()
        self.hosts.start(cell.name, team, replace(packed.order, recording=recording))
        if cell.shown is not None:
            self.board.started(cell.shown)
        if left.why:
            after = "from the start" if not left.resume_round else f"after round {left.resume_round}"
            self.board.note(f"{cell.label} goes on {after}: {left.why}")
        self.save()

    def _take(self, cell: _Cell, event: Mapping[str, Any]) -> None:
        """What a run has told."""
        if "row" in event:
            if cell.shown is not None:
                self.board.row(cell.shown, event["row"])
        elif "end" in event:
            self._take_end(cell, event)
        elif not event["note"].startswith("training engine"):
            self.board.note(f"{cell.label}: {event['note']}")

    def _take_end(self, cell: _Cell, event: Mapping[str, Any]) -> None:
        cell.seconds += time.monotonic() - cell.begun
        if event["end"] == "finished" or (event.get("died") and self._is_done(cell)):
            self._end(cell, "done", None)
        elif event["end"] == "interrupted":
            self._end(cell, "interrupted", None)
        else:
            error: FedrayError = event["error"]
            self._enter_failure(cell, error, died=bool(event.get("died")), trace=event.get("trace"))
            if cell.tries <= self.options.retries:
                if cell.shown is not None:
                    self.board.note(f"{cell.label} failed and is tried again: {error}")
                cell.status = "waiting"
                self.claims.release(cell.name)
                self.waiting.append(cell)
                return
            self._end(cell, "failed", error)
        self.claims.release(cell.name)

    def _is_done(self, cell: _Cell) -> bool:
        """Whether a run had written everything when its process died."""
        try:
            return identity.left_to_do(cell.folder, cell.id, cell.rounds).what == "nothing"
        except FedrayError:
            return False

    def _enter_failure(self, cell: _Cell, error: FedrayError, *, died: bool, trace: str | None) -> None:
        """See to it that the run's own folder says how it ended, also where its process could not."""
        assert cell.recording is not None
        try:
            if not (cell.folder / MANIFEST_FILE).is_file():
                Store.create(
                    cell.folder, config_yaml=cell.recording.config_yaml, manifest=cell.recording.manifest
                ).close()
            end_run(cell.folder, "failed", error=str(error), **({"died": True} if died else {}))
            if trace is not None:
                with Path(cell.recording.log_path).open("a", encoding="utf-8") as log:
                    log.write(f"{_now()} {trace.rstrip()}\n{_now()} run failed: {error}\n")
        except (FedrayError, OSError) as problem:
            self.board.note(f"the failure of {cell.label} could not be entered in its folder: {problem}")

    def _end(self, cell: _Cell, status: Status, error: FedrayError | None) -> None:
        cell.status, cell.error = status, error
        if cell.shown is not None and status in ("done", "failed", "skipped", "interrupted"):
            self.board.ended(cell.shown, status, None if error is None else str(error))
        self.save()

    def _wind_down(self) -> None:
        """Every run writes what it has, and then this ends."""
        self.board.note(f"stopping; runs have {STOP_SECONDS:.0f} s to write what they have")
        for name, event in self.hosts.stop(STOP_SECONDS):
            self._take(self.by_name[name], event)
        for cell in self.cells:
            if cell.status != "running":
                continue
            cell.seconds += time.monotonic() - cell.begun
            with contextlib.suppress(FedrayError, OSError):
                end_run(cell.folder, "interrupted")
            self._end(cell, "interrupted", None)

    # -- checking and packing ------------------------------------------------------------------------------------

    def _assemble(self, cell: _Cell) -> Assembly:
        """The run of a cell with every check passed. Raises FedrayError."""
        from fedray import config as config_room

        if self.first is not None and self.first[0] is cell and cell.tries == 0:
            return self.first[1]
        assert cell.request.config is not None
        made = config_room.assemble(
            cell.request.config, code_folder=self.code_folder, choices=cell.request.choices, shared=self.shared
        )
        if made.spec.run_id != cell.id:
            raise RunError(
                f"its run is {made.spec.run_id} and was taken for {cell.id}: its data changed since they were last "
                "loaded; delete sweep.json and give the command again"
            )
        return made

    def _pack_next(self) -> bool:
        """Check the next waiting cell and pack it; whether it may run."""
        cell = self.waiting.popleft()
        try:
            self.packed.append(self._pack(cell, self._assemble(cell)))
        except Exception as error:  # of one cell, whatever it is
            self._end(cell, "failed", _ours(error))
            return False
        return True

    def _pack(self, cell: _Cell, made: Assembly) -> _Packed:
        from fedray.sim import ray_runtime
        from fedray.sim.tenancy import node_memory_bytes

        sealed, device = self._seal(made)
        cluster, client_bytes = self.cluster, 0
        if device == "cuda":
            card = self.cards[_card_key(made)]
            if isinstance(card, FedrayError):
                raise card
            gpu_bytes, client_bytes = card
            cluster = replace(cluster, gpu_bytes=gpu_bytes)
        plan = self._plan(made, cluster, device, client_bytes)
        if made.runtime.memory_gb == "auto" and device == "cpu" and sys.platform == "linux":
            sealed = replace(sealed, memory_bytes=node_memory_bytes() // 2)
        if id(made.population) not in self.populations:
            self.populations[id(made.population)] = (made.population, ray_runtime.store(made.population, self.stored))
        order = ray_runtime.Order(
            sealed=sealed,
            population=[self.populations[id(made.population)][1]],
            seed=made.spec.seed,
            recording=Recording(
                folder=str(cell.folder),
                run_id=made.spec.run_id,
                config_yaml=made.config_yaml,
                config=made.spec.config,
                manifest={
                    **made.facts,
                    "overrides": list(cell.request.overrides),
                    "environment": self._environment(),
                },
                wandb=made.wandb,
            ),
        )
        return _Packed(cell, plan, order)

    def _seal(self, made: Assembly) -> tuple[Sealed, Literal["cpu", "cuda"]]:
        from fedray.launch import seal

        return seal(made, self.cluster)

    def _plan(self, made: Assembly, cluster: Cluster, device: Literal["cpu", "cuda"], client_bytes: int) -> Plan:
        from fedray.sim.plan import make_plan

        return make_plan(
            cluster,
            num_clients=made.spec.num_clients,
            cohort=made.spec.cohort,
            clients_per_actor=made.runtime.clients_per_actor,
            slots=made.runtime.slots,
            device=device,
            client_gpu_bytes=client_bytes,
            sweep=True,
            inline=made.runtime.kind == "inline",
        )

    def _environment(self) -> dict[str, Any]:
        self.environment = self.environment or environment()
        return self.environment

    def _look_at_cards(self) -> None:
        """On a cluster with GPUs, what one client of each kind of run needs there; once runs hold the GPUs, nothing
        could be tried on them."""
        from fedray.sim import ray_runtime

        if self.cluster.gpus < 1:
            return
        for cell in list(self.waiting):
            try:
                made = self._assemble(cell)
            except Exception:  # it comes again when the cell has its turn
                continue
            try:
                sealed, device = self._seal(made)
                if device == "cuda" and _card_key(made) not in self.cards:
                    self.board.note(f"trying one client of {cell.label} on a GPU ...")
                    self.cards[_card_key(made)] = ray_runtime.probe_gpu(sealed, made.population)
            except Exception as error:  # the failure of this kind of cell, and of no other
                self.cards[_card_key(made)] = _ours(error)

    # -- the end -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        self.saved = time.monotonic()
        try:
            write_sweep(self.folder, self.facts, [cell.row() for cell in self.cells if not cell.elsewhere])
        except (OSError, RunError) as error:
            self.board.note(f"sweep.json could not be written: {error}")

    def interrupted(self) -> Interrupted:
        done = sum(cell.status in ("done", "skipped") for cell in self.cells)
        return Interrupted(
            f"interrupted; {done} of {len(self.cells)} runs are done in {self.folder}, and the same command goes on "
            "with the others from what they have written"
        )

    def conclude(self) -> None:
        """Raise what the sweep came to, where that is not that all is done."""
        failed = [cell for cell in self.cells if cell.status == "failed"]
        if not failed:
            return
        if len(failed) == len(self.cells) and all(isinstance(cell.error, ConfigError) for cell in failed):
            raise self.all_refused()
        for cell in failed:
            print(f"fedray: {cell.label}: {cell.error} ({cell.folder})", file=sys.stderr, flush=True)
        raise RunError(
            f"{len(failed)} of {len(self.cells)} runs failed, named above; the others are in {self.folder}, and the "
            "same command repeats what failed"
        )


def _card_key(made: Assembly) -> str:
    """What decides how much memory of a GPU one client takes."""
    config = made.spec.config
    kinds = {group: config[group] for group in ("data", "model", "trainer", "batch_norm", "eval", "personal")}
    kinds |= {group: config[group].get("_target_") for group in ("pruner", "strategy")}
    return repr((kinds, config["correction"]))


def _written(folder: Path) -> str | None:
    """The manifest in a folder, as it stands there; None where there is none, or it cannot be read."""
    try:
        return (folder / MANIFEST_FILE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _clear(folder: Path) -> None:
    """Remove what an earlier run left, for one that is forced."""
    import shutil

    if folder.is_dir():
        shutil.rmtree(folder)


def _clear_checkpoints(folder: Path) -> None:
    """Remove checkpoints of code that may have been mended since."""
    import shutil

    if (folder / "checkpoints").is_dir():
        shutil.rmtree(folder / "checkpoints")


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends a sweep as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signal's
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ours(error: Exception) -> FedrayError:
    return error if isinstance(error, FedrayError) else RunError(f"{type(error).__name__}: {error}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
