"""The checks, one function each: the docstring states the law, the answer is a sentence about how it was kept.

Each takes a `Subject` and raises `Failed` or `Skipped` with a sentence.
"""

from __future__ import annotations

import itertools
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedray.errors import ConfigError, FedrayError, RunError
from fedray.keys import Key
from fedray.prune.allocate import FLOAT_ERROR
from fedray.prune.structure import Kept, Structure
from fedray.pruners import NoPruning
from fedray.round import Message, Optim, Server
from fedray.sim.checkpoint import State, checkpoints, load, save
from fedray.strategies import FedAvg, FedAvgM
from fedray.sums import Sums
from fedray.testing.compare import differs, distance, fingerprint, kept, nonzero_outside
from fedray.testing.federation import Packed, Ran, accept, run
from fedray.testing.settings import Outcome, read_settings
from fedray.testing.short import ROUNDS, changed_in
from fedray.testing.subject import SIZES, Failed, Skipped, Subject, by_client, clients, refused
from fedray.testing.wrap import Impure, identity, setting_names, twice, wrap, written_to
from fedray.tree import Mask, Tree, add
from fedray.wire import Codec

Check = Callable[[Subject], str]


def runs(subject: Subject) -> str:
    """A short run with FedAvg is accepted and comes to its end, and every weight and statistic of the server is
    finite."""
    try:
        ran = subject.ran
    except ConfigError as error:
        refused(error)
    except FedrayError as error:
        raise Failed(f"the run does not come to its end: {error}") from error
    for round, server in enumerate(ran.servers):
        for name, tensor in itertools.chain(server.params.items(), server.buffers.items()):
            if not bool(torch.isfinite(tensor).all()):
                raise Failed(f"round {round}: {name} at the server is not finite")
    return f"{ROUNDS} rounds of {len(ran.heard) // ROUNDS} clients"


def cuts_what_it_says(subject: Subject) -> str:
    """Masks are of the kind that `cuts` names: none at all, single weights of prunable tensors, or whole units."""
    ran, like, cuts = subject.ran, subject.like, subject.policy.cuts
    found = [(f"round {round}, the server", server.mask) for round, server in enumerate(ran.servers)]
    # Of whole units it is the mask that a client trains under: it may vouch for less, as for its own labels alone.
    by_units = cuts in ("structures", "both")
    for upload in ran.heard:
        where = f"round {upload.round}, client {upload.client}"
        found.append((where, upload.job.mask if by_units else upload.wanted.mask))
    cut = [(where, mask) for where, mask in found if mask is not None and not bool(mask.flat.all())]
    if cuts == "none":
        if cut:
            where, mask = cut[0]
            raise Failed(f"{where}: {_what(~mask.flat, like)} is cut, and cuts is 'none': name its kind in cuts")
        return "no mask anywhere, as cuts says"
    if not cut:
        raise Failed(f"cuts is {cuts!r}, and in {ROUNDS} rounds nothing was cut, at the server or at a client")
    structure = ran.driver.worker.structure
    for where, mask in cut:
        if cuts == "weights":
            for name in set(like.layout.names) - set(subject.prunable):
                if not bool(mask[name].all()):
                    raise Failed(f"{where}: {name} is cut, which is not prunable; scope decides what is")
        elif structure is not None:
            whole = structure.mask(structure.kept(mask)).flat
            extra = mask.flat & ~whole if cuts == "both" else mask.flat ^ whole
            if bool(extra.any()):
                raise Failed(f"{where}: {_what(extra, like)} does not go with its unit, and cuts is {cuts!r}")
    return f"{len(cut)} masks, all of {cuts}" if cuts != "both" else f"{len(cut)} masks of units and weights"


def budget_met(subject: Subject) -> str:
    """After each round the server keeps in all what `sparsity_after` promises, within half a weight for each prunable
    tensor, which is what rounding costs (one where counts are rounded down, two where an er or erk allocation is; and
    one unit for each group where whole units are cut). How it is divided among tensors is the method's."""
    policy, ran, like = subject.policy, subject.ran, subject.like
    promised = {round: policy.sparsity_after(round) for round in range(ROUNDS + 1)}
    if all(sparsity is None for sparsity in promised.values()):
        raise Skipped("sparsity_after promises nothing: the size is an outcome, or clients have masks of their own")
    sizes = {name: like[name].numel() for name in subject.prunable}
    prunable = sum(sizes.values())
    whole = getattr(policy, "budget", "prunable_weights") == "all_parameters"
    everything = like.layout.size if whole else prunable
    each = 0.5
    if getattr(policy, "rounding", "nearest") == "floor":
        # What tensors that are kept whole leave to the others is rounded down once more.
        each = 2.0 if getattr(policy, "allocation", "uniform") in ("er", "erk") else 1.0
    slack = each * len(sizes)
    structure = ran.driver.worker.structure
    if policy.cuts == "structures" and structure is not None:
        # The largest unit of each group decides how far a whole number of units can be from a fraction.
        slack += sum(
            int((~structure.mask({group.name: torch.arange(group.size) > 0}).flat).sum()) for group in structure.groups
        )
    for round, sparsity in promised.items():
        if sparsity is None:
            continue
        mask = ran.servers[round].mask
        gone = 0 if mask is None else int((~mask.flat).sum() if whole else sum(int((~mask[n]).sum()) for n in sizes))
        wanted = sparsity * everything
        if abs(gone - wanted) > slack + FLOAT_ERROR:
            counts = {} if mask is None else mask.counts(subject.prunable)
            by_name = ", ".join(f"{name} keeps {counts.get(name, size)} of {size}" for name, size in sizes.items())
            raise Failed(
                f"round {round}: {gone} of {everything} are removed, and sparsity_after promises {sparsity:.4g}, which "
                f"is {wanted:.1f} within {slack:g}; {by_name}"
            )
    final = promised[ROUNDS]
    return "as promised after each round" + ("" if final is None else f", {final:.4g} after the last")


def zeros_stay_zero(subject: Subject) -> str:
    """What a mask cuts is zero at the server, in every upload and in what clients train, also with momentum and weight
    decay at the clients and momentum at the server; where masks rest, clients train under the mask that they were
    sent."""
    for what, ran in (("fedavg", subject.ran), ("fedavgm", _with_momentum(subject))):
        for round, server in enumerate(ran.servers):
            _zero_outside(server.params, server.mask, f"round {round}, the server with {what}")
        for round, server in ran.broadcasts.items():
            _zero_outside(server.params, server.mask, f"round {round}, what the server with {what} sends")
        for upload in ran.heard:
            where = f"round {upload.round}, client {upload.client}"
            _zero_outside(upload.fit.params, upload.fit.mask, f"{where}, after its training")
            inside = kept(upload.wanted.mask, subject.like)
            for name, part in upload.wanted.parts.items():
                bad = nonzero_outside(part.value, inside) if name in _of_the_model(subject) else None
                if bad:
                    raise Failed(f"{where}: its part {name!r} has {bad[1]} values outside its mask in {bad[0]}")
            if subject.changes(upload.round) is False:
                beyond = kept(upload.job.mask, subject.like) & ~kept(upload.sent, subject.like)
                if bool(beyond.any()):
                    raise Failed(
                        f"{where}: it trains {_what(beyond, subject.like)} outside the mask that it was sent, in a "
                        "round in which changes_masks says that masks rest"
                    )
    return "at the server, at the clients and in uploads, with momentum and weight decay"


def upload_inside_support(subject: Subject) -> str:
    """Every part of an upload, and of an answer to an exchange, is zero outside its support; the support of a
    difference of the model lies inside the mask that the client says is alive (a pruner's own parts may look beyond
    it); and the server decodes exactly what was meant."""
    like = subject.like
    for upload in subject.ran.heard:
        where = f"round {upload.round}, client {upload.client}"
        _crossed_well(upload.wanted, upload.message, where, like)
        for name in _of_the_model(subject) & set(upload.wanted.parts):
            support = upload.wanted.parts[name].support
            if support is not None and upload.wanted.mask is not None:
                beyond = support.flat & ~upload.wanted.mask.flat
                if bool(beyond.any()):
                    raise Failed(
                        f"{where}: the support of part {name!r} has {_what(beyond, like)} outside the message's mask"
                    )
    for answer in subject.ran.answers:
        where = f"round {answer.round}, client {answer.client}, exchange {answer.exchange!r}"
        _crossed_well(answer.wanted, answer.message, where, like)
    asked = len(subject.ran.answers)
    return f"{len(subject.ran.heard)} uploads" + (f" and {asked} answers" if asked else "")


def masks_move_and_rest(subject: Subject) -> str:
    """No mask moves in a round in which `changes_masks` says False, and in each round in which it says True a mask of
    the server or of a client moves (unless `sparsity_after` promises that still nothing is cut). Where it says None in
    every round and `sparsity_after` promises nothing either, a mask moves in some round: a method whose masks move on
    other data alone says so in `exempt`."""
    says = {round: subject.changes(round) for round in range(1, ROUNDS + 1)}
    if set(says.values()) == {None} and subject.policy.cuts == "none":
        raise Skipped("cuts is 'none', so there is no mask that could move")
    moved = {round: _movements(subject, round) for round in says}
    there = [round for round in says if moved[round]]
    if set(says.values()) == {None}:
        told = "changes_masks says None in every round: when masks move depends on more than the round"
        if there:
            return f"{told}; here they moved in rounds {_list(there)}"
        if all(subject.policy.sparsity_after(round) is None for round in range(ROUNDS + 1)):
            raise Failed(
                f"in {ROUNDS} rounds no mask moved, and neither changes_masks nor sparsity_after promises anything: "
                "let one of them answer, or say in exempt['masks_move_and_rest'] why masks rest here"
            )
        raise Skipped(f"{told}; here none did")
    for round, said in says.items():
        if said is False and moved[round]:
            raise Failed(f"round {round}: changes_masks says that masks rest, and {moved[round][0]}")
    # A schedule may begin with an event that keeps everything.
    due = [round for round, said in says.items() if said and subject.policy.sparsity_after(round) != 0.0]
    still = [round for round in due if not moved[round]]
    if still:
        raise Failed(
            f"rounds {_list(still)} of {_list(due)}: changes_masks says that masks move, and none did; let it answer "
            "None where that depends on more than the round"
        )
    rests = _list([round for round, said in says.items() if said is False])
    if not due:
        return f"static, as changes_masks says: no mask moved in rounds {rests}"
    return f"moved in rounds {_list(due)}" + (f", rested in {rests}" if rests else "")


def regrown_starts_as_declared(subject: Subject) -> str:
    """A coordinate that comes back starts as `regrown` says, at zero or at the value that the server held for it, and
    at zero it starts without momentum: its first step at the server is that round's alone."""
    policy, like = subject.policy, subject.like
    if subject.policy.cuts == "none":
        raise Skipped("cuts is 'none', so nothing comes back")
    settled: list[tuple[int, Server, Server, Sums]] = []

    def note(hook: str, call: Callable[..., Any], given: tuple[Any, ...]) -> Any:
        answer = call(*given)
        if hook == "settle":
            settled.append((given[3].round, given[0], answer[0], given[1]))
        return answer

    spec = subject.spec(wrap(policy, note), FedAvgM(lr=0.5))
    accept(spec)
    ran = run(spec, clients())
    count = 0
    fresh: Tensor | None = None  # what came back in the round before, with no momentum
    for round, before, after, sums in settled:
        sent = ran.broadcasts[round]
        if fresh is not None and bool(fresh.any()) and "delta" in sums:
            moved = add(sent.params, sums.mean("delta", otherwise=0.0), 0.5)
            far = (moved.flat - before.params.flat).abs() > 1e-6 + 1e-4 * moved.flat.abs()
            if bool((far & fresh).any()):
                raise Failed(
                    f"round {round}: {_what(far & fresh, like)}, which came back in round {round - 1}, moves by more "
                    "than this round's mean: an old momentum is back with it"
                )
        back = kept(after.mask, like) & ~kept(sent.mask, like)
        count += int(back.sum())
        start = torch.zeros_like(after.params.flat) if policy.regrown == "zero" else before.params.flat
        wrong = back & (after.params.flat != start)
        if bool(wrong.any()):
            raise Failed(
                f"round {round}: {_what(wrong, like)} comes back with another value than regrown, which is "
                f"{policy.regrown!r}, says"
            )
        fresh = back if policy.regrown == "zero" else None
    for upload in ran.heard:
        ends, started = upload.wanted.mask, upload.job.mask
        delta = upload.wanted.parts.get("delta")
        if delta is None or policy.regrown != "zero":
            continue
        back = kept(ends, like) & ~kept(started, like)
        count += int(back.sum())
        wrong = back & (delta.value.flat != 0)
        if bool(wrong.any()):
            raise Failed(
                f"round {upload.round}, client {upload.client}: {_what(wrong, like)} grows with a value, and regrown "
                "says zero"
            )
    if not count:
        raise Skipped(f"in {ROUNDS} rounds nothing came back")
    return f"{count} coordinates came back at {policy.regrown}"


def sparsity_zero_is_fedavg(subject: Subject) -> str:
    """At `sparsity` 0 every round gives the weights and statistics of FedAvg without a pruner, bit for bit. (A method
    that swaps weights all the same is asked with `until` 0, which freezes its first mask.)"""
    policy: Any = subject.policy
    names = setting_names(policy)
    if "sparsity" not in names:
        raise Skipped("there is no setting called sparsity")
    changes = {"sparsity": 0.0} | ({"until": 0} if "until" in names else {})
    try:
        mine = subject.run(changed_in(policy, **changes), FedAvg())
    except ConfigError as error:
        raise Skipped(f"sparsity 0 is refused: {error}") from error
    plain = subject.run(NoPruning(), FedAvg())
    for round, (a, b) in enumerate(zip(mine.servers, plain.servers, strict=True)):
        for what in ("params", "buffers"):
            one, two = getattr(a, what), getattr(b, what)
            for name, tensor in one.items():
                apart = int((tensor.flatten() != two[name].flatten()).sum())
                if apart:
                    raise Failed(f"round {round}: {apart} of {tensor.numel()} in {name} are not those of FedAvg")
    return "the bits of FedAvg in every round" + (", with until 0" if "until" in names else "")


def identical_clients_are_one(subject: Subject) -> str:
    """Clients with the same data give together what one of them gives alone, bit for bit. (Every example is the same,
    so no order of them matters.)"""
    many = len(SIZES)
    one, all_ = _alike(subject, 1), _alike(subject, many)
    for round in range(1, ROUNDS + 1):
        masks = {kept(u.wanted.mask, subject.like).numpy().tobytes() for u in all_.heard if u.round == round}
        if len(masks) > 1 and subject.policy.sends_each:
            raise Skipped("clients have masks of their own by design (sends_each), also where their data are the same")
    for round, (a, b) in enumerate(zip(all_.servers, one.servers, strict=True)):
        if found := differs(a.mask, b.mask, subject.like):
            raise Failed(f"round {round}: {many} identical clients keep {found[1]} others of {found[0]} than one alone")
        for what in ("params", "buffers"):
            ours, alone = getattr(a, what), getattr(b, what)
            for name, tensor in ours.items():
                if not torch.equal(tensor, alone[name]):
                    far = float((tensor - alone[name]).abs().max())
                    raise Failed(
                        f"round {round}: {name} of {many} identical clients is up to {far:.2g} from that of one"
                    )
    return f"{many} clients with the same data are one, in every round"


def hooks_are_pure(subject: Subject) -> str:
    """No hook writes to its inputs or to the policy itself, and each gives the same answer when it is asked twice."""
    called: list[str] = []
    at: dict[str, str] = {}
    ask = twice(called)

    def around(hook: str, call: Callable[..., Any], given: tuple[Any, ...]) -> Any:
        ctx = next((value for value in given if hasattr(value, "cohort")), None)
        client = "" if ctx is None or ctx.client is None else f", client {ctx.client.id}"
        at["where"] = "before the first round" if ctx is None or ctx.round == 0 else f"round {ctx.round}{client}"

        def unmoved(*arguments: Any) -> Any:
            before = written_to(policy)
            answer = call(*arguments)
            _same_policy(policy, before, hook)
            return answer

        return ask(hook, unmoved, given)

    spec = subject.spec(wrap(subject.policy, around), FedAvg())
    _, policy = spec.policies[0]
    made = written_to(policy)
    try:
        accept(spec)
        ran = run(spec, clients())
        _same_policy(policy, made, "something beside the hooks")
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, Impure):
            cause = cause.__cause__
        if cause is None:
            raise
        raise Failed(f"{at['where']}: {cause}") from error
    if ran.digests != subject.ran.digests:
        round = 1 + [a == b for a, b in zip(ran.digests, subject.ran.digests, strict=True)].index(False)
        raise Failed(f"round {round}: asked twice, the hooks together give another model: something is remembered")
    return f"asked twice: {', '.join(dict.fromkeys(called))}" if called else "there are no hooks"


def memories_can_be_stored(subject: Subject) -> str:
    """The policy and everything that it remembers can be pickled and written into a checkpoint, and come back the
    same; a run whose values travel by pickle, with a policy of their own for each host of clients, gives the same
    bits."""
    try:
        back = pickle.loads(pickle.dumps(subject.policy))
    except Exception as error:
        raise Failed(f"the policy itself cannot be pickled: {type(error).__name__}: {error}") from error
    if identity(back) != identity(subject.policy):
        raise Failed(f"pickled and back, the policy is {back!r}")
    memories = [("the server", subject.ran.driver.memories[0])]
    records = _records(subject.ran)
    memories += [(f"client {client}", record.memories[0]) for client, record in sorted(records.items())]
    for who, memory in memories:
        try:
            again = pickle.loads(pickle.dumps(memory))
        except Exception as error:
            raise Failed(f"what {who} remembers cannot be pickled: {type(error).__name__}: {error}") from error
        if fingerprint(again) != fingerprint(memory):
            raise Failed(f"what {who} remembers is something else after pickle")
    try:
        _through_a_checkpoint(_state(subject.ran, ROUNDS))
    except RunError as error:
        raise Failed(f"a checkpoint cannot be written: {error}") from error
    spec = subject.spec()
    hosts = Packed(spec, clients(), chunk=2, workers=2, through=lambda value: pickle.loads(pickle.dumps(value)))
    _same_run(run(spec, clients(), hosts), subject.ran, "with policies and values that travel by pickle")
    remembered = [who for who, memory in memories if memory is not None]
    return "policy and " + (f"memories of {_list(remembered, 3)}" if remembered else "no memories")


def order_changes_nothing(subject: Subject) -> str:
    """The same bits in whatever order clients answer, and however they are packed into actors: one, two, or all."""
    packings: tuple[tuple[str, dict[str, Any]], ...] = (
        ("one client an actor", {"chunk": 1, "workers": 3, "shuffle": Key.of(1)}),
        ("two clients an actor", {"chunk": 2, "workers": 2, "shuffle": Key.of(2)}),
        ("all clients in one actor, shuffled", {"chunk": 99, "shuffle": Key.of(3)}),
    )
    for what, packing in packings:
        spec = subject.spec()
        packed = run(spec, clients(), Packed(spec, clients(), **packing))
        _same_run(packed, subject.ran, f"with {what}")
    return "one, two and all clients an actor, in three orders"


def shrunk_is_masked(subject: Subject) -> str:
    """Where whole units are cut, training the physically smaller model gives the fit of the masked one, to 1e-5."""
    if subject.policy.cuts not in ("structures", "both"):
        raise Skipped(f"cuts is {subject.policy.cuts!r}: no whole units go")
    ran, worst, count = subject.ran, 0.0, 0
    worker = ran.driver.worker
    assert worker.structure is not None
    for upload in ran.heard[:: max(1, len(ran.heard) // 6)]:
        left = worker.structure.kept(upload.job.mask)
        if all(bool(units.all()) for units in left.values()):
            continue
        samples = clients().train(upload.client)
        # A few steps: afterwards rounding has grown, and tells nothing about the first.
        job = replace(upload.job, num_steps=min(2, upload.job.num_steps), submodels=(), shrink=False)
        fits = [
            worker.engine.fit(one, upload.fit.received, samples, Key.of(1)) for one in (job, replace(job, shrink=True))
        ]
        for what in ("params", "buffers"):
            masked, shrunk = (getattr(fit, what) for fit in fits)
            # Statistics of a channel that is cut go on falling in the masked model, and nothing reads them.
            here = kept(upload.job.mask, masked) if what == "params" else _alive(worker.structure, left, masked)
            if bool(here.any()):
                worst = max(worst, far := distance(shrunk.flat[here], masked.flat[here]))
                if not far < 1e-5:
                    raise Failed(
                        f"round {upload.round}, client {upload.client}: {what} of the smaller model are {far:.2g} away "
                        "from those of the masked one"
                    )
        count += 1
    if not count:
        raise Skipped(f"in {ROUNDS} rounds no client trained with a unit cut")
    return f"{count} fits, at most {worst:.1g} apart"


def ledger_is_consistent(subject: Subject) -> str:
    """Every byte in the ledger crossed: by direction and round the rows are the lengths of the payloads that were
    decoded, entries add up to rows, and rows to totals."""
    with _decoded() as crossed:
        spec = subject.spec()
        ran = run(spec, clients())
    for direction in ("down", "up"):
        rows = [row[f"wire/{direction}_bytes"] for row in ran.rows]
        if sum(rows) != sum(crossed[direction]):
            raise Failed(
                f"{direction}: the rows have {sum(rows)} bytes in all, and payloads of {sum(crossed[direction])} bytes "
                "were decoded"
            )
        totals = [row[f"wire/total_{direction}_bytes"] for row in ran.rows]
        if totals != list(itertools.accumulate(rows)):
            raise Failed(f"{direction}: wire/total_{direction}_bytes is not the sum of the rounds so far")
        for record, expected in zip(ran.records, rows, strict=True):
            entries = [entry for entry in record.transfers if entry["direction"] == direction]
            parts = ("value_bytes", "mask_bytes", "header_bytes")
            found = sum(entry[part] for entry in entries for part in parts)
            if found != expected:
                raise Failed(
                    f"round {record.row['round']}, {direction}: entries have {found} bytes, the row {expected}"
                )
            params = sum(entry["params"] for entry in entries)
            if params != record.row[f"wire/{direction}_params"]:
                raise Failed(f"round {record.row['round']}, {direction}: entries have {params} parameters")
    return f"{sum(map(len, crossed.values()))} payloads, {sum(map(sum, crossed.values()))} bytes"


def resume_is_exact(subject: Subject) -> str:
    """A run of half the rounds, written to disk and gone on with by a policy that is made anew, gives the bits of the
    whole run."""
    half = ROUNDS // 2
    first = run(subject.spec(rounds=half), clients())
    try:
        state = _through_a_checkpoint(_state(first, half))
    except RunError as error:
        raise Skipped(f"there is no checkpoint to go on from: see memories_can_be_stored ({error})") from error
    second = run(subject.spec(), clients(), state=state)
    for a, b in zip([*first.rows, *second.rows], subject.ran.rows, strict=True):
        for name in ("digest", "wire/up_bytes", "wire/down_bytes", "wire/total_bytes"):
            if a[name] != b[name]:
                raise Failed(f"round {b['round']}: {name} is {a[name]} after a resume, and {b[name]} without")
    return f"{half} rounds and {ROUNDS - half} more are {ROUNDS}"


def settings_are_read(subject: Subject) -> str:
    """Every setting of which another value can be derived (a number, a choice, true or false) decides something: two
    runs that differ in it differ in weights, masks, bytes or scores, here or beside another choice."""

    def outcome(policy: Any) -> Outcome:
        ran = subject.run(policy, FedAvg())
        return ran.digests, ran.bytes, [record.accuracies for record in ran.records]

    found = read_settings(
        subject.policy, outcome, exempt=lambda name: subject.reason_without(f"settings_are_read.{name}")
    )
    if found.idle:
        raise Failed(
            f"{_list(found.idle, 9)}: no other value changes anything in {ROUNDS} rounds; read it, remove it, or say "
            f"in exempt['settings_are_read.{found.idle[0]}'] why it is idle here"
        )
    if not (found.read or found.beside):
        raise Skipped("there is no setting of which another value could be derived")
    sentence = f"read: {', '.join(found.read)}" if found.read else "none is read by itself"
    sentence += "".join(f"; {name} beside {company}" for name, company in found.beside.items())
    return sentence + "".join(f"; {name} not: {why}" for name, why in found.excused.items())


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        runs,
        cuts_what_it_says,
        budget_met,
        zeros_stay_zero,
        upload_inside_support,
        masks_move_and_rest,
        regrown_starts_as_declared,
        sparsity_zero_is_fedavg,
        identical_clients_are_one,
        hooks_are_pure,
        memories_can_be_stored,
        order_changes_nothing,
        shrunk_is_masked,
        ledger_is_consistent,
        resume_is_exact,
        settings_are_read,
    )
}


# -- what they share -------------------------------------------------------------------------------------------------


def _with_momentum(subject: Subject) -> Ran:
    return subject.run(subject.policy, FedAvgM(lr=0.5))


def _of_the_model(subject: Subject) -> set[str]:
    """Names of the parts with the layout of the parameters that the strategy sends; a pruner's own are evidence."""
    worker = subject.ran.driver.worker
    own = subject.policy.parts(worker.origin.layout, worker.origin_buffers.layout)
    specs = worker.codec.specs
    return {name for name, spec in specs.items() if name not in own and spec.layout == worker.origin.layout}


def _crossed_well(wanted: Message, got: Message, where: str, like: Tree) -> None:
    """What a client sends is zero outside each part's support, and is decoded to what it was."""
    for name, part in wanted.parts.items():
        if bad := nonzero_outside(part.value, kept(part.support, part.value)):
            raise Failed(f"{where}: part {name!r} has {bad[1]} values outside its support in {bad[0]}")
        if not torch.equal(part.value.flat, got[name].flat):
            raise Failed(f"{where}: part {name!r} is decoded to other values")
    if differs(wanted.mask, got.mask, like):
        raise Failed(f"{where}: its mask is decoded to another one")


def _zero_outside(params: Tree, mask: Mask | None, where: str) -> None:
    bad = nonzero_outside(params, kept(mask, params))
    if bad:
        raise Failed(f"{where}: {bad[1]} weights of {bad[0]} are not zero outside the mask")


def _what(where: Tensor, like: Tree) -> str:
    """`7 of conv2.weight`, of the first tensor that has any."""
    for name, span in like.layout.spans.items():
        count = int(where[span].sum())
        if count:
            return f"{count} of {name}"
    return "nothing"


def _list(values: Any, most: int = ROUNDS) -> str:
    words = [str(value) for value in values]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def _movements(subject: Subject, round: int) -> list[str]:
    """Every mask that moved in a round, in words.

    The server's moves between two rounds or in a question before the training. A client's moves where it sends
    another mask than the one that it was sent and than the one that it had, or is sent one that is neither the
    server's nor its own. With a mask of its own it may vouch for less than it is sent: see `cuts_what_it_says`.
    """
    ran, like = subject.ran, subject.like
    found = []
    before, sent, after = (
        server.mask for server in (ran.servers[round - 1], ran.broadcasts[round], ran.servers[round])
    )
    for a, b in ((before, sent), (sent, after)):
        if at := differs(a, b, like):
            found.append(f"the server's mask of {at[0]} moved by {at[1]}")
    for client, uploads in sorted(by_client(ran.heard).items()):
        had: Mask | None = None
        was_sent: Mask | None = None
        known = False
        for upload in uploads:
            ends = upload.wanted.mask
            if upload.round == round:
                at = differs(ends, upload.sent, like)
                less = not bool((kept(ends, like) & ~kept(upload.sent, like)).any())
                vouches = subject.policy.sends_each and less and not known
                if at and not vouches and not (known and not differs(ends, had, like)):
                    found.append(f"client {client}'s mask of {at[0]} is not the one that it was sent, by {at[1]}")
                at = differs(upload.sent, had, like) if known else None
                if at and differs(upload.sent, sent, like) and differs(upload.sent, was_sent, like):
                    found.append(f"client {client}'s mask of {at[0]} moved by {at[1]}")
            had, was_sent, known = ends, upload.sent, True
    return found


def _alive(structure: Structure, left: Kept, buffers: Tree) -> Tensor:
    """bool (n,): the positions of buffers that belong to no unit that is cut."""
    flat = torch.ones(buffers.layout.size, dtype=torch.bool)
    for group in structure.groups:
        for member in group.members:
            if member.tensor in buffers.layout.spans and member.dim == 0:
                lines = flat[buffers.layout.spans[member.tensor]].view(buffers.layout.shape(member.tensor))
                lines[torch.from_numpy(member.positions)[~left[group.name]].flatten()] = False
    return flat


def _alike(subject: Subject, count: int) -> Ran:
    """A run of so many of the clients that have the same data."""
    spec = subject.spec(num_clients=count, cohort=count, optim=Optim())
    try:
        accept(spec)
    except ConfigError as error:
        raise Skipped(f"a run of {count} clients is refused: {error}") from error
    return run(spec, clients((6,) * len(SIZES), alike=True))


def _same_policy(policy: Any, before: Mapping[str, Any], who: str) -> None:
    """Raises Impure where the policy holds something else than before."""
    after = written_to(policy)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if changed:
        raise Impure(f"{who} writes {_list(changed)} to the policy itself; what a method remembers is its memory")


def _records(ran: Ran) -> dict[int, Any]:
    runtime = ran.driver.runtime
    return runtime.load(runtime.snapshot())


def _state(ran: Ran, round: int) -> State:
    driver = ran.driver
    return State(
        run_id=driver.spec.run_id,
        round=round,
        server=driver.server,
        memories=driver.memories,
        records=_records(ran),
        totals=dict(driver.ledger.total),
        train_flops=driver.train_flops,
        elapsed_s=0.0,
        downlink=driver.downlink,
        progress=driver.progress.plain(),
    )


def _through_a_checkpoint(state: State) -> State:
    with tempfile.TemporaryDirectory(prefix="fedray-check-") as folder:
        save(Path(folder), state)
        return load(checkpoints(Path(folder))[-1])


def _same_run(mine: Ran, other: Ran, how: str) -> None:
    for a, b in zip(mine.rows, other.rows, strict=True):
        for name in ("digest", "wire/up_bytes", "wire/down_bytes"):
            if a[name] != b[name]:
                raise Failed(f"round {b['round']}: {name} is {a[name]} {how}, and {b[name]} in one call")
    ours, theirs = _records(mine), _records(other)
    for client in sorted({*ours, *theirs}):
        if fingerprint(ours.get(client)) != fingerprint(theirs.get(client)):
            raise Failed(f"client {client} remembers something else {how} than in one call")


@contextmanager
def _decoded() -> Iterator[dict[str, list[int]]]:
    """Lengths of all payloads that are decoded meanwhile, by direction: an independent count of what crossed."""
    crossed: dict[str, list[int]] = {"down": [], "up": []}
    original = Codec.decode

    def decode(self: Codec, payload: bytes, *, direction: Any, **known: Any) -> Message:
        crossed[direction].append(len(payload))
        return original(self, payload, direction=direction, **known)

    Codec.decode = decode  # type: ignore[method-assign]
    try:
        yield crossed
    finally:
        Codec.decode = original  # type: ignore[method-assign]
