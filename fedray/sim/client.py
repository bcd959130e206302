"""The work of clients, as a pure function of a broadcast, records and data.

A worker hosts any number of clients and caches what is costly to build; whatever must outlive a call is in the
records that it returns. Everything of a client happens here: `send` for it, both ends of its wire, training.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fedray.errors import ClientError, ConfigError, FedrayError, WireError
from fedray.keys import Key
from fedray.models.normalisation import from_second_moments, second_moments
from fedray.models.structure import find_structure
from fedray.models.task import Scope, kinds, layouts, prunable_names
from fedray.prune.structure import Structure
from fedray.round import (
    ClientInfo,
    Context,
    Exchange,
    Fit,
    Job,
    Message,
    Part,
    PartSpec,
    Policy,
    Probe,
    Server,
    View,
)
from fedray.sim.population import Population
from fedray.sim.spec import RunSpec
from fedray.sums import Sums, largest_fit
from fedray.train import Engine, Samples
from fedray.train.engine import try_inputs
from fedray.tree import Mask, Tree, put, take
from fedray.wire import Codec, Download, Packet, Transfer, Wire
from fedray.wire.codec import NOTHING, Trees
from fedray.wire.ledger import Direction

STATISTICS = "statistics"  # the exchange in which they are recomputed
SUMMED_AT_ONCE = 8  # uploads that are kept until they are added together


@dataclass(frozen=True, kw_only=True)
class Broadcast:
    """The server's side of a round, put into the object store once. round: the one that begins.

    download: what clients are sent, where it depends on earlier downloads; None where each one's is made anew.
    statistics: of batch normalisation, where they are recomputed for an evaluation.
    """

    round: int
    server: Server
    memories: tuple[Any, ...]
    cohort: tuple[int, ...]
    download: Download | None = None
    statistics: Tree | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a client keeps between rounds: each policy's memory, and what its end of the wire remembers.

    known: the mask last exchanged. residuals: what its uploads lost, by part; warm: what its stages start from.
    version: the download that it holds, 0 for none; counted only where downloads are changes.
    """

    memories: tuple[Any, ...]
    known: Mask | None
    residuals: Trees = field(default_factory=dict)
    warm: Trees = field(default_factory=dict)
    version: int = 0

    def same(self, other: Record) -> bool:
        """Whether nothing changed: policies return the very object where they change nothing."""
        if self.version != other.version or not same_mask(self.known, other.known):
            return False
        if self.residuals is not other.residuals or self.warm is not other.warm:
            return False
        return all(mine is theirs for mine, theirs in zip(self.memories, other.memories, strict=True))


@dataclass(frozen=True, kw_only=True)
class Work:
    """Examples that gradients were taken of, under a mask. kept: coordinates by tensor; None for the server's mask."""

    num_seen: int
    kept: Mapping[str, float] | None


@dataclass(frozen=True, kw_only=True)
class ClientResult:
    """What the driver logs of one client's round.

    seconds: time of its training; wire_seconds: of its encoding and decoding, both ends.
    work: what it trained: the job of the round, then additional ones.
    kept: prunable coordinates by tensor in what it uploaded, where that is not what the server's mask keeps.
    """

    client: int
    num_examples: int
    num_steps: int
    loss: float
    seconds: float
    wire_seconds: float
    transfers: tuple[Transfer, ...]
    record_changed: bool
    work: tuple[Work, ...] = ()
    kept: Mapping[str, int] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainReply:
    """One call's answer: the payload where it trained a single client, else the partial sum. Same bits either way.

    own_mask: whether that client was sent another mask than the server's; then sent_mask is it.
    """

    results: tuple[ClientResult, ...]
    payload: bytes | None
    sums: Sums | None
    own_mask: bool
    sent_mask: Mask | None


@dataclass(frozen=True, kw_only=True)
class EvalReply:
    """Every metric per sample for test rows start to stop, float32 numpy arrays."""

    tag: str
    start: int
    scores: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ClientScores:
    """Each client's metrics on its local test, by model: "own" is the one that it would run, "global" the server's."""

    scores: Mapping[int, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True, kw_only=True)
class StatisticsReply:
    """Sums of means and mean squares by client, and what crossed for them."""

    sums: Sums
    transfers: tuple[Transfer, ...]


@dataclass(frozen=True, kw_only=True)
class ExchangeReply:
    """The sum of the answers of an exchange, what crossed, and what was trained for it, by client."""

    sums: Sums
    transfers: tuple[Transfer, ...]
    work: Mapping[int, tuple[Work, ...]]


@dataclass
class _Turn:
    """What changes while a client has its turn: the tensors that it keeps, and what additional jobs trained.

    mask: the server's, that most work is done under.
    """

    local: Tree | None
    local_buffers: Tree | None
    mask: Mask | None = None
    work: list[Work] = field(default_factory=list)


@dataclass(frozen=True)
class _Download:
    """A payload with what it was made of; content: (part, flat values, weight, support), compared by identity."""

    round: int
    content: list[tuple[str, torch.Tensor, float, Mask | None]]
    mask: Mask | None
    known: Mask | None
    packet: Packet


@dataclass(frozen=True)
class _Done:
    """One client's round. received: what the server makes of the payload; None where nobody here needs it."""

    payload: bytes
    received: Message | None
    sent_mask: Mask | None
    result: ClientResult
    record: Record | None


class Worker:
    """Hosts clients in one process."""

    def __init__(self, spec: RunSpec, population: Population) -> None:
        if spec.device == "cuda":
            # Same seed, same bits: no kernel may choose its order of summation at run time.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.backends.cudnn.benchmark = False
            torch.use_deterministic_algorithms(True)
        self.spec = spec
        self.population = population
        self.structure: Structure | None = None
        if cuts_units(spec):
            sample = try_inputs(1, population.sample_shape, population.vocabulary)
            self.structure = structure_of(spec.task.module(spec.key.fold("model")), sample, spec.task.scope)
        self.engine = Engine(
            spec.task,
            key=spec.key.fold("model"),
            sample_shape=population.sample_shape,
            device=spec.device,
            kind=spec.trainer.engine,
            vocabulary=population.vocabulary,
            kept=kept_names(spec.task.module(spec.key.fold("model")), spec) if keepers(spec) else frozenset(),
            structure=self.structure,
        )
        self.origin, self.origin_buffers, self.local, self.local_buffers = self.engine.origin()
        names = prunable_names(self.engine.module, spec.task.scope)
        self.prunable = tuple(name for name in names if name not in self.engine.kept)
        self.has_global_model = has_global_model(self.engine.module, spec)
        self.codec = codec_of(self.engine.module, spec)
        self._exchange_codecs: dict[tuple[int, str], Codec] = {}
        self._masks: dict[bytes, Mask] = {}
        self._last_download: _Download | None = None

    # -- one call ------------------------------------------------------------------------------------------------

    def train(
        self, broadcast: Broadcast, clients: Sequence[int], records: Mapping[int, Record | None]
    ) -> tuple[TrainReply, dict[int, Record]]:
        """Train these clients; returns the reply and the records that changed. A missing record is a first round."""
        server = replace(broadcast.server, mask=self.intern(broadcast.server.mask))
        broadcast = replace(broadcast, server=server, download=self._interned(broadcast.download))
        results, changed, sums = [], {}, Sums()
        payload: bytes = b""
        sent_mask: Mask | None = None
        received: list[tuple[Message, Mapping[str, float]]] = []
        # A payload can be decoded elsewhere if no more than the mask must be known for it.
        single = len(clients) == 1 and not self.codec.refers
        for client in clients:
            done = self._one(broadcast, client, records.get(client), summed=not single)
            payload, sent_mask = done.payload, done.sent_mask
            results.append(done.result)
            if done.record is not None:
                changed[client] = done.record
            if not single:
                assert done.received is not None
                received.append((done.received, largest_fit(done.received, who(client, broadcast.round))))
            if len(received) == SUMMED_AT_ONCE:
                sums.add_all(received)
                received = []
        sums.add_all(received)
        own_mask = single and not same_mask(sent_mask, server.mask)
        reply = TrainReply(
            results=tuple(results),
            payload=payload if single else None,
            sums=None if single else sums,
            own_mask=own_mask,
            sent_mask=sent_mask if own_mask else None,
        )
        return reply, changed

    def receive(self, payload: bytes, sent_mask: Mask | None, whose: str, reference: Trees = NOTHING) -> Message:
        """What the server makes of an upload; it knows the mask and the parts that it sent. whose: for errors."""
        try:
            return self.codec.decode(payload, direction="up", known=sent_mask, reference=reference)
        except WireError as error:
            raise WireError(f"{whose}: {error}") from error

    def evaluate(self, model: Server | View, start: int, stop: int, batch_size: int, tag: str) -> EvalReply:
        """Score test rows start to stop in batches that do not depend on how rows were dealt to calls."""
        if isinstance(model, View):
            view = model
        else:
            view = View(params=model.params, buffers=model.buffers, mask=None)
        scores = self.engine.evaluate(view, self.population.test(start, stop), batch_size)
        return EvalReply(tag=tag, start=start, scores={name: values.numpy() for name, values in scores.items()})

    def evaluate_clients(
        self, broadcast: Broadcast, clients: Sequence[int], records: Mapping[int, Record | None], batch_size: int
    ) -> ClientScores:
        """Score the model that each of these clients would run on its own local test, and where there is a whole
        model at the server that one too. `broadcast` is the state at the end of a round, so nothing is remembered.

        Where statistics of batch normalisation are recomputed, those of the broadcast are the server's model's. A
        client that runs another one, such as a narrow one, takes those of its own training data in that one: it can
        do so by itself, and in the cohort there may be nobody else who runs it.
        """
        server = replace(broadcast.server, mask=self.intern(broadcast.server.mask))
        scores: dict[int, dict[str, dict[str, float]]] = {}
        for client in clients:
            samples, record = self.population.train(client), records.get(client)
            ctx = self._context(broadcast, client, record, samples, "view")
            if record is None:
                record = self._new_record(ctx)
            given = View(
                params=server.params,
                buffers=server.buffers,
                mask=server.mask,
                local=self.local,
                local_buffers=self.local_buffers if broadcast.statistics is None else broadcast.statistics,
            )
            views = {"own": self._view(given, record, ctx, samples=samples)}
            if self.has_global_model:
                views["global"] = given
            local = self.population.local_samples(client)
            scores[client] = {
                which: {
                    name: float(values.mean(dtype=torch.float64))
                    for name, values in self.engine.evaluate(view, local, batch_size).items()
                }
                for which, view in views.items()
            }
        return ClientScores(scores=scores)

    def statistics(
        self, broadcast: Broadcast, clients: Sequence[int], records: Mapping[int, Record | None]
    ) -> StatisticsReply:
        """What batch normalisation sees of these clients' data in the model that they are sent, and what it costs to
        send it and to answer. Nothing is remembered, so a mask that a client does not know is sent to it again."""
        broadcast = replace(broadcast, server=replace(broadcast.server, mask=self.intern(broadcast.server.mask)))
        sums, transfers = Sums(), []
        assert self.local_buffers is not None
        layout = self.local_buffers.layout
        codec = Codec(
            {STATISTICS: PartSpec(layout=layout, direction="up", lossy=False, absolute=True)},
            self.origin.layout,
            (),
            Wire(),
        )
        for client in clients:
            samples, record = self.population.train(client), records.get(client)
            ctx = self._context(broadcast, client, record, samples, STATISTICS)
            whose = f"{who(client, broadcast.round)}, {STATISTICS}"
            record = record or self._new_record(ctx)
            message, down, _ = self._receive_download(broadcast, record, ctx, whose, only=("params", "buffers"))
            buffers = message["buffers"] if "buffers" in message else self.origin_buffers
            view = View(params=message["params"], buffers=buffers, mask=message.mask, local_buffers=self.local_buffers)
            found, count = self.engine.statistics(view, samples)
            answer = Message(
                parts={STATISTICS: Part(value=take(second_moments(found), layout.names), weight=float(count))}
            )
            up = codec.encode(answer, direction="up", known=None, key=ctx.key, leaves=False)
            sums.add(codec.decode(up.payload, direction="up", known=None), who=whose)
            sent = Transfer(round=broadcast.round, client=client, direction="up", sizes=up.sizes)
            transfers += [replace(transfer, exchange=STATISTICS) for transfer in (down, sent)]
        return StatisticsReply(sums=sums, transfers=tuple(transfers))

    def answer(
        self,
        broadcast: Broadcast,
        clients: Sequence[int],
        records: Mapping[int, Record | None],
        at: int,
        exchange: Exchange,
    ) -> ExchangeReply:
        """Put an exchange of the policy at this place of the onion to these clients. Nothing is remembered."""
        broadcast = replace(broadcast, server=replace(broadcast.server, mask=self.intern(broadcast.server.mask)))
        name, policy = self.spec.policies[at]
        codec, sums = self.exchange_codec(at, exchange.name), Sums()
        transfers: list[Transfer] = []
        works: dict[int, tuple[Work, ...]] = {}
        for client in clients:
            samples, record = self.population.train(client), records.get(client)
            ctx = self._context(broadcast, client, record, samples, exchange.name)
            turn = _Turn(self.local, self.local_buffers, broadcast.server.mask)
            ctx = self._looking(ctx, samples, turn)
            record = record or self._new_record(ctx)
            whose = f"{who(client, broadcast.round)}, exchange {exchange.name!r}"
            question = self._hook(name, "ask", ctx, policy.ask, exchange, broadcast.server, broadcast.memories[at], ctx)
            asked, down = self._cross(codec, question, "down", record.known, ctx, whose)
            memory = record.memories[at]
            reply = self._hook(name, "answer", ctx, policy.answer, exchange, asked, memory, ctx)
            answer, up = self._cross(codec, reply, "up", asked.mask, ctx, whose)
            transfers += [replace(crossed, exchange=exchange.name) for crossed in (down, up)]
            sums.add(answer, who=whose)
            works[client] = tuple(turn.work)
        return ExchangeReply(sums=sums, transfers=tuple(transfers), work=works)

    def _cross(
        self, codec: Codec, message: Message, direction: Direction, known: Mask | None, ctx: Context, whose: str
    ) -> tuple[Message, Transfer]:
        """A message of an exchange as it is received, and what it cost."""
        assert ctx.client is not None
        try:
            packet = codec.encode(message, direction=direction, known=known, key=ctx.key, leaves=False)
            received = codec.decode(packet.payload, direction=direction, known=known)
        except FedrayError as error:
            raise type(error)(f"{whose}: {error}") from error
        transfer = Transfer(round=ctx.round, client=ctx.client.id, direction=direction, sizes=packet.sizes)
        return replace(received, mask=self.intern(received.mask)), transfer

    def exchange_codec(self, at: int, exchange: str) -> Codec:
        """The wire of an exchange: float32, whatever the run's is, because a loss here would be one of the method."""
        if (at, exchange) not in self._exchange_codecs:
            name, policy = self.spec.policies[at]
            try:
                declared = policy.exchange_parts(self.origin.layout, self.origin_buffers.layout)
            except FedrayError:
                raise
            except Exception as error:
                raise ClientError(f"{name}.exchange_parts: {type(error).__name__}: {error}") from error
            if exchange not in declared:
                raise ClientError(
                    f"{name}.exchanges asks {exchange!r}, and exchange_parts has {', '.join(declared) or 'nothing'}: "
                    "it names the parts of every exchange"
                )
            parts = declared[exchange]
            wire = Wire(entropy=self.spec.wire.entropy)
            self._exchange_codecs[at, exchange] = Codec(parts, self.origin.layout, self.codec.masks.prunable, wire)
        return self._exchange_codecs[at, exchange]

    def intern(self, mask: Mask | None) -> Mask | None:
        """One object per distinct mask, so that its digest and indices are found once."""
        if mask is None:
            return None
        if mask.digest not in self._masks:
            if len(self._masks) >= 64:
                self._masks.clear()
            self._masks[mask.digest] = mask
        return self._masks[mask.digest]

    def _interned(self, download: Download | None) -> Download | None:
        if download is None:
            return None
        wanted = download.wanted
        if wanted is not None:
            parts = {name: replace(part, support=self.intern(part.support)) for name, part in wanted.parts.items()}
            wanted = replace(wanted, parts=parts, mask=self.intern(wanted.mask))
        return replace(download, wanted=wanted, before_mask=self.intern(download.before_mask))

    # -- one client ----------------------------------------------------------------------------------------------

    def _one(self, broadcast: Broadcast, client: int, record: Record | None, *, summed: bool) -> _Done:
        spec, round = self.spec, broadcast.round
        samples = self.population.train(client)
        ctx = self._context(broadcast, client, record, samples)
        key = ctx.key
        fresh = record is None
        if record is None:
            record = self._new_record(ctx)
        turn = _Turn(self.local, self.local_buffers, broadcast.server.mask)
        if self.engine.kept:
            server = broadcast.server
            seen = self._view(
                View(
                    params=server.params,
                    buffers=server.buffers,
                    mask=server.mask,
                    local=self.local,
                    local_buffers=self.local_buffers,
                ),
                record,
                ctx,
                keepers(spec),
            )
            turn = _Turn(seen.local, seen.local_buffers, broadcast.server.mask)
        ctx = self._looking(ctx, samples, turn)
        whose = who(client, round)
        message, down, wire_seconds = self._receive_download(broadcast, record, ctx, whose)
        sent_mask = message.mask
        sent: Trees = {name: part.value for name, part in message.parts.items()} if self.codec.refers else NOTHING

        started = time.perf_counter()
        fit, job, after = self._train(message, samples, record, ctx)
        turn.local, turn.local_buffers = fit.local, fit.local_buffers
        trained = _work(fit.num_seen, job, turn.mask)
        answer = Message()
        for at, (name, policy) in enumerate(spec.policies):
            fit, answer, after[at] = self._hook(name, "end", ctx, policy.end, fit, answer, after[at], ctx)
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        answer = replace(answer, mask=self.intern(answer.mask))
        wanted = self.codec.add_residuals(answer, record.residuals, "up")
        up = self._encode(
            wanted, "up", sent_mask, key.fold("wire"), whose, leaves=not summed, reference=sent, warm=record.warm
        )
        feeds_back = bool(self.codec.feeds_back("up"))
        received = self.receive(up.payload, sent_mask, whose, sent) if summed or feeds_back else None
        residuals = record.residuals
        if feeds_back:
            assert received is not None
            residuals = self.codec.residuals(wanted, received, residuals, "up")
        wire_seconds += time.perf_counter() - started

        last = answer.mask if answer.mask is not None else sent_mask
        # A message without a mask keeps everything, whatever the client was sent.
        full = {name: self.origin[name].numel() for name in self.prunable}
        new = Record(
            memories=tuple(after),
            known=last,
            residuals=residuals,
            warm={**record.warm, **up.warm} if up.warm else record.warm,
            version=round if broadcast.download is not None and broadcast.download.change is not None else 0,
        )
        changed = (fresh and not _empty(new)) or not new.same(record)
        result = ClientResult(
            client=client,
            num_examples=len(samples),
            num_steps=fit.num_steps,
            loss=fit.loss,
            seconds=seconds,
            wire_seconds=wire_seconds,
            transfers=(down, Transfer(round=round, client=client, direction="up", sizes=up.sizes)),
            record_changed=changed,
            work=(trained, *turn.work),
            kept=None
            if same_mask(answer.mask, broadcast.server.mask)
            else (full if answer.mask is None else answer.mask.counts(self.prunable)),
        )
        return _Done(up.payload, received, sent_mask, result, new if changed else None)

    def _receive_download(
        self, broadcast: Broadcast, record: Record, ctx: Context, whose: str, only: Sequence[str] | None = None
    ) -> tuple[Message, Transfer, float]:
        """The message as the client decodes it, what it cost, and the seconds of coding. only: parts to send."""
        assert ctx.client is not None
        shared, round = broadcast.download, broadcast.round
        message, payloads = Message(), 1
        if shared is None:
            for (name, policy), memory in zip(self.spec.policies, broadcast.memories, strict=True):
                if only is not None and policy.sends_each:
                    continue  # it is the server's model that is asked about, and not each client's share of it
                message = self._hook(name, "send", ctx, policy.send, broadcast.server, message, memory, ctx)
            if only is not None:
                message = replace(message, parts={name: p for name, p in message.parts.items() if name in only})
        elif shared.wanted is not None:
            message = shared.wanted
        started = time.perf_counter()
        if shared is None or shared.change is None or shared.whole is None:
            packet = self._download(message, record.known, round, whose)
            message = self.codec.decode(packet.payload, direction="down", known=record.known)
            sizes = packet.sizes
        else:
            missed = shared.sizes(record.version) if record.version else None
            if missed is None:
                sizes = shared.whole.sizes
                message = self.codec.decode(shared.whole.payload, direction="down", known=None)
            else:
                # What it missed it would have decoded to what the server kept: only the last change is left to do.
                sizes, payloads = missed
                message = self.codec.decode(
                    shared.change.payload, direction="down", known=shared.before_mask, reference=shared.before
                )
        message = replace(message, mask=self.intern(message.mask))
        seconds = time.perf_counter() - started
        transfer = Transfer(round=round, client=ctx.client.id, direction="down", sizes=sizes, payloads=payloads)
        return message, transfer, seconds

    def _encode(
        self,
        message: Message,
        direction: Direction,
        known: Mask | None,
        key: Key,
        whose: str,
        *,
        leaves: bool,
        **held: Trees,
    ) -> Packet:
        try:
            return self.codec.encode(message, direction=direction, known=known, key=key, leaves=leaves, **held)
        except FedrayError as error:
            raise type(error)(f"{whose}: {error}") from error

    def _download(self, message: Message, known: Mask | None, round: int, whose: str) -> Packet:
        """The payload for a client. Most clients of a round are sent the same values under the same known mask, and so
        the same bytes: those are made once, and read by each."""
        content = [(name, part.value.flat, part.weight, part.support) for name, part in message.parts.items()]
        last = self._last_download
        if (
            last is not None
            and last.round == round
            and len(content) == len(last.content)
            and all(
                a == c and b is d and e == f and g is h
                for (a, b, e, g), (c, d, f, h) in zip(content, last.content, strict=True)
            )
            and same_mask(message.mask, last.mask)
            and same_mask(known, last.known)
        ):
            return last.packet
        key = self.spec.download_key(round)
        packet = self._encode(message, "down", known, key, whose, leaves=False)
        self._last_download = _Download(round, content, message.mask, known, packet)
        return packet

    def _context(
        self, broadcast: Broadcast, client: int, record: Record | None, samples: Samples, *names: str
    ) -> Context:
        """What hooks of this client may read; `probe` and `train` as for a look from outside of a round."""
        spec, round = self.spec, broadcast.round
        key = spec.key.fold("round", round, "client", client, *names)
        ctx = Context(
            round=round,
            key=key,
            run_key=spec.key,
            num_clients=spec.num_clients,
            cohort=broadcast.cohort,
            origin=self.origin,
            prunable=self.prunable,
            lr=spec.trainer.learning_rate.at(round, spec.rounds),
            server_lr=spec.server_rate.at(round, spec.rounds),
            flow=self.engine.flow,
            structure=self.structure,
            client=self.population.info(client),
            known=None if record is None else record.known,
        )
        ctx = replace(ctx, job=self._plain_job(len(samples), ctx.lr))
        return self._looking(ctx, samples, _Turn(self.local, self.local_buffers, broadcast.server.mask))

    def _looking(self, ctx: Context, samples: Samples, turn: _Turn) -> Context:
        """With what looks at, trains on and scores with a client's samples, in its turn."""
        assert ctx.client is not None
        return replace(
            ctx,
            probe=partial(self._probe, samples, ctx.key, turn),
            validate=partial(self._validate, ctx.client, turn),
            train=partial(self._train_more, samples, ctx.key, turn),
            score=partial(self._score, samples, turn),
            moments=_Moments(self.engine, samples, turn),
        )

    def _new_record(self, ctx: Context) -> Record:
        memories = tuple(
            self._hook(name, "init_client", ctx, policy.init_client, ctx) for name, policy in self.spec.policies
        )
        return Record(memories=memories, known=None)

    def _view(
        self,
        view: View,
        record: Record,
        ctx: Context,
        only: Sequence[Policy[Any, Any]] | None = None,
        samples: Samples | None = None,
    ) -> View:
        """The model that a client runs, of the server's. only: these policies. samples: what statistics that are
        recomputed are taken of, where they were another model's; None leaves them."""
        recomputed = samples is not None and recomputes(self.spec)
        for at in reversed(range(len(self.spec.policies))):
            name, policy = self.spec.policies[at]
            if only is None or policy in only:
                before, view = view, self._hook(name, "view", ctx, policy.view, view, record.memories[at], ctx)
                other = view.params is not before.params and view.local_buffers is before.local_buffers
                if recomputed and other and view.local_buffers is not None:
                    assert samples is not None
                    found, _ = self.engine.statistics(view, samples)
                    view = replace(view, local_buffers=take(found, view.local_buffers.layout.names))
        return view

    def _plain_job(self, num_examples: int, lr: float) -> Job:
        """A client's training as it is configured, before any policy shapes it."""
        trainer = self.spec.trainer
        return Job(
            params=self.origin,
            buffers=self.origin_buffers,
            mask=None,
            local=self.local,
            local_buffers=self.local_buffers,
            num_steps=trainer.num_steps(num_examples),
            batch_size=trainer.batch_size,
            lr=lr,
            optim=trainer.optim,
        )

    def _train(self, message: Message, samples: Samples, record: Record, ctx: Context) -> tuple[Fit, Job, list[Any]]:
        assert ctx.job is not None
        job = ctx.job
        received, memories = message, list(record.memories)
        for at in reversed(range(len(self.spec.policies))):
            name, policy = self.spec.policies[at]
            message, job, memories[at] = self._hook(name, "begin", ctx, policy.begin, message, job, memories[at], ctx)
        return self.engine.fit(job, received, samples, ctx.key), job, memories

    def _train_more(self, samples: Samples, key: Key, turn: _Turn, job: Job, name: str) -> Fit:
        fit = self.engine.fit(job, Message(), samples, key.fold("job", name))
        turn.work.append(_work(fit.num_seen, job, turn.mask))
        return fit

    def _probe(
        self, samples: Samples, key: Key, turn: _Turn, params: Tree, buffers: Tree, mask: Mask | None, **options: Any
    ) -> Any:
        view = View(params=params, buffers=buffers, mask=mask, local=turn.local, local_buffers=turn.local_buffers)
        return self.engine.probe(view, samples, key, **options)

    def _validate(self, client: ClientInfo, turn: _Turn, view: View) -> Mapping[str, float]:
        held = self.population.held(client.id)
        if held is None:
            raise ConfigError(
                f"client {client.id} has nothing to validate on; set validation above 0, or give it more samples"
            )
        return self._means(held, _with_local(view, turn))

    def _score(self, samples: Samples, turn: _Turn, view: View) -> Mapping[str, float]:
        return self._means(samples, _with_local(view, turn))

    def _means(self, samples: Samples, view: View) -> dict[str, float]:
        scores = self.engine.evaluate(view, samples, self.spec.evaluation.batch_size)
        return {name: float(values.mean(dtype=torch.float64)) for name, values in scores.items()}

    def public_probe(self, key: Key) -> Probe | None:
        """A look at the server's own data; None where it has none."""
        samples = self.population.public()
        return None if samples is None else partial(self._probe, samples, key, _Turn(self.local, self.local_buffers))

    def _hook(self, name: str, hook: str, ctx: Context, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except FedrayError:
            raise
        except Exception as error:
            at = f"round {ctx.round}, client {ctx.client.id if ctx.client else '-'}, {name}.{hook}"
            raise ClientError(f"{at}: {type(error).__name__}: {error}") from error


class _Moments:
    """See round.Moments."""

    def __init__(self, engine: Engine, samples: Samples, turn: _Turn) -> None:
        self.engine, self.samples, self.turn = engine, samples, turn

    def __call__(self, view: View) -> tuple[Tree, int]:
        found, count = self.engine.statistics(_with_local(view, self.turn), self.samples)
        return put(view.buffers, take(second_moments(found), view.buffers.layout.names)), count

    def normalised(self, moments: Tree) -> Tree:
        return from_second_moments(moments)


def _with_local(view: View, turn: _Turn) -> View:
    """A view of what the server owns, with what the client keeps."""
    if view.local is not None or turn.local is None:
        return view
    return replace(view, local=turn.local, local_buffers=turn.local_buffers)


def _work(num_seen: int, job: Job, servers: Mask | None) -> Work:
    """What a job trained; servers: the mask that goes without saying."""
    if job.submodels:
        counts = [mask.counts() for mask in job.submodels]
        # Each step draws one of them.
        mean = {name: sum(count[name] for count in counts) / len(counts) for name in counts[0]}
        return Work(num_seen=num_seen, kept=mean)
    if same_mask(job.mask, servers):
        return Work(num_seen=num_seen, kept=None)
    layout = job.params.layout
    kept = dict(zip(layout.names, layout.sizes, strict=True)) if job.mask is None else job.mask.counts()
    return Work(num_seen=num_seen, kept=kept)


def _empty(record: Record) -> bool:
    """Whether a record holds nothing that `init_client` would not give again."""
    wire_is_new = record.known is None and not record.residuals and not record.warm and not record.version
    return wire_is_new and all(memory is None for memory in record.memories)


def peak_gpu_bytes(spec: RunSpec, population: Population) -> int:
    """Peak allocation on the GPU of the largest client's first steps, in bytes."""
    worker = Worker(spec, population)
    largest = max(range(population.num_clients), key=lambda client: population.info(client).num_examples)
    samples = population.train(largest)
    job = replace(worker._plain_job(len(samples), spec.trainer.learning_rate.lr), num_steps=2)
    torch.cuda.reset_peak_memory_stats()
    worker.engine.fit(job, Message(), samples, spec.key)
    return int(torch.cuda.max_memory_allocated())


def same_mask(a: Mask | None, b: Mask | None) -> bool:
    """Whether two masks keep the same coordinates; no mask is the same as no mask alone."""
    if a is None or b is None:
        return a is b
    return a is b or a.digest == b.digest


def who(client: int, round: int) -> str:
    """How an error names a client."""
    return f"client {client} in round {round}"


def keepers(spec: RunSpec) -> list[Policy[Any, Any]]:
    """The policies that keep tensors at clients."""
    return [policy for _, policy in spec.policies if type(policy).keeps is not Policy.keeps]


def kept_names(module: nn.Module, spec: RunSpec, *, recomputed: bool = True) -> frozenset[str]:
    """Parameters and buffers that never leave clients; recomputed: whether with those that they can be asked for.

    Raises ConfigError where nothing is left to share.
    """
    params, buffers = layouts(module)
    by_kind = kinds(module)
    found: frozenset[str] = frozenset()
    for policy in keepers(spec):
        if policy.recomputes_statistics and not recomputed:
            continue
        found |= policy.keeps(by_kind, buffers)
    if found >= set(params.names):
        raise ConfigError(
            "personal keeps every parameter at the clients; leave at least one to share, or train without rounds"
        )
    return found


def has_global_model(module: nn.Module, spec: RunSpec) -> bool:
    """Whether the server has a model that runs without what clients keep; statistics can be asked for."""
    return not kept_names(module, spec, recomputed=False)


def cuts_units(spec: RunSpec) -> bool:
    """Whether a policy cuts whole units, so that the model's structure is looked for."""
    return any(policy.cuts in ("structures", "both") for _, policy in spec.policies)


def structure_of(module: nn.Module, sample: torch.Tensor, scope: Scope) -> Structure:
    """The units that may be cut whole: those of layers whose weights a scope leaves prunable. sample: (1, *shape)."""
    outside = set(prunable_names(module, Scope())) - set(prunable_names(module, scope))
    why = "its weights are outside of scope.first_layer and scope.last_layer"
    return find_structure(module, sample).without(dict.fromkeys(outside, why))


def recomputes(spec: RunSpec) -> bool:
    """Whether statistics of batch normalisation are recomputed for each evaluation."""
    return any(policy.recomputes_statistics for _, policy in spec.policies)


def codec_of(module: nn.Module, spec: RunSpec) -> Codec:
    """The wire of a run: the parts of all its policies, inner to outer. Raises ConfigError where it cannot work."""
    params, buffers = layouts(module)
    kept = kept_names(module, spec)
    units = cuts_units(spec)
    if units and kept & set(params.names):
        names = ", ".join(name for name, policy in spec.policies if policy in keepers(spec))
        raise ConfigError(
            f"pruner cuts whole units, and {names} keeps {sorted(kept & set(params.names))[0]} at the clients, so a "
            "unit would be cut in half; take a pruner that cuts weights, or personal=none"
        )
    if kept:
        params = params.select(name for name in params.names if name not in kept)
        buffers = buffers.select(name for name in buffers.names if name not in kept)
    parts: dict[str, Any] = {}
    for _, policy in spec.policies:
        parts.update(policy.parts(params, buffers))
    cuts = any(policy.cuts in ("weights", "both") for _, policy in spec.policies)
    # With a unit go its bias and its norm.
    prunable = (
        params.names if units else tuple(name for name in prunable_names(module, spec.task.scope) if name not in kept)
    )
    wire = Codec(parts, params, prunable, spec.wire, unstructured=cuts)
    if wire.followed or wire.feeds_back("down"):
        if recomputes(spec):
            raise ConfigError(
                "batch_norm is 'static'; its statistics are asked of clients in an exchange of its own, and wire.down "
                "follows what each client was sent before: leave out delta and feedback on the way down"
            )
        for name, policy in spec.policies:
            if policy.sends_each:
                raise ConfigError(
                    f"wire.down.feedback is True; {name} sends each client a message of its own, and what was lost is "
                    "kept once for all of them: set wire.down.feedback=false, and leave out delta"
                )
    return wire
