import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from yaml_checks import composed

import fedray
from fedray.errors import ConfigError
from fedray.pruners import PruneFL
from fedray.pruners.one_client import INITIAL
from fedray.round import ClientInfo, Exchange, FieldError, Fit, Job, Message, Part, Server
from fedray.strategies import FedAvg
from fedray.sums import Sums
from fedray.tree import Layout, Mask, Tree, equal, restrict

LAYOUT = Layout(("w", "bias"), ((6,), (1,)))
NOTHING = Tree.zeros(Layout((), ()))
HAND = PruneFL(every=3, removal=0.5, constant_s=2.0, transfer_s=1.0, initial_rounds=0)


def tree_of(*values):
    return Tree(LAYOUT, torch.tensor([float(value) for value in values]))


def mask_of(*kept):
    return Mask(LAYOUT, torch.tensor([bool(bit) for bit in kept]))


MASK = mask_of(1, 1, 1, 1, 0, 0, 1)


def hand_context(world, number):
    return replace(world.ctx(number), prunable=("w",), origin=Tree.zeros(LAYOUT))


def hand_fit(*gradient, num_examples=5, num_steps=3, num_seen=12):
    return Fit(
        received=Message(mask=MASK),
        params=tree_of(4, -3, 0.1, 0.2, 0, 0, 1),
        buffers=NOTHING,
        mask=MASK,
        num_examples=num_examples,
        num_steps=num_steps,
        lr=0.1,
        loss=0.0,
        num_seen=num_seen,
        evidence={"grad_sum": tree_of(*gradient)},
    )


def test_a_client_adds_up_squares_of_its_rounds_sums_and_sends_them_on_due_rounds_alone(world):
    fit, memory = hand_fit(1, -2, 0, 0, 3, 0, 1), None
    assert HAND.begin(Message(), world.job(), None, world.ctx(1))[1].wants == {"grad_sum"}
    for number in (1, 2):
        same, message, memory = HAND.end(fit, Message(), memory, hand_context(world, number))
        assert (same, message) == (fit, Message())
    assert memory.flat.tolist() == [2.0, 8.0, 0.0, 0.0, 18.0, 0.0, 2.0]
    fit = hand_fit(1, 1, 1, 1, 1, 1, 1)
    same, message, memory = HAND.end(fit, Message(), memory, hand_context(world, 3))
    assert same is fit
    assert memory is None
    part = message.parts["importance"]
    # Squares of sums, 1 + 1 + 1 = 3, and not the square of the sum of rounds, 9; also where the mask cuts.
    assert part.value.flat.tolist() == [3.0, 9.0, 1.0, 1.0, 19.0, 1.0, 3.0]
    assert (part.weight, part.support) == (5.0, None)
    assert message["num_seen"].flat.tolist() == [12.0]


def test_a_client_that_took_no_step_adds_nothing_and_sends_what_it_has(world):
    idle = replace(hand_fit(*[9] * 7, num_steps=0), evidence={})
    assert HAND.end(idle, Message(), None, hand_context(world, 3))[1:] == (Message(), None)
    held = tree_of(1, 2, 3, 4, 5, 6, 7)
    _, message, memory = HAND.end(idle, Message(), held, hand_context(world, 3))
    assert equal(message["importance"], held)
    assert memory is None


def answered(*importances):
    sums = Sums()
    for weight, seen, values in importances:
        parts = {"importance": Part(value=tree_of(*values), weight=weight)}
        parts["num_seen"] = Part(value=Tree(Layout(("num_seen",), ((1,),)), torch.tensor([seen])))
        sums.add(Message(parts=parts))
    return sums


def test_the_server_weighs_by_examples_and_keeps_what_learns_most_per_second_by_hand(world):
    server = Server(params=tree_of(4, -3, 0.1, 0.2, 0, 0, 1), buffers=NOTHING, mask=MASK)
    sums = answered((1.0, 8.0, (4, 4, 36, 0.4, 0, 0, 0)), (3.0, 8.0, (0, 0, 0, 0, 32 / 3, 0.4, 0)))
    # Means: 1, 1, 9, 0.1, 8, 0.3 and none for the bias. floor(0.5 * 0.5^(3 / 10000) * 4) = floor(1.9996) = 1 goes, the
    # third; 9 > 2.1 / 5 and 8 > 11.1 / 6 come, 0.3 < 19.1 / 7 does not.
    after, _, memory = HAND.settle(server, sums, {}, hand_context(world, 3))
    assert memory == {}
    assert after.mask == mask_of(1, 1, 1, 1, 1, 0, 1)
    # What is put back at once was never away, and what comes in is zero.
    assert equal(after.params, tree_of(4, -3, 0.1, 0.2, 0, 0, 1))
    # Of the two that go now one pays, and the other, of 0.1, does not.
    after = replace(HAND, removal=0.6).settle(server, sums, {}, hand_context(world, 3))[0]
    assert after.mask == mask_of(1, 1, 1, 0, 1, 0, 1)
    assert equal(after.params, tree_of(4, -3, 0.1, 0, 0, 0, 1))


@pytest.mark.parametrize("number", [1, 2, 4, 5])
def test_between_reconfigurations_the_mask_rests(world, number):
    server = Server(params=tree_of(4, -3, 0.1, 0.2, 0, 0, 1), buffers=NOTHING, mask=MASK)
    sums = answered((1.0, 8.0, (4, 4, 36, 0.4, 0, 0, 0)))
    assert HAND.settle(server, sums, {}, hand_context(world, number))[0] is server
    assert HAND.settle(server, Sums(), {}, hand_context(world, 3))[0] is server


def test_the_fraction_that_is_taken_out_halves_with_the_half_life(world):
    layout = Layout(("w",), ((16,),))
    server = Server(params=Tree(layout, torch.arange(1.0, 17.0)), buffers=NOTHING, mask=Mask.full(layout))
    sums = Sums()
    seen = Part(value=Tree(Layout(("num_seen",), ((1,),)), torch.tensor([1.0])))
    sums.add(Message(parts={"importance": Part(value=Tree.zeros(layout)), "num_seen": seen}))
    policy = PruneFL(every=4, removal=0.5, half_life=4.0, constant_s=1.0, initial_rounds=0)
    ctx = replace(world.ctx(4), prunable=("w",), origin=Tree.zeros(layout))
    kept = []
    for number in (4, 8, 12):
        after = policy.settle(server, sums, {}, replace(ctx, round=number))[0]
        kept.append(after.mask.counts()["w"])
        assert after.mask.flat.tolist() == [False] * (16 - kept[-1]) + [True] * kept[-1]
    # Nothing is worth its time, so all that is taken out stays away: 16/4, 16/8, 16/16.
    assert kept == [12, 14, 15]


def test_a_target_bounds_what_is_put_in_along_a_line(world):
    layout = Layout(("w",), ((20,),))
    mask = Mask(layout, torch.arange(20) < 4)
    server = Server(params=restrict(Tree(layout, torch.ones(20)), mask), buffers=NOTHING, mask=mask)
    seen = Part(value=Tree(Layout(("num_seen",), ((1,),)), torch.tensor([1.0])))
    sums = Sums().add(
        Message(parts={"importance": Part(value=Tree(layout, torch.ones(20))), "num_seen": seen}),
    )
    policy = PruneFL(every=1, removal=0.0, constant_s=9.0, target_sparsity=0.8, finish=10, initial_rounds=0)
    ctx = replace(world.ctx(1), prunable=("w",), origin=Tree.zeros(layout))
    kept = [policy.settle(server, sums, {}, replace(ctx, round=r))[0].mask.counts()["w"] for r in (1, 5, 9, 10, 50)]
    assert kept == [18, 12, 6, 4, 4]  # 20 * (1 - 0.8 r / 10)
    free = replace(policy, target_sparsity=0.0)
    assert free.settle(server, sums, {}, replace(ctx, round=10))[0].mask.counts() == {"w": 20}


def test_the_time_of_computing_makes_dear_layers_sparser(world):
    layout = Layout(("cheap", "dear"), ((8,), (8,)))
    mask = Mask(layout, torch.tensor([True] + [False] * 7 + [True] + [False] * 7))
    server = Server(params=restrict(Tree(layout, torch.ones(16)), mask), buffers=NOTHING, mask=mask)
    importance = torch.cat((torch.linspace(1.0, 0.1, 8), torch.linspace(1.0, 0.1, 8)))
    seen = Part(value=Tree(Layout(("num_seen",), ((1,),)), torch.tensor([100.0])))
    sums = Sums().add(Message(parts={"importance": Part(value=Tree(layout, importance)), "num_seen": seen}))
    policy = PruneFL(every=1, removal=0.0, constant_s=1e-3, transfer_s=1e-4, initial_rounds=0)
    ctx = replace(world.ctx(1), prunable=("cheap", "dear"), origin=Tree.zeros(layout))
    plain = policy.settle(server, sums, {}, ctx)[0].mask.counts()
    assert plain["cheap"] == plain["dear"] > 1
    # 3 * 8e4 FLOPs * 100 examples / 1e9 / 8 weights are 3e-3 s a weight beside 1e-4 s.
    priced = policy.settle(server, sums, {"dear": 8e4}, ctx)[0].mask.counts()
    assert priced["dear"] == 1 < priced["cheap"]
    told = replace(policy, computing_s={"dear": 3e-3}).settle(server, sums, {}, ctx)[0].mask
    assert told.counts() == priced


# -- the first stage -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alone:
    """A client whose gradient sums are the same in every job, and that reaches `accuracy` of 4 classes."""

    accuracy: float = 1.0
    classes: int = 4
    jobs: tuple = ()

    def context(self, world, jobs):
        def train(job, name):
            jobs.append((job, name))
            params = restrict(Tree(LAYOUT, job.params.flat + 1.0), job.mask)
            fit = hand_fit(6, 5, 4, 3, 2, 1, 0)
            return replace(fit, params=params, mask=job.mask, num_steps=job.num_steps)

        def score(view):
            assert view.mask is not None
            return {"accuracy": self.accuracy, "loss": 1.0}

        job = Job(
            params=tree_of(1, 2, 3, 4, 5, 6, 7),
            buffers=NOTHING,
            mask=None,
            num_steps=5,
            batch_size=2,
            lr=0.1,
            optim=world.job().optim,
        )
        return replace(
            hand_context(world, 1),
            origin=job.params,
            client=ClientInfo(id=2, num_examples=10, label_counts=(5,) * self.classes),
            job=job,
            train=train,
            score=score,
        )


FIRST = PruneFL(
    removal=0.5, constant_s=2.0, transfer_s=1.0, initial_rounds=20, initial_every=2, initial_steps=7, patience=2
)
ASKED = Exchange(name=INITIAL, clients=(2,))


def first_stage(world, policy=FIRST, **facts):
    jobs = []
    ctx = Alone(**facts).context(world, jobs)
    server = Server(params=ctx.origin, buffers=NOTHING, mask=Mask.full(LAYOUT))
    question = policy.ask(ASKED, server, {}, ctx)
    return jobs, policy.answer(ASKED, question, None, ctx), server, ctx


def test_the_initial_client_trains_on_reconfigures_and_stops_when_the_size_has_settled(world):
    jobs, answer, _, _ = first_stage(world)
    # Importances of two rounds are 72, 50, 32, 18, 8 and 2. The first three are the smallest weights and go; 72 > 28/5,
    # 50 > 100 / 6 and 32 > 150 / 7 come back. So nothing moves, and it takes two more to see that it settled.
    assert len(jobs) == 6
    assert [job.num_steps for job, _ in jobs] == [7] * 6
    assert len({name for _, name in jobs}) == 6
    assert all(job.wants == {"grad_sum"} for job, _ in jobs)
    assert jobs[0][0].mask == Mask.full(LAYOUT)
    assert jobs[1][0].params.flat.tolist() == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    assert answer.mask == answer.parts["params"].support == Mask.full(LAYOUT)
    assert answer["params"].flat.tolist() == [7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0]


def test_the_initial_client_answers_with_the_mask_that_it_found(world):
    jobs, _, server, ctx = first_stage(world)
    policy = replace(FIRST, constant_s=1e-6, removal=0.34)

    def train(job, name):
        # Now the importance is where the weights are large, and what is small stays away.
        return replace(ctx.train(job, name), evidence={"grad_sum": tree_of(1, 2, 3, 4, 5, 6, 0)})

    del jobs[:]
    answer = policy.answer(ASKED, policy.ask(ASKED, server, {}, ctx), None, replace(ctx, train=train))
    # floor(0.34 * 6) = 2 go, then floor(0.34 * 4) = 1, 1 of 3, and none of 2, two times on end.
    sizes = [job.mask.counts()["w"] for job, _ in jobs[::2]]
    assert sizes == [6, 4, 3, 2, 2]
    assert answer.mask == answer.parts["params"].support == mask_of(0, 0, 0, 0, 1, 1, 1)
    assert answer["params"].flat[:4].tolist() == [0.0] * 4


def test_importance_begins_anew_after_each_reconfiguration(world):
    jobs, _, server, ctx = first_stage(world)
    policy = replace(FIRST, constant_s=1e-6, initial_rounds=4)

    def train(job, name):
        first = 100 if name in ("initial pruning 1", "initial pruning 2") else 0
        return replace(ctx.train(job, name), evidence={"grad_sum": tree_of(first, 1, 1, 1, 2, 2, 0)})

    del jobs[:]
    answer = policy.answer(ASKED, policy.ask(ASKED, server, {}, ctx), None, replace(ctx, train=train))
    # The first is the smallest, and it returns at once for 20,000; then it goes again, and what it was worth is gone.
    assert jobs[2][0].mask == mask_of(1, 0, 0, 1, 1, 1, 1)
    assert answer.mask == mask_of(0, 0, 0, 0, 1, 1, 1)


@pytest.mark.parametrize(("accuracy", "jobs"), [(0.374, 20), (0.375, 6)])
def test_reconfigurations_begin_above_chance(world, accuracy, jobs):
    ran, answer, _, _ = first_stage(world, accuracy=accuracy)  # 1.5 / 4 classes
    assert len(ran) == jobs
    assert answer.mask == Mask.full(LAYOUT)


@pytest.mark.parametrize("classes", [0, 1])
def test_a_task_without_classes_needs_no_accuracy(world, classes):
    assert len(first_stage(world, accuracy=0.0, classes=classes)[0]) == 6


FAMILIES = {
    "numbers": ["data._target_=family_data.numbers", "model=mlp", "model.hidden=[9]"],
    "next tokens": ["data._target_=family_data.tokens", "+data.classes=false", "model=char_lstm", "model.hidden=6"],
    "texts": ["data._target_=family_data.tokens", "+data.classes=true", "model=lstm_classifier", "model.hidden=6"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_initial_client_finds_a_mask_whatever_samples_are_labelled_with(family, tmp_path, monkeypatch):
    """Numbers have deciles for labels and no accuracy; next tokens have one label, of which 1.5 times chance is 1.5."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "laws")
    settings = ["pruner=prunefl", "pruner.initial_rounds=12", "pruner.initial_every=2", "pruner.initial_steps=2"]
    settings += ["pruner.patience=1", "pruner.constant_s=1.0e-9", "rounds=1", "num_clients=3", "cohort=2"]
    quiet = ["runtime=inline", "tracker.progress=none", "tracker.wandb.mode=disabled", "trainer.engine=eager"]
    groups = ["partition=iid", *(one for one in FAMILIES[family] if one.startswith("model="))]
    rest = [one for one in FAMILIES[family] if not one.startswith("model=")]
    ran = fedray.run([*groups, *rest, *settings, *quiet, "trainer.lr=0.3"], folder=tmp_path)
    assert ran.rows[0]["model/sparsity"] > 0.0


def test_the_initial_client_begins_with_the_mask_that_the_model_came_with(world):
    jobs, _, server, ctx = first_stage(world)
    del jobs[:]
    question = FIRST.ask(ASKED, replace(server, mask=MASK), {}, ctx)
    assert question.mask == MASK
    FIRST.answer(ASKED, question, None, ctx)
    assert jobs[0][0].mask == MASK
    assert FIRST.ask(ASKED, server, {}, ctx).mask is None  # a whole one goes without saying
    assert FIRST.init_server(replace(world.server, mask=world.mask(1)), world.ctx(0))[0].mask == world.mask(1)


def test_all_begin_with_what_the_initial_client_found(world):
    _, answer, server, ctx = first_stage(world)
    found = replace(
        answer, parts={"params": Part(value=tree_of(1, 0, 0, 4, 5, 6, 7), support=mask_of(1, 0, 0, 1, 1, 1, 1))}
    )
    after, memory = FIRST.learn(ASKED, server, Sums().add(found), {"w": 3.0}, ctx)
    assert after.mask == mask_of(1, 0, 0, 1, 1, 1, 1)
    assert equal(after.params, tree_of(1, 0, 0, 4, 5, 6, 7))
    assert memory == {"w": 3.0}
    assert FIRST.learn(ASKED, server, Sums(), {}, ctx) == (server, {})


def test_one_client_is_asked_before_the_first_round_alone(world):
    asked = {
        seed: FIRST.exchanges({}, replace(world.ctx(1), run_key=replace(world.ctx(1)).key.fold(seed)))
        for seed in range(20)
    }
    assert all(len(exchanges) == 1 and exchanges[0].name == INITIAL for exchanges in asked.values())
    assert {exchanges[0].clients for exchanges in asked.values()} == {(0,), (1,), (2,)}
    assert replace(FIRST, initial_client=2).exchanges({}, world.ctx(1))[0].clients == (2,)
    assert FIRST.exchanges({}, world.ctx(2)) == ()
    assert HAND.exchanges({}, world.ctx(1)) == ()
    assert (FIRST.changes_masks(1), HAND.changes_masks(1), HAND.changes_masks(3)) == (True, False, True)


def test_the_initial_client_is_sent_the_flops_that_it_cannot_know(world):
    _, _, server, ctx = first_stage(world)
    message = FIRST.ask(ASKED, server, {"w": 40.0, "": 3.0}, ctx)
    assert message["flops"].flat.tolist() == [40.0, 0.0]
    spec = FIRST.exchange_parts(LAYOUT, NOTHING.layout)[INITIAL]
    assert set(spec) == {"params", "flops"}
    assert spec["flops"].layout == message["flops"].layout
    assert "buffers" in FIRST.exchange_parts(LAYOUT, world.stats)[INITIAL]


def test_an_initial_client_that_is_none_is_refused(world):
    replace(FIRST, initial_client=2).check(world.facts())
    with pytest.raises(ConfigError) as caught:
        replace(FIRST, initial_client=3).check(world.facts())
    assert str(caught.value) == "pruner.initial_client is 3; it is a client's id from 0 to 2, or null to draw one"


def test_a_target_that_the_run_never_reaches_is_refused(world):
    policy = PruneFL(target_sparsity=0.8, finish=21)
    policy.check(world.facts(rounds=21))
    replace(policy, target_sparsity=0.0).check(world.facts(rounds=20))
    with pytest.raises(ConfigError) as caught:
        policy.check(world.facts(rounds=20))
    assert str(caught.value) == (
        "pruner.finish is 21; it must be at most rounds (20), or the target_sparsity of 0.8 never bounds the size; "
        "lower it or raise rounds"
    )


def test_a_target_alone_bounds_the_size_in_a_run_of_any_length():
    for rounds in (1, 10, 40, 333):
        found = composed("prunefl", rounds=rounds, target_sparsity=0.8)
        assert found["finish"] == max(1, int(0.6 * rounds))


def test_seconds_of_a_tensor_that_there_is_not_are_refused_by_name(world):
    policy = PruneFL(computing_s={"fc.weight": 1e-3, "fc.weigth": 1e-3})
    kinds = {"fc.weight": "weight", "fc.bias": "bias", "out.weight": "weight"}
    policy.check(world.facts())
    for known in ({"kinds": kinds}, {"kinds": kinds, "prunable": ("fc.weight", "out.weight")}):
        with pytest.raises(ConfigError, match=r"pruner.computing_s names 'fc.weigth'; it has seconds by the names"):
            policy.check(replace(world.facts(), **known))
        replace(policy, computing_s={"fc.weight": 1e-3}).check(replace(world.facts(), **known))
    with pytest.raises(ConfigError, match=r"'fc.bias'.* which are fc.weight, out.weight"):
        replace(policy, computing_s={"fc.bias": 1.0}).check(replace(world.facts(), **known))


def test_after_the_end_nothing_is_gathered_or_sent_and_the_mask_rests(world):
    ends = replace(HAND, until=6)
    assert [number for number in range(1, 13) if ends.changes_masks(number)] == [3]
    assert ends.begin(Message(), world.job(), None, world.ctx(5))[1].wants == {"grad_sum"}
    held = tree_of(1, 2, 3, 4, 5, 6, 7)
    job = world.job()
    assert ends.begin(Message(), job, held, world.ctx(6)) == (Message(), job, None)
    fit = hand_fit(1, -2, 0, 0, 3, 0, 1)
    assert ends.end(fit, Message(), held, hand_context(world, 6)) == (fit, Message(), None)
    server = Server(params=tree_of(4, -3, 0.1, 0.2, 0, 0, 1), buffers=NOTHING, mask=MASK)
    sums = answered((1.0, 8.0, (4, 4, 36, 0.4, 0, 0, 0)))
    assert ends.settle(server, sums, {}, hand_context(world, 6))[0] is server
    with pytest.raises(FieldError, match="until is -1; it is a round, 0 for the mask of the initial client alone"):
        replace(HAND, until=-1)


# -- many rounds -----------------------------------------------------------------------------------------------------


def run(world, policy, rounds):
    """The server after each round, with the memories of both sides."""
    policies = [policy, FedAvg()]
    server, memory = policy.init_server(world.server, world.ctx(0))
    servers, held = [server], dict.fromkeys(range(len(world.sizes)))
    for number in range(1, rounds + 1):
        sums = Sums()
        for client in held:
            ctx, message = world.ctx(number, client), Message()
            for one in policies:
                message = one.send(server, message, None, ctx)
            received, job = message, world.job()
            for one in reversed(policies):
                message, job, _ = one.begin(message, job, held[client], ctx)
            fit, answer = world.train(job, received, client), Message()
            fit, answer, held[client] = policy.end(fit, answer, held[client], ctx)
            sums.add(FedAvg().end(fit, answer, None, ctx)[1])
        server, sums, _ = FedAvg().settle(server, sums, None, world.ctx(number))
        server, sums, memory = policy.settle(server, sums, memory, world.ctx(number))
        servers.append(server)
    return servers


def test_the_mask_moves_on_reconfiguration_rounds_rests_between_and_weights_return(world):
    servers = run(world, PruneFL(every=2, removal=0.4, constant_s=1e-6, initial_rounds=0), 8)
    moved = [before.mask != after.mask for before, after in itertools.pairwise(servers)]
    assert moved == [False, True] * 4
    assert all(not server.params.flat[~server.mask.flat].any() for server in servers)
    back = [(after.mask.flat & ~before.mask.flat).nonzero().flatten() for before, after in itertools.pairwise(servers)]
    assert sum(len(places) for places in back) > 0
    assert all(not after.params.flat[places].any() for places, after in zip(back, servers[1:], strict=True))
    for before, after in itertools.pairwise(servers):
        least = {name: count - int(0.4 * count) for name, count in before.mask.counts(world.prunable).items()}
        assert all(after.mask.counts((name,))[name] >= count for name, count in least.items())


def test_without_a_reconfiguration_it_is_the_dense_run_bit_for_bit(world):
    dense = world.run([FedAvg()], 4)
    assert all(
        equal(a.params, b.params) for a, b in zip(dense, run(world, PruneFL(every=5, initial_rounds=0), 4), strict=True)
    )
