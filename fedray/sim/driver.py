"""The loop of rounds: sample, train, settle, evaluate, write the row.

At most one round is open: the evaluation of round r runs beside the training of round r + 1 and its row is
written when both its evaluation and that training are done. Nothing else reads an evaluation.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fedray import costs
from fedray.errors import FedrayError, RunError
from fedray.models.normalisation import from_second_moments
from fedray.round import Context, Message, Policy, Server, View
from fedray.sim.checkpoint import State
from fedray.sim.client import (
    STATISTICS,
    Broadcast,
    ClientResult,
    EvalReply,
    TrainReply,
    Work,
    Worker,
    recomputes,
    same_mask,
    who,
)
from fedray.sim.goals import Progress
from fedray.sim.population import Population
from fedray.sim.runtime import EvalWork, Runtime
from fedray.sim.spec import RunSpec
from fedray.sums import Sums
from fedray.train.engine import try_inputs
from fedray.tree import Mask, Tree, take
from fedray.wire import Downlink, Download, Ledger, Transfer, advance

CHUNK_BATCHES = 4  # evaluation batches per call: small enough to fill gaps at the end of a round


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """A finished round: its row, one dict a client, one dict a transferred part.

    state: what to write as a checkpoint once the row is recorded; None in most rounds.
    """

    row: dict[str, Any]
    clients: list[dict[str, Any]]
    transfers: list[dict[str, Any]]
    accuracies: list[float] | None
    state: Callable[[], State] | None


@dataclass
class _Open:
    """A round that is settled and not yet recorded.

    old_mask: the server's when the round began; trained_mask: the one that it sent.
    extra: transfers beside the training; asked_flops: of what clients trained to answer, by client.
    statistics: of batch normalisation in its model, where they are recomputed.
    overlap: of the masks that clients sent, see `_overlap`.
    views: scores of clients' own models, where these differ from the server's.
    memories, downlink, snapshot: of server and clients at its end, if it ends with a checkpoint.
    times: its `time/*` metrics; download_s: seconds of coding its download here. scores: as they come in, by tag.
    """

    round: int
    results: list[ClientResult]
    server: Server
    old_mask: Mask | None
    trained_mask: Mask | None
    before: Server | None
    wanted: bool
    extra: tuple[Transfer, ...]
    statistics: Tree | None
    views: Mapping[int, Mapping[str, Mapping[str, float]]] | None
    overlap: float | None
    memories: tuple[Any, ...]
    downlink: Downlink
    snapshot: Any
    asked_flops: Mapping[int, float] = field(default_factory=dict)
    download_s: float = 0.0
    times: dict[str, float] = field(default_factory=dict)
    scores: dict[str, dict[int, Mapping[str, np.ndarray]]] = field(default_factory=dict)

    def take(self, reply: EvalReply) -> None:
        self.scores.setdefault(reply.tag, {})[reply.start] = reply.scores


class Driver:
    """Runs one run. `worker` is a host of no clients that gives the model's layout and decodes uploads."""

    def __init__(
        self, spec: RunSpec, population: Population, runtime: Runtime, worker: Worker, state: State | None = None
    ) -> None:
        """state: where to go on; None to begin."""
        self.spec = spec
        self.population = population
        self.runtime = runtime
        self.worker = worker
        self.ledger = Ledger()
        self.downlink = Downlink()
        self.progress = Progress(spec.goals)
        self.stopped: str | None = None  # why the run ended before its last round
        # Clients are evaluated one by one where each has a model, or circumstances, of its own.
        own = any(type(policy).view is not Policy.view for _, policy in spec.policies)
        self.each_client = own or population.skew is not None
        # Of batch normalisation, where they are recomputed for each evaluation.
        self.statistics: Tree | None = None
        self._measured: Tree | None = None  # the parameters that they belong to
        self.vouched = self._vouched()
        self.sizes = np.diff(population.starts)
        self.flops = self._dense_flops()
        self.activation_bytes = self._activation_bytes()
        self.train_flops = self.simulated_s = self.simulated_j = 0.0
        self.first_round = 1
        self.elapsed_s = 0.0
        if state is None:
            self.server, self.memories = self._init()
            return
        self.server = replace(state.server, mask=worker.intern(state.server.mask))
        self.memories = state.memories
        self.ledger.total = dict(state.totals)
        self.downlink = state.downlink
        if state.statistics is not None:
            self.statistics, self._measured = state.statistics, self.server.params
        if state.progress:
            self.progress = Progress.of_plain(spec.goals, state.progress)
        self.train_flops = state.train_flops
        self.simulated_s, self.simulated_j = state.simulated_s, state.simulated_j
        self.first_round = state.round + 1
        self.elapsed_s = state.elapsed_s
        runtime.restore(state.records, state.round)

    # -- the loop ------------------------------------------------------------------------------------------------

    def rounds(self) -> Iterator[RoundRecord]:
        """Every round of the run, in order, each when it is finished.

        What belongs to a finished round (its row, its digest, and what the caller does with its record) is done while
        the next one's clients train: between two rounds there is only the sum, the settling and the broadcast.
        """
        waiting: _Open | None = None  # its evaluation is still out
        finished: list[_Open] = []
        run_started, cpu_before = time.perf_counter(), time.process_time()
        self.stopped = self.progress.why_stop  # it may go on from where it stopped
        if self.stopped is not None:
            return
        for round in range(self.first_round, self.spec.rounds + 1):
            started = time.perf_counter()
            cohort = self.spec.sample_cohort(round, self.sizes)
            old_mask = self.server.mask
            try:
                asked, asked_flops = self._exchanges(round, cohort)
                download = self._download(round, cohort)
                download_s = time.perf_counter() - started
                handle = self.runtime.put(
                    Broadcast(round=round, server=self.server, memories=self.memories, cohort=cohort, download=download)
                )
                evaluations = [] if waiting is None else self._evaluations(waiting)
                replies = self.runtime.start(handle, self._costs(cohort), evaluations)
                while finished:
                    yield self._record(finished.pop(0))
                sums, results = self._gather(round, replies, waiting)
                if waiting is not None:
                    finished.append(waiting)
                    waiting = None
                waiting = self._settle(round, cohort, sums, results)
                waiting.old_mask, waiting.extra = old_mask, asked + waiting.extra
                waiting.asked_flops = asked_flops
            except FedrayError as error:
                # The rounds before are complete but for an evaluation: a failure now must not lose them.
                for done in finished:
                    yield self._record(done)
                if waiting is not None:
                    try:
                        last = self._finish(waiting)
                    except FedrayError as another:  # what went wrong first is what the user has to know
                        error.add_note(f"round {waiting.round} was not recorded: {another}")
                    else:
                        yield last
                raise
            waiting.download_s = download_s
            now, cpu_now = time.perf_counter(), time.process_time()
            waiting.times = {
                "time/round_s": now - started,
                "time/total_s": self.elapsed_s + now - run_started,
                # Of the driver's process alone, from the end of one round to the end of the next.
                "time/driver_cpu_s": cpu_now - cpu_before,
            }
            cpu_before = cpu_now
            if not waiting.wanted:
                finished.append(waiting)
                waiting = None
            elif self.spec.goals.stops:
                # Whether there is another round depends on this evaluation, so nothing can be trained beside it.
                while finished:
                    yield self._record(finished.pop(0))
                done, waiting = waiting, None
                yield self._finish(done)
                self.stopped = self.progress.why_stop
                if self.stopped is not None:
                    break
        for done in finished:
            yield self._record(done)
        if waiting is not None:
            yield self._finish(waiting)

    def _finish(self, waiting: _Open) -> RoundRecord:
        """Evaluate and record a round beside which nothing is trained."""
        for reply in self.runtime.start(None, (), self._evaluations(waiting)):
            assert isinstance(reply, EvalReply)
            waiting.take(reply)
        return self._record(waiting)

    def _costs(self, cohort: tuple[int, ...]) -> list[tuple[int, float]]:
        """Each client with the steps that it will take, by which calls are balanced."""
        return [(client, float(self.spec.trainer.num_steps(int(self.sizes[client])))) for client in cohort]

    def _gather(
        self, round: int, replies: Iterator[TrainReply | EvalReply], waiting: _Open | None
    ) -> tuple[Sums, list[ClientResult]]:
        sums = Sums()
        results: list[ClientResult] = []
        for reply in replies:
            if isinstance(reply, EvalReply):
                assert waiting is not None
                waiting.take(reply)
                continue
            if reply.payload is not None:
                # The server knows the mask that it sent: the upload of an unchanged one names it in a byte.
                sent = self.worker.intern(reply.sent_mask if reply.own_mask else self.server.mask)
                whose = who(reply.results[0].client, round)
                sums.add(self.worker.receive(reply.payload, sent, whose), who=whose)
            if reply.sums is not None:
                sums.merge(reply.sums)
            results.extend(reply.results)
        return sums, sorted(results, key=lambda result: result.client)

    def _settle(self, round: int, cohort: tuple[int, ...], sums: Sums, results: list[ClientResult]) -> _Open:
        spec, trained_mask = self.spec, self.server.mask
        ctx = self._context(round, cohort)
        server, memories, before = self.server, list(self.memories), None
        overlap = self._overlap(sums)
        for at in reversed(range(len(spec.policies))):
            name, policy = spec.policies[at]
            try:
                settled, sums, memories[at] = policy.settle(server, sums, memories[at], ctx)
            except FedrayError:
                raise
            except Exception as error:
                raise RunError(f"round {round}, {name}.settle: {type(error).__name__}: {error}") from error
            if before is None and not same_mask(server.mask, settled.mask):
                before = server  # what a pruning event found
            server = settled
        self.server = replace(server, mask=self.worker.intern(server.mask))
        self.memories = tuple(memories)
        wanted = self._evaluates(round)
        extra: tuple[Transfer, ...] = ()
        if wanted and recomputes(spec):
            extra = self._recompute(round, cohort)
            before = None  # statistics of another model would make it look worse than it is
        every = spec.checkpoint_every
        saved = every > 0 and round % every == 0
        return _Open(
            round,
            results,
            self.server,
            trained_mask,
            trained_mask,
            before if wanted else None,
            wanted,
            extra,
            self.statistics if self._measured is self.server.params else None,
            self._views(round, cohort) if wanted and self.each_client else None,
            overlap=overlap,
            memories=self.memories if saved else (),
            downlink=self.downlink,
            snapshot=self.runtime.snapshot() if saved else None,
        )

    def _exchanges(self, round: int, cohort: tuple[int, ...]) -> tuple[tuple[Transfer, ...], dict[int, float]]:
        """Put the policies' questions before the training; what crossed, and FLOPs of training for an answer."""
        transfers: list[Transfer] = []
        flops: dict[int, float] = {}
        for at, (name, policy) in enumerate(self.spec.policies):
            ctx = self._context(round, cohort)
            try:
                wanted = tuple(policy.exchanges(self.memories[at], ctx))
            except FedrayError:
                raise
            except Exception as error:
                raise RunError(f"round {round}, {name}.exchanges: {type(error).__name__}: {error}") from error
            for exchange in wanted:
                chosen = range(self.spec.num_clients) if exchange.clients == "all" else exchange.clients
                clients = cohort if chosen == "cohort" else tuple(int(client) for client in chosen)
                handle = self.runtime.put(
                    Broadcast(round=round, server=self.server, memories=self.memories, cohort=cohort)
                )
                sums, crossed = Sums(), []
                sent_flops = costs.masked_flops(self.flops, self.server.mask)
                for reply in self.runtime.ask("answer", handle, self._costs(clients), at, exchange):
                    sums.merge(reply.sums)
                    crossed += reply.transfers
                    for client, work in reply.work.items():
                        flops[client] = flops.get(client, 0.0) + self._trained(work, sent_flops)
                transfers += sorted(crossed, key=lambda transfer: (transfer.client, transfer.direction))
                try:
                    server, memory = policy.learn(exchange, self.server, sums, self.memories[at], ctx)
                except FedrayError:
                    raise
                except Exception as error:
                    what = f"round {round}, {name}.learn of exchange {exchange.name!r}"
                    raise RunError(f"{what}: {type(error).__name__}: {error}") from error
                self.server = replace(server, mask=self.worker.intern(server.mask))
                self.memories = (*self.memories[:at], memory, *self.memories[at + 1 :])
        return tuple(transfers), flops

    def _vouched(self) -> str | None:
        """The part in which the strategy has clients send what they made of the parameters; its support is theirs.

        The strategy is next to what cuts; what a pruner or a correction sends besides may have another support.
        """
        params, buffers = self.worker.origin.layout, self.worker.origin_buffers.layout
        policies = [policy for _, policy in self.spec.policies]
        after = max((at + 1 for at, policy in enumerate(policies) if policy.cuts != "none"), default=0)
        for policy in policies[after:]:
            for part, spec in policy.parts(params, buffers).items():
                if spec.direction == "up" and spec.layout == params:
                    return part
        return None

    def _overlap(self, sums: Sums) -> float | None:
        """How far the masks that clients sent agree: coordinates that two clients both kept, over those that either
        did, added over all pairs; prunable ones. None with fewer than two clients, or where nothing was cut."""
        layout = self.worker.origin.layout
        name = self.vouched
        if name is None or name not in sums or sums.count(name) < 2:
            return None
        if sums.agree(name):
            return None if sums.support(name).flat.all() else 1.0
        holders = take(Tree(layout, sums.holders(name).double()), self.worker.prunable).flat
        count, kept = sums.count(name), float(holders.sum())
        if kept == count * holders.numel():
            return None
        both = float((holders * (holders - 1)).sum()) / 2
        either = (count - 1) * kept - both
        return both / either if either else 1.0

    def _download(self, round: int, cohort: tuple[int, ...]) -> Download | None:
        """What clients are sent this round, where it depends on what they were sent before; None where it does not:
        then it is made where the client lives."""
        codec = self.worker.codec
        if not (codec.followed or codec.feeds_back("down")):
            return None
        ctx, message = self._context(round, cohort), Message()
        for (name, policy), memory in zip(self.spec.policies, self.memories, strict=True):
            try:
                message = policy.send(self.server, message, memory, ctx)
            except FedrayError:
                raise
            except Exception as error:
                raise RunError(
                    f"round {round}, {name}.send: {type(error).__name__}: {error}; downloads that are changes, or are "
                    "fed back, are the same for all clients: a policy that sends each its own says `sends_each = True`"
                ) from error
        try:
            key = self.spec.download_key(round)
            download, self.downlink = advance(codec, message, self.downlink, round=round, key=key)
        except FedrayError as error:
            raise type(error)(f"the download of round {round}: {error}") from error
        return download

    def _init(self) -> tuple[Server, tuple[Any, ...]]:
        server = Server(params=self.worker.origin, buffers=self.worker.origin_buffers)
        if self.spec.initial_mask is not None:
            layout = self.worker.origin.layout
            kept = {name: mask for name, mask in self.spec.initial_mask.items() if name in layout.names}
            server = server.cut(Mask.of(layout, kept))
        ctx = self._context(0, ())
        memories = []
        for name, policy in self.spec.policies:
            try:
                server, memory = policy.init_server(server, ctx)
            except FedrayError:
                raise
            except Exception as error:
                what = f"before the first round, {name}.init_server"
                raise RunError(f"{what}: {type(error).__name__}: {error}") from error
            memories.append(memory)
        return replace(server, mask=self.worker.intern(server.mask)), tuple(memories)

    def _context(self, round: int, cohort: tuple[int, ...]) -> Context:
        spec = self.spec
        return Context(
            round=round,
            key=spec.key.fold("round", round, "server"),
            run_key=spec.key,
            num_clients=spec.num_clients,
            cohort=cohort,
            origin=self.worker.origin,
            prunable=self.worker.prunable,
            flow=self.worker.engine.flow,
            structure=self.worker.structure,
            flops=self.flops,
            probe=self.worker.public_probe(spec.key.fold("round", round, "public")),
            lr=spec.trainer.learning_rate.at(max(round, 1), spec.rounds),
            server_lr=spec.server_rate.at(max(round, 1), spec.rounds),
        )

    # -- evaluation ----------------------------------------------------------------------------------------------

    def _evaluates(self, round: int) -> bool:
        every = self.spec.evaluation.every
        return every > 0 and (round % every == 0 or round == self.spec.rounds)

    def _evaluations(self, waiting: _Open) -> list[EvalWork]:
        unknown = recomputes(self.spec) and waiting.statistics is None
        if not waiting.wanted or not self.worker.has_global_model or unknown:
            return []  # without the tensors that clients keep the server has no model to evaluate
        work = []
        batch = self.spec.evaluation.batch_size
        models = [("after", waiting.server)] + ([("before", waiting.before)] if waiting.before is not None else [])
        for tag, server in models:
            view = View(params=server.params, buffers=server.buffers, mask=None, local_buffers=waiting.statistics)
            handle = self.runtime.put(view)
            for start in range(0, self.population.num_test, batch * CHUNK_BATCHES):
                stop = min(start + batch * CHUNK_BATCHES, self.population.num_test)
                work.append(EvalWork(handle=handle, start=start, stop=stop, batch_size=batch, tag=tag))
        return work

    def _recompute(self, round: int, cohort: tuple[int, ...]) -> tuple[Transfer, ...]:
        """Ask the cohort for the statistics of batch normalisation in the new model; what crossed for it."""
        handle = self.runtime.put(Broadcast(round=round, server=self.server, memories=self.memories, cohort=cohort))
        sums = Sums()
        transfers: list[Transfer] = []
        for reply in self.runtime.ask("statistics", handle, self._costs(cohort)):
            sums.merge(reply.sums)
            transfers += reply.transfers
        if STATISTICS in sums:
            found = from_second_moments(sums.mean(STATISTICS, otherwise=0.0))
            self.statistics, self._measured = found, self.server.params
        elif self._measured is not self.server.params:
            self.statistics = None  # nobody could be asked about this model: it cannot be evaluated
        return tuple(sorted(transfers, key=lambda transfer: (transfer.client, transfer.direction)))

    def _views(self, round: int, cohort: tuple[int, ...]) -> dict[int, Mapping[str, Mapping[str, float]]]:
        """The scores of clients' own models on their local tests, before the next round changes their records."""
        broadcast = Broadcast(
            round=round, server=self.server, memories=self.memories, cohort=cohort, statistics=self.statistics
        )
        clients = self._evaluated_clients(list(cohort))
        found: dict[int, Mapping[str, Mapping[str, float]]] = {}
        handle = self.runtime.put(broadcast)
        costs, batch_size = self._costs(tuple(clients)), self.spec.evaluation.batch_size
        for reply in self.runtime.ask("evaluate_clients", handle, costs, batch_size):
            found |= reply.scores
        return found

    def _evaluated_clients(self, cohort: list[int]) -> list[int]:
        chosen = self.spec.evaluation.clients
        if chosen == "cohort":
            return cohort
        if chosen == "all":
            return list(range(self.spec.num_clients))
        picked = self.spec.key.fold("eval_clients").numpy().choice(self.spec.num_clients, chosen, replace=False)
        return sorted(int(client) for client in picked)

    def _record(self, waiting: _Open) -> RoundRecord:
        row, clients = self._row(waiting)
        task = self.spec.task
        main, accuracies = task.metrics[0], None
        scores = _joined(waiting.scores["after"]) if waiting.scores else None
        if scores is not None:
            means = {name: float(values.mean(dtype=np.float64)) for name, values in scores.items()}
            row |= {f"test/{name}": value for name, value in (means | task.objective.derive(means)).items()}
            if waiting.before is not None:
                before = _joined(waiting.scores["before"])[main]
                row[f"test/{main}_before_prune"] = float(before.mean(dtype=np.float64))
                row[f"test/{main}_after_prune"] = row[f"test/{main}"]
        if waiting.wanted:
            by_model: dict[str, list[float]] = {}
            for client in self._evaluated_clients([result.client for result in waiting.results]):
                own = clients.setdefault(client, {"round": row["round"], "client": client})
                for which, value in self._local_scores(waiting, scores, client, main).items():
                    name = main if which == "own" else f"{which}_{main}"
                    own[f"test/{name}"] = value
                    by_model.setdefault(name, []).append(value)
            for name, values in by_model.items():
                row[f"client/{name}_mean"] = float(np.mean(values))
                row[f"client/{name}_p10"] = float(np.percentile(values, 10))
                row[f"client/{name}_p90"] = float(np.percentile(values, 90))
            accuracies = by_model.get(main, [])
        progress = self.progress
        if waiting.wanted:
            if row["round"] % self.spec.evaluation.every:
                progress = copy.deepcopy(progress)  # evaluated only as the last round: a longer run does not see it
            progress.enter(row)
        row |= progress.metrics()
        transfers = [entry for transfer in _transfers(waiting) for entry in transfer.rows()]
        return RoundRecord(
            row=row,
            clients=list(clients.values()),
            transfers=transfers,
            accuracies=accuracies,
            state=None if waiting.snapshot is None else self._saver(waiting),
        )

    def _local_scores(
        self, done: _Open, scores: Mapping[str, np.ndarray] | None, client: int, main: str
    ) -> dict[str, float]:
        """A client's main metric on its local test, by model."""
        if done.views is not None:
            return {which: metrics[main] for which, metrics in done.views[client].items()}
        assert scores is not None
        # One model for all: a client's local test is a choice of rows that are scored already.
        return {"own": float(scores[main][self.population.local_test(client)].mean(dtype=np.float64))}

    def _saver(self, done: _Open) -> Callable[[], State]:
        """The state at the end of a round; records are loaded only when it is asked for."""
        totals, train_flops = dict(self.ledger.total), self.train_flops
        simulated_s, simulated_j = self.simulated_s, self.simulated_j
        progress, statistics = self.progress.plain(), done.statistics

        def state() -> State:
            return State(
                run_id=self.spec.run_id,
                round=done.round,
                server=done.server,
                memories=done.memories,
                records=self.runtime.load(done.snapshot),
                totals=totals,
                train_flops=train_flops,
                elapsed_s=done.times["time/total_s"],
                simulated_s=simulated_s,
                simulated_j=simulated_j,
                downlink=done.downlink,
                progress=progress,
                statistics=statistics,
            )

        return state

    # -- metrics -------------------------------------------------------------------------------------------------

    def _row(self, done: _Open) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        """The metrics that need no evaluation, of the round and by client. Called once a round, in order: the totals
        go on."""
        results, old_mask, mask, prunable = done.results, done.old_mask, done.server.mask, self.worker.prunable
        trained = [result for result in results if result.num_steps]
        weights = sum(result.num_examples for result in trained)
        row: dict[str, Any] = {"round": done.round}
        row["train/loss"] = sum(r.loss * r.num_examples for r in trained) / weights if weights else float("nan")
        row["model/sparsity"] = 0.0 if mask is None else mask.sparsity(prunable)
        row["model/sparsity_all"] = 0.0 if mask is None else mask.sparsity()
        if mask is not None:
            row |= {f"model/layer_sparsity/{name}": mask.sparsity((name,)) for name in prunable}
            row |= _movement(old_mask, mask, prunable)
        if done.overlap is not None:
            row["prune/overlap"] = done.overlap
        row["model/flops"] = costs.masked_flops(self.flops, mask)
        sent_flops = costs.masked_flops(self.flops, done.trained_mask)
        flops = dict(done.asked_flops)
        for result in results:
            flops[result.client] = flops.get(result.client, 0.0) + self._trained(result.work, sent_flops)
        self.train_flops += sum(flops[client] for client in sorted(flops))
        row["model/train_flops"] = self.train_flops
        sent_sparsity = 0.0 if done.trained_mask is None else done.trained_mask.sparsity(prunable)
        sparsities = {result.client: self._sparsity(result, sent_sparsity) for result in results}
        if any(sparsities.values()):
            row["client/sparsity_mean"] = float(np.mean(list(sparsities.values())))
        memory = self._memory(mask)
        row |= memory
        if self.spec.hardware is not None:
            row["device/memory_share"] = memory["model/peak_bytes"] / self.spec.hardware.memory_bytes
        row |= self.ledger.enter(_transfers(done))
        row["time/train_s"] = sum(result.seconds for result in results)
        row["time/wire_s"] = done.download_s + sum(result.wire_seconds for result in results)
        row |= done.times
        row["digest"] = digest(done.server)
        clients = {
            result.client: {
                "round": done.round,
                "client": result.client,
                "num_examples": result.num_examples,
                "num_steps": result.num_steps,
                "train/loss": result.loss,
                "sparsity": sparsities[result.client],
                "train_flops": flops[result.client],
                "time/train_s": result.seconds,
                "time/wire_s": result.wire_seconds,
            }
            for result in results
        }
        for client in sorted({transfer.client for transfer in done.extra} - set(clients)):
            # Asked and not trained: what it computed and sent is part of the round all the same.
            clients[client] = {"round": done.round, "client": client, "train_flops": flops.get(client, 0.0)}
        return row | self._simulated(done, clients), clients

    def _trained(self, work: Sequence[Work], sent_flops: float) -> float:
        """FLOPs of what a client trained; sent_flops: of one sample under the mask that it was sent."""
        layout = self.worker.origin.layout
        total = 0.0
        for one in work:
            flops = sent_flops if one.kept is None else costs.kept_flops(self.flops, layout, one.kept)
            total += costs.TRAIN_FACTOR * one.num_seen * flops
        return total

    def _sparsity(self, result: ClientResult, sent: float) -> float:
        """The fraction removed of what a client uploaded; sent: of what it was sent."""
        if result.kept is None:
            return sent
        spans = self.worker.origin.layout.spans
        total = sum(spans[name].stop - spans[name].start for name in result.kept)
        return 1.0 - sum(result.kept.values()) / total if total else 0.0

    def _simulated(self, done: _Open, clients: dict[int, dict[str, Any]]) -> dict[str, float]:
        """Time and energy on the clients' imagined hardware and links, of those that trained and of those that were
        only asked; nothing where the run names neither."""
        spec = self.spec
        if spec.hardware is None and spec.link is None:
            return {}
        simulated = []
        sent = {client: dict.fromkeys(("down", "up"), 0) for client in clients}
        for transfer in _transfers(done):
            sent[transfer.client][transfer.direction] += transfer.total_bytes
        for client, row in clients.items():
            one = costs.simulate(
                spec.hardware,
                spec.link,
                key=spec.key,
                client=client,
                train_flops=row["train_flops"],
                down_bytes=sent[client]["down"],
                up_bytes=sent[client]["up"],
            )
            simulated.append(one)
            row |= {"time/simulated_s": one.seconds, "energy/simulated_j": one.joules}
        seconds, joules = costs.round_seconds(simulated), sum(one.joules for one in simulated)
        self.simulated_s += seconds
        self.simulated_j += joules
        return {
            "time/simulated_s": seconds,
            "time/total_simulated_s": self.simulated_s,
            "energy/simulated_j": joules,
            "energy/total_simulated_j": self.simulated_j,
        }

    def _memory(self, mask: Mask | None) -> dict[str, int]:
        """What one training step of a client holds, by the convention of `costs.client_memory`."""
        optim = self.spec.trainer.optim
        states = (1 if optim.momentum else 0) if optim.name == "sgd" else 2
        memory = costs.client_memory(
            self.worker.engine.module, activations=self.activation_bytes, optimizer_states=states, mask=mask
        )
        return {
            "model/weight_bytes": memory.weight_bytes,
            "model/activation_bytes": memory.activation_bytes,
            "model/peak_bytes": memory.peak_bytes,
        }

    def _activation_bytes(self) -> int:
        count, objective = min(self.spec.trainer.batch_size, int(self.sizes.max())), self.spec.task.objective
        batch = try_inputs(count, self.population.sample_shape, self.population.vocabulary)

        def loss(outputs: torch.Tensor) -> torch.Tensor:
            targets = objective.targets(count, outputs.shape[-1], self.population.sample_shape)
            return objective.loss(outputs, targets)

        return costs.activation_bytes(self.worker.engine.module, batch, loss=loss)

    def _dense_flops(self) -> dict[str, int]:
        sample = try_inputs(1, self.population.sample_shape, self.population.vocabulary)
        return costs.forward_flops(self.worker.engine.module, sample.to(self.worker.engine.device))


def _transfers(done: _Open) -> list[Transfer]:
    return [transfer for result in done.results for transfer in result.transfers] + list(done.extra)


def digest(server: Server) -> str:
    """32 hex digits that name weights, mask and buffers; equal digests are equal bits."""
    state = hashlib.blake2b(digest_size=16)
    state.update(server.params.flat.numpy().data)
    state.update(server.buffers.flat.numpy().data)
    state.update(b"" if server.mask is None else server.mask.digest)
    return state.hexdigest()


def _movement(old: Mask | None, new: Mask, prunable: tuple[str, ...]) -> dict[str, float]:
    """How the server's mask changed in a round, over the prunable coordinates.

    churn: fraction whose place changed. regrown: fraction of the kept that came back. dead_filters: rows of weights
    (filters, neurons) of which nothing is kept.
    """
    changed = total = back = kept = dead = 0
    for name in prunable:
        now = new[name]
        before = torch.ones_like(now) if old is None else old[name]
        changed += int((now != before).sum())
        back += int((now & ~before).sum())
        kept += int(now.sum())
        total += now.numel()
        if now.dim() > 1:
            dead += int((~now.flatten(1).any(1)).sum())
    return {
        "prune/churn": changed / total if total else 0.0,
        "prune/regrown": back / kept if kept else 0.0,
        "prune/dead_filters": dead,
    }


def _joined(pieces: Mapping[int, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The scores of all test rows in order, whatever order the pieces came in."""
    ordered = [pieces[start] for start in sorted(pieces)]
    return {name: np.concatenate([piece[name] for piece in ordered]) for name in ordered[0]}
