"""Questions to clients before a round's training: what is asked, answered, paid for, and forgotten."""

import itertools
from dataclasses import dataclass, replace
from typing import final

import pytest
import torch
from laws_support import SIZES, Packed, fingerprint, population, run, spec

from fedray.errors import ConfigError, RunError
from fedray.keys import Key
from fedray.prune.select import keep_top
from fedray.round import Exchange, Message, Part, PartSpec, Policy
from fedray.strategies import FedAvg
from fedray.tree import Mask, Tree

HALF = "half of each"


@final
@dataclass(frozen=True, kw_only=True)
class AsksFirst(Policy[None, None]):
    """Cuts half of each tensor in round `at`, by the mean of what clients say of the weights that they are sent.

    heeds: whether it cuts at all, or asks for nothing."""

    cuts = "weights"

    at: int = 2
    clients: object = "cohort"
    trains: bool = False
    heeds: bool = True

    def exchange_parts(self, params, buffers):
        return {
            HALF: {
                "weights": PartSpec(layout=params, direction="down", absolute=True),
                "score": PartSpec(layout=params, direction="up"),
            }
        }

    def exchanges(self, memory, ctx):
        return (Exchange(name=HALF, clients=self.clients),) if ctx.round == self.at else ()

    def ask(self, exchange, server, memory, ctx):
        return Message(parts={"weights": Part(value=server.params)})

    def answer(self, exchange, message, memory, ctx):
        assert exchange.name == HALF
        if self.trains:
            weights = ctx.train(replace(ctx.job, params=message["weights"]), "a look ahead").params
        else:
            weights = message["weights"]
        score = Tree(weights.layout, weights.flat.abs() * (1 + ctx.client.id))
        return Message(parts={"score": Part(value=score, weight=float(ctx.client.num_examples))})

    def learn(self, exchange, server, sums, memory, ctx):
        if not self.heeds:
            return server, memory
        score = sums.mean("score", otherwise=0.0)
        counts = {name: score[name].numel() // 2 for name in ctx.prunable}
        return server.cut(keep_top(score, counts, names=ctx.prunable)), memory


def test_what_is_learned_is_in_force_for_the_training_of_that_very_round():
    ran = run(spec(AsksFirst(), FedAvg(), rounds=3), population())
    found = run(spec(AsksFirst(), FedAvg(), rounds=1), population()).servers[-1].params
    prunable = ran.driver.worker.prunable
    half = {name: found[name].numel() // 2 for name in prunable}
    # Everybody says the same but for a factor, which changes no order.
    expected = keep_top(Tree(found.layout, found.flat.abs()), half, names=prunable)
    assert ran.servers[-1].mask == expected
    assert "prune/churn" not in ran.rows[0]
    assert [row["prune/churn"] for row in ran.rows[1:]] == [pytest.approx(0.5, abs=0.01), 0.0]
    for message, sent in ran.uploads[1]:
        assert message.mask == sent == expected


def volume(entries, way):
    parts = ("value_bytes", "mask_bytes", "header_bytes")
    return sum(entry[part] for entry in entries for part in parts if entry["direction"] == way)


@pytest.mark.parametrize("clients", ["cohort", "all", (1, 3)])
def test_who_is_asked_pays_and_the_ledger_says_for_what(clients):
    ran = run(spec(AsksFirst(clients=clients, heeds=False), FedAvg(), rounds=3), population())
    entries = [entry for record in ran.records for entry in record.transfers if entry.get("exchange") == HALF]
    trained = {entry["client"] for entry in ran.records[1].transfers if "exchange" not in entry}
    everybody = set(range(len(SIZES)))
    assert trained < everybody
    assert trained != {1, 3}
    assert {entry["round"] for entry in entries} == {2}
    assert {entry["client"] for entry in entries} == {"cohort": trained, "all": everybody}.get(clients, {1, 3})
    size = ran.servers[0].params.layout.size
    for client, direction in itertools.product({entry["client"] for entry in entries}, ("down", "up")):
        (part,) = [
            e for e in entries if e["client"] == client and e["direction"] == direction and e["part"] != "message"
        ]
        assert part["value_bytes"] == 4 * size
    # Nothing is made of the answers, so what else crosses is what crosses without a question.
    plain = run(spec(AsksFirst(at=99), FedAvg(), rounds=3), population())
    for way, (row, other) in itertools.product(("up", "down"), zip(ran.rows, plain.rows, strict=True)):
        asked = volume(entries, way) if row["round"] == 2 else 0
        assert row[f"wire/{way}_bytes"] - asked == other[f"wire/{way}_bytes"] > 0
        assert (asked > 0) == (row["round"] == 2)
    transfers = [entry for record in ran.records for entry in record.transfers]
    assert ran.rows[-1]["wire/total_bytes"] == volume(transfers, "up") + volume(transfers, "down")


def test_an_exchange_has_the_same_bits_in_any_packing_and_leaves_no_record():
    given = spec(AsksFirst(clients="all", trains=True), FedAvg(), rounds=3)
    whole = run(given, population())
    for packing in ({"chunk": 1, "workers": 3, "shuffle": Key.of(1)}, {"chunk": 2, "workers": 2}):
        packed = run(given, population(), Packed(given, population(), **packing))
        assert packed.digests == whole.digests
        assert packed.bytes == whole.bytes
    # In these rounds not everybody who was asked has trained.
    short = run(spec(AsksFirst(at=1, clients="all", trains=True), FedAvg(), rounds=1), population())
    asked, trained = (
        {e["client"] for record in short.records for e in record.transfers if ("exchange" in e) is exchanged}
        for exchanged in (True, False)
    )
    assert set(short.driver.runtime.records) == trained < asked
    assert fingerprint(whole.servers[-1].params) != fingerprint(whole.servers[0].params)


def test_training_for_an_answer_is_work_that_counts():
    plain, looked = (
        run(spec(AsksFirst(clients="all", trains=trains), FedAvg(), rounds=2), population()) for trains in (False, True)
    )
    assert plain.rows[0]["model/train_flops"] == looked.rows[0]["model/train_flops"]
    flops = plain.driver._dense_flops()
    # One epoch of every client on the dense model; the rest of the round is the same but for which half it keeps.
    extra = looked.rows[1]["model/train_flops"] - plain.rows[1]["model/train_flops"]
    assert extra == pytest.approx(3 * sum(flops.values()) * sum(SIZES), rel=1e-6)


def test_an_answer_that_the_sum_refuses_names_client_and_exchange():
    @final
    @dataclass(frozen=True, kw_only=True)
    class Broken(Policy[None, None]):
        def exchange_parts(self, params, buffers):
            return {"broken": {"score": PartSpec(layout=params, direction="up")}}

        def exchanges(self, memory, ctx):
            return (Exchange(name="broken"),) if ctx.round == 1 else ()

        def answer(self, exchange, message, memory, ctx):
            return Message(parts={"score": Part(value=Tree(ctx.origin.layout, ctx.origin.flat * float("nan")))})

    with pytest.raises(Exception, match=r"client \d+ in round 1, exchange 'broken'.*nan.*'score'"):
        run(spec(Broken(), FedAvg(), rounds=1), population())


def test_the_support_of_a_part_may_be_anything_and_a_complement_is_one_byte():
    from fedray.tree import Layout
    from fedray.wire import Codec, Wire

    layout = Layout(("a.weight", "a.bias"), ((8, 50), (8,)))
    spec_ = {"score": PartSpec(layout=layout, direction="up")}
    codec = Codec(spec_, layout, ("a.weight",), Wire())
    mask = Mask.of(layout, {"a.weight": torch.arange(400) % 3 == 0})
    value = Tree(layout, torch.arange(408).float() + 1)
    for support in (~mask, Mask(layout, torch.arange(408) > 395), Mask(layout, torch.zeros(408, dtype=torch.bool))):
        from fedray.tree import restrict

        sent = Message(parts={"score": Part(value=restrict(value, support), support=support)}, mask=mask)
        packet = codec.encode(sent, direction="up", known=mask, key=Key.of(0))
        got = codec.decode(packet.payload, direction="up", known=mask)
        assert got.parts["score"].support == support
        assert torch.equal(got["score"].flat, restrict(value, support).flat)
        if support == ~mask:
            assert packet.sizes[1].mask_bytes == 0
    with pytest.raises(ValueError, match="not prunable"):
        codec.encode(Message(mask=~mask), direction="up", known=None, key=Key.of(0))
    with pytest.raises(ConfigError):
        Codec(spec_, layout, ("a.weight",), Wire(entropy="nonsense"))


def test_a_mistake_in_an_exchange_names_the_policy_and_the_hook():
    @final
    @dataclass(frozen=True, kw_only=True)
    class Wrong(Policy[None, None]):
        at: str = ""

        def init_server(self, server, ctx):
            return server, {"init_server": {}}.get(self.at, {0: None})[0]

        def exchanges(self, memory, ctx):
            return [(Exchange(name="look"),)][self.at == "exchanges"]

        def exchange_parts(self, params, buffers):
            return {} if self.at == "undeclared" else params[self.at]

    for at, sentence in {
        "init_server": r"^before the first round, wrong\.init_server: KeyError: 0$",
        "exchanges": r"^round 1, wrong\.exchanges: IndexError: list index out of range$",
        "exchange_parts": r"wrong\.exchange_parts: TypeError: 'Layout' object is not subscriptable$",
        "undeclared": r"wrong\.exchanges asks 'look', and exchange_parts has nothing: it names the parts of every",
    }.items():
        with pytest.raises(RunError, match=sentence):
            run(spec(Wrong(at=at), FedAvg(), rounds=1), population())
