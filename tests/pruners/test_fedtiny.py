import itertools
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch

from fedray.keys import Key
from fedray.models import MLP, Task
from fedray.personal import FedBN, FedPer, StaticNorm
from fedray.prune.allocate import uniform
from fedray.pruners import FedTiny
from fedray.pruners.candidates import LOSSES, STATISTICS
from fedray.round import ClientInfo, Exchange, Fit, Message, Part, Server
from fedray.strategies import FedAvg
from fedray.sums import Sums
from fedray.testing.federation import run, run_spec, synthetic
from fedray.tree import Layout, Mask, Tree, equal, restrict

# -- the choice among candidates -------------------------------------------------------------------------------------

STATS = Layout(("bn.running_mean", "bn.running_var"), ((1,), (1,)))
NONE = Layout((), ())
TINY = FedTiny(sparsity=0.5, candidates=4, noise=0.8)


@dataclass(frozen=True)
class Pool:
    """What clients see: the moments of candidate c are (id + c, 10) and its loss is |mean - 2| by the statistics it is
    given, plus what a client thinks of the candidate."""

    masks: tuple
    opinions: tuple

    def context(self, world, client, stats=STATS):
        masks = self.masks

        class Moments:
            def __call__(self, view):
                assert view.buffers.layout == stats
                return Tree(stats, torch.tensor([float(client + masks.index(view.mask)), 10.0])), world.sizes[client]

            def normalised(self, moments):
                mean, square = moments.flat
                return Tree(stats, torch.stack((mean, square - mean * mean)))

        def score(view):
            number = masks.index(view.mask)
            assert equal(view.params, restrict(world.server.params, view.mask))
            statistics = abs(float(view.buffers.flat[0]) - 2.0) if stats.size else 0.0
            return {"loss": statistics + self.opinions[client][number], "accuracy": 0.5}

        ctx = world.ctx(1, client)
        job = replace(ctx.job, buffers=Tree.zeros(stats))
        info = ClientInfo(id=client, num_examples=world.sizes[client])
        return replace(ctx, job=job, moments=Moments(), score=score, client=info)


def masks_of(world, policy=TINY):
    return tuple(policy.candidate(number, world.ctx(1)) for number in range(policy.candidates))


def choose(world, opinions, policy=TINY, stats=STATS):
    """The server after round 1's exchanges with all clients, and the names of what was asked."""
    pool = Pool(masks_of(world, policy), opinions)
    server, memory = policy.init_server(replace(world.server, buffers=Tree.zeros(stats)), world.ctx(0))
    asked = policy.exchanges(memory, world.ctx(1))
    specs = policy.exchange_parts(world.layout, stats)
    for exchange in asked:
        sums = Sums()
        for client in range(len(world.sizes)):
            ctx = pool.context(world, client, stats)
            question = policy.ask(exchange, server, memory, ctx)
            answer = policy.answer(exchange, question, None, ctx)
            for way, message in (("down", question), ("up", answer)):
                parts = {name: spec for name, spec in specs[exchange.name].items() if spec.direction == way}
                assert {name: part.value.layout for name, part in message.parts.items()} == {
                    name: spec.layout for name, spec in parts.items()
                }
            sums.add(answer)
        server, memory = policy.learn(exchange, server, sums, memory, world.ctx(1))
    return server, [exchange.name for exchange in asked], memory


def test_candidates_share_a_budget_and_differ_in_their_layers(world):
    masks = masks_of(world)
    counts = [mask.counts(world.prunable) for mask in masks]
    assert counts[0] == uniform(world.layout, world.prunable, 0.5)
    assert [sum(count.values()) for count in counts] == [26] * 4
    assert len({tuple(count.values()) for count in counts}) > 2
    for mask in masks:
        assert bool(mask["fc.bias"].all())
        for name in world.prunable:
            weights, kept = world.server.params[name].abs(), mask[name]
            assert kept.all() or not kept.any() or weights[kept].min() > weights[~kept].max()


def test_both_sides_draw_the_same_candidates_so_that_no_mask_travels(world):
    for number in range(4):
        assert TINY.candidate(number, world.ctx(1)) == TINY.candidate(number, world.ctx(1, 2))
    other = replace(world.ctx(1), run_key=Key.of(5))
    assert any(TINY.candidate(number, other) != TINY.candidate(number, world.ctx(1)) for number in (1, 2, 3))
    assert TINY.ask(Exchange(name=LOSSES), world.server, None, world.ctx(1)) == Message()


def test_the_candidate_of_the_least_loss_with_pooled_statistics_wins_by_hand(world):
    # Pooled means are those of 10, 30 and 5 examples: (0 * 10 + 1 * 30 + 2 * 5) / 45 = 8/9 for candidate 0, 1 more for
    # each of the next: losses |8/9 - 2| = 1.11, 0.11, 0.89, 1.89. Each client by its own statistics would differ.
    server, asked, memory = choose(world, ((0.0,) * 4,) * 3)
    assert asked == [STATISTICS, LOSSES]
    assert server.mask == masks_of(world)[1]
    assert memory is True
    # Client 1 has 30 of 45 examples: 1.2 of its loss is worth 0.8 of the mean, and candidate 2 has the least.
    server, _, _ = choose(world, ((0.0,) * 4, (0.0, 1.2, 0.0, 0.0), (0.0,) * 4))
    assert server.mask == masks_of(world)[2]
    # The same dislike of client 2, with 5 examples, is worth 0.13.
    server, _, _ = choose(world, ((0.0,) * 4, (0.0,) * 4, (0.0, 1.2, 0.0, 0.0)))
    assert server.mask == masks_of(world)[1]


def test_the_winner_has_its_initial_weights_also_where_the_first_candidate_cut_them(world):
    server, _, _ = choose(world, ((0.0,) * 4,) * 3)
    first, won = masks_of(world)[:2]
    assert (won.flat & ~first.flat).any()
    assert equal(server.params, restrict(world.server.params, won))


def test_without_batch_normalisation_clients_are_asked_for_losses_alone(world):
    opinions = ((3.0, 2.0, 1.0, 4.0), (1.0, 2.0, 1.0, 0.0), (0.0, 0.0, 0.0, 0.0))
    # Weighted by 10 and 30 of 45: 60, 80, 40 and 40 over 45: the first of the two least.
    server, asked, memory = choose(world, opinions, stats=NONE)
    assert asked == [LOSSES]
    assert server.mask == masks_of(world)[2]
    assert memory is True


def test_one_candidate_asks_nobody_and_nobody_is_asked_later(world):
    _, memory = TINY.init_server(world.server, world.ctx(0))
    assert TINY.exchanges(True, world.ctx(2)) == ()
    assert replace(TINY, candidates=1).exchanges(memory, world.ctx(1)) == ()
    assert TINY.exchanges(memory, world.ctx(1))[0].clients == "all"
    assert replace(TINY, voters="cohort").exchanges(memory, world.ctx(1))[0].clients == "cohort"
    assert (TINY.changes_masks(1), replace(TINY, candidates=1).changes_masks(1)) == (True, False)


def test_where_nobody_answers_the_first_candidate_stays(world):
    server, memory = TINY.init_server(replace(world.server, buffers=Tree.zeros(STATS)), world.ctx(0))
    for name in (STATISTICS, LOSSES):
        assert TINY.learn(Exchange(name=name), server, Sums(), memory, world.ctx(1)) == (server, memory)
    assert server.mask == masks_of(world)[0]


@dataclass(frozen=True)
class AwayFirst:
    """Nobody can be reached in the first rounds, and everybody later."""

    rounds: int

    def __call__(self, *, round, num_clients, key):
        return np.full(num_clients, round > self.rounds)


def test_a_cohort_that_was_empty_is_asked_in_the_round_that_has_one():
    """Nobody trained before, so the choice comes in time."""
    policy = FedTiny(sparsity=0.5, candidates=3, voters="cohort", noise=0.9, every=9)
    data = synthetic((6,), sizes=(12, 5, 9), num_classes=3, key=Key.of(3))
    task = Task(build=partial(MLP, hidden=(8,), shape=(6,), num_classes=3))
    for away in (0, 2):
        made = run_spec([("fedtiny", policy), ("fedavg", FedAvg())], task, num_clients=3, cohort=2, rounds=4)
        ran = run(replace(made, availability=AwayFirst(away)), data)
        asked = {row["round"] for record in ran.records for row in record.transfers if "exchange" in row}
        assert asked == {away + 1}
        chosen = [policy.candidate(number, ran.driver._context(1, ())) for number in range(3)]
        assert ran.servers[away + 1].mask in chosen
        assert all(server.mask == chosen[0] for server in ran.servers[: away + 1])
        assert all(server.mask == ran.servers[away + 1].mask for server in ran.servers[away + 1 :])


def test_when_the_mask_is_chosen_is_promised_only_where_all_are_asked(world):
    later = replace(TINY, voters="cohort", every=50)
    assert [later.changes_masks(number) for number in (0, 1, 2, 50)] == [True, None, None, True]
    everybody = replace(later, voters="all")
    assert [everybody.changes_masks(number) for number in (0, 1, 2, 50)] == [True, True, False, True]
    assert replace(later, candidates=1).changes_masks(1) is False


NORMS = {"conv.weight": "weight", "norm.weight": "norm", "norm.bias": "norm", "fc.weight": "weight"}


@pytest.mark.parametrize("keeper", [StaticNorm(), FedBN(), FedBN(keep="statistics"), FedPer(names=("norm*",))])
def test_candidates_without_statistics_of_their_own_are_warned_of(world, keeper):
    known = replace(world.facts(keeper, TINY, rounds=100), kinds=NORMS, has_statistics=True)
    (sentence,) = TINY.warns(known)
    assert "scored with its own, but with mean 0 and variance 1" in sentence
    for quiet in (
        replace(known, has_statistics=False),
        replace(known, policies=known.policies[1:]),
        replace(known, policies=(("fedper", FedPer()), *known.policies[1:])),
    ):
        assert TINY.warns(quiet) == ()
    assert replace(TINY, candidates=1).warns(known) == ()


# -- progressive pruning ---------------------------------------------------------------------------------------------

LAYOUT = Layout(("a", "bias", "b", "c"), ((8,), (2,), (6,), (4,)))
NAMES = ("a", "b", "c")
HAND = FedTiny(
    sparsity=0.5, every=2, until=20, ratio=0.5, ratio_decay="constant", groups=3, gradient_batch_size=4, candidates=1
)
MASK = Mask.of(LAYOUT, {"a": torch.arange(8) < 4, "b": torch.arange(6) < 2, "c": torch.arange(4) < 2})
PARAMS = restrict(Tree(LAYOUT, torch.arange(20.0, 0.0, -1.0)), MASK)
GRADIENT = Tree(
    LAYOUT, torch.tensor([9.0] * 4 + [0.1, -0.4, 0.3, 0.2] + [9.0] * 4 + [0.1, 0.2, -0.3, 0.1] + [9.0, 9.0, -0.2, 0.1])
)


def hand_context(world, number, gradient=GRADIENT, asked=None):
    def probe(*point, wants, batch_size):
        if asked is not None:
            asked.append((point[2], wants, batch_size))
        return {}, {"grad": gradient}

    return replace(world.ctx(number), prunable=NAMES, origin=PARAMS, probe=probe)


def hand_fit(num_examples=5, num_steps=3):
    received = Message(parts={"params": Part(value=PARAMS, support=MASK)}, mask=MASK)
    facts = {"num_examples": num_examples, "num_steps": num_steps, "lr": 0.1, "loss": 0.0}
    return Fit(received=received, params=PARAMS, buffers=Tree.zeros(NONE), mask=MASK, **facts)


@pytest.mark.parametrize(
    ("number", "sent"),
    [
        (2, {18: -0.2}),  # c: floor(0.5 * 2) = 1
        (4, {14: -0.3}),  # b: floor(0.5 * 2) = 1
        (6, {5: -0.4, 6: 0.3}),  # a: floor(0.5 * 4) = 2
        (8, {18: -0.2}),  # and around again
    ],
)
def test_clients_send_the_largest_gradients_of_what_is_cut_in_one_group_the_last_first(world, number, sent):
    asked = []
    fit, message, _ = HAND.end(hand_fit(), Message(), None, hand_context(world, number, asked=asked))
    part = message.parts["growth"]
    assert asked == [(MASK, frozenset({"grad"}), 4)]
    assert part.support.flat.nonzero().flatten().tolist() == sorted(sent)
    assert {at: float(part.value.flat[at]) for at in sent} == pytest.approx(sent)
    assert int(part.value.flat.count_nonzero()) == len(sent)
    assert (part.weight, fit.mask, fit.params) == (5.0, MASK, PARAMS)


@pytest.mark.parametrize("number", [1, 3, 20, 22])
def test_outside_adjustment_rounds_nothing_is_sent_and_nothing_changes(world, number):
    fit = hand_fit()
    assert HAND.end(fit, Message(), None, hand_context(world, number)) == (fit, Message(), None)
    server = Server(params=PARAMS, buffers=Tree.zeros(NONE), mask=MASK)
    sums = Sums().add(Message(parts={"growth": Part(value=Tree.zeros(LAYOUT), support=~MASK)}))
    assert HAND.settle(server, sums, None, hand_context(world, number))[0] is server


def test_the_server_sums_what_was_sent_and_what_was_not_counts_as_zero_by_hand(world):
    server, sums = Server(params=PARAMS, buffers=Tree.zeros(NONE), mask=MASK), Sums()
    for weight, positions in ((1.0, {4: 9.0, 5: 0.5}), (5.0, {5: 2.0, 6: -3.0}), (5.0, {5: 2.0, 7: 1.0})):
        value = torch.zeros(20)
        value[list(positions)] = torch.tensor(list(positions.values()))
        support = Mask(LAYOUT, value != 0)
        sums.add(Message(parts={"growth": Part(value=Tree(LAYOUT, value), weight=weight, support=support)}))
    # Sums 9, 20.5, -15 and 5, where means over those who sent would be 9, 1.86, -3 and 1.
    after = HAND.settle(server, sums, None, hand_context(world, 6))[0]
    assert after.mask["a"].tolist() == [True, True, False, False, False, True, True, False]
    assert after.mask["b"].tolist() == MASK["b"].tolist()
    assert after.mask["c"].tolist() == MASK["c"].tolist()
    assert after.params["a"].tolist() == [20.0, 19.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert equal(after.params, restrict(PARAMS, after.mask))


def test_one_group_moves_at_a_time_by_exact_counts_and_all_rest_between(world):
    policy = FedTiny(sparsity=0.6, candidates=1, every=2, until=9, ratio=0.5, groups=2)
    servers = world.run([policy, FedAvg()], 10)
    counts = uniform(world.layout, world.prunable, 0.6)
    assert counts == {"fc.weight": 16, "out.weight": 5}
    assert all(server.mask.counts(world.prunable) == counts for server in servers)
    moved = [
        [int((before.mask[name] & ~after.mask[name]).sum()) for name in world.prunable]
        for before, after in itertools.pairwise(servers)
    ]
    # 0.25 * (1 + cos(pi r / 9)) is 0.4415, 0.2934, 0.125 and 0.0151: floor of 5 *, 16 *, 5 *, 16 *.
    assert moved == [[0, 0], [0, 2], [0, 0], [4, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0]]
    at_once = world.run([replace(policy, groups=1), FedAvg()], 4)
    assert all((at_once[1].mask[name] != at_once[2].mask[name]).any() for name in world.prunable)


def test_growth_is_the_top_of_the_summed_dense_gradients_by_brute_force(world):
    policy = FedTiny(sparsity=0.7, candidates=1, every=1, until=9, ratio=0.4, ratio_decay="constant", groups=1)
    policies = [policy, FedAvg()]
    server = world.start(*policies)
    after, _ = world.round(policies, server, 1)
    for name in world.prunable:
        number, summed = int(0.4 * server.mask.counts((name,))[name] + 1e-6), {}
        away = (~server.mask[name]).flatten().nonzero().flatten().tolist()
        for client, size in enumerate(world.sizes):
            fit = world.answer([FedAvg()], server, 1, client)[1]
            slope = (fit.params[name] - world.target(client)[name]).flatten().tolist()
            for at in sorted(away, key=lambda at: -abs(slope[at]))[:number]:
                summed[at] = summed.get(at, 0.0) + size * slope[at]
        best = sorted(summed, key=lambda at: -abs(summed[at]))[:number]
        grown = (after.mask[name] & ~server.mask[name]).flatten().nonzero().flatten().tolist()
        assert grown == sorted(best)


def test_more_groups_than_tensors_are_one_each_and_a_client_without_steps_sends_nothing(world):
    many = replace(HAND, groups=9)
    for number in (2, 4, 6, 8):
        ctx = hand_context(world, number)
        assert many.end(hand_fit(), Message(), None, ctx)[1].parts["growth"].support == (
            HAND.end(hand_fit(), Message(), None, ctx)[1].parts["growth"].support
        )
    assert HAND.end(hand_fit(num_steps=0), Message(), None, hand_context(world, 2))[1] == Message()
    server = Server(params=PARAMS, buffers=Tree.zeros(NONE), mask=MASK)
    assert HAND.settle(server, Sums(), None, hand_context(world, 2))[0] is server


def test_sparsity_zero_is_the_dense_run_bit_for_bit(world):
    dense = world.run([FedAvg()], 4)
    run = world.run([FedTiny(sparsity=0.0, every=1, until=9), FedAvg()], 4)
    assert all(equal(a.params, b.params) for a, b in zip(dense, run, strict=True))
