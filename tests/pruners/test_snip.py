from dataclasses import replace
from functools import partial

import pytest
import torch
from looking import CLASSES, Looking, all_along, nobody, of_client, one_thread
from yaml_checks import check_file, facts

from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.models import MLP, Task
from fedray.pruners import Snip
from fedray.round import FieldError, Message, Part, Server
from fedray.strategies import FedAvg
from fedray.sums import Sums
from fedray.testing.federation import run, run_spec, synthetic
from fedray.tree import Layout, Mask, Tree, equal

ALL = Snip(sparsity=0.7, batch_size=None)


@pytest.fixture(scope="module")
def looking():
    with one_thread():
        yield Looking.at()


def test_a_score_is_the_difference_of_the_loss_by_a_factor_on_each_weight(looking):
    answers, _, _ = looking.ask(ALL, looking.server)
    for client, answer in enumerate(answers):
        expected = all_along(of_client(looking, client), looking.server.params.flat.double())
        assert float((answer["scores"].flat.double() - expected).norm() / expected.norm()) < 1e-4
        assert answer.parts["scores"].weight == looking.sizes[client]
    before, _, _ = looking.ask(replace(ALL, absolute="before"), looking.server)
    for one, two in zip(answers, before, strict=True):
        assert torch.equal(one["scores"].flat.abs(), two["scores"].flat)


def by_hand(score, looking, count):
    """The highest of all prunable ones together by a plain sort."""
    layout, names = looking.engine.params_layout, looking.ctx(1).prunable
    places = [at for name in names for at in range(layout.spans[name].start, layout.spans[name].stop)]
    best = sorted(places, key=lambda at: (-float(score[at]), at))[:count]
    return Mask(layout, torch.tensor([at in best or at not in places for at in range(layout.size)]))


@pytest.mark.parametrize("absolute", ["after", "before"])
def test_the_mask_keeps_the_highest_of_the_mean_by_examples_with_an_exact_count(looking, absolute):
    _, server, done = looking.ask(replace(ALL, absolute=absolute), looking.server)
    weights = torch.tensor(looking.sizes, dtype=torch.float64)[:, None] / sum(looking.sizes)
    origin = looking.server.params.flat.double()
    scores = torch.stack([all_along(of_client(looking, client), origin) for client in range(3)])
    mean = (weights * scores).sum(0).abs() if absolute == "after" else (weights * scores.abs()).sum(0)
    count = round(0.3 * 45)  # 30 + 15 weights
    assert server.mask == by_hand(mean, looking, count)
    assert not server.params.flat[~server.mask.flat].any()
    assert torch.equal(server.params.flat[server.mask.flat], looking.server.params.flat[server.mask.flat])
    assert done is True


def test_with_the_absolute_value_after_the_mean_it_is_snip_on_all_data_at_once(looking):
    """The mean over clients by examples is the mean over examples."""
    pooled = Looking(looking.engine, sizes=(sum(looking.sizes),))
    assert looking.ask(ALL, looking.server)[1].mask == pooled.ask(ALL, pooled.server, (0,))[1].mask


LAYOUT = Layout(("a", "free", "b"), ((2,), (1,), (3,)))


def learned(policy, world, *answers):
    sums = Sums()
    for weight, values in answers:
        sums.add(Message(parts={"scores": Part(value=Tree(LAYOUT, torch.tensor(values)), weight=weight)}))
    server = Server(params=Tree(LAYOUT, torch.ones(6)), buffers=Tree.zeros(Layout((), ())))
    ctx = replace(world.ctx(1), prunable=("a", "b"))
    return policy.learn(policy.exchanges(False, ctx)[0], server, sums, False, ctx)[0].mask.flat.tolist()


def test_signs_that_cancel_between_clients_count_before_the_mean_and_not_after_it_by_hand(world):
    # By examples: (3 * 2 - 1 * 6) / 4 = 0 against (3 * 2 + 1 * 6) / 4 = 3; the others have 1, 1.25, 0.25, 2.
    opposed = (3.0, [2.0, 1.0, 9.0, -1.0, 0.0, 2.0]), (1.0, [-6.0, 1.0, 9.0, -2.0, 1.0, 2.0])
    after = learned(Snip(sparsity=0.6), world, *opposed)
    assert after == [False, False, True, True, False, True]
    magnitudes = [(weight, [abs(value) for value in values]) for weight, values in opposed]
    before = learned(Snip(sparsity=0.6, absolute="before"), world, *magnitudes)
    assert before == [True, False, True, False, False, True]


def test_a_score_on_public_data_is_cut_before_the_first_round_and_nobody_is_asked(looking):
    policy = replace(ALL, scores="server")
    server, memory = policy.init_server(looking.server, looking.ctx(0))
    score = all_along(of_client(looking, None), looking.server.params.flat.double()).abs()
    assert server.mask == by_hand(score, looking, 14)
    assert policy.exchanges(memory, looking.ctx(1)) == ()
    assert [policy.sparsity_after(n) for n in (0, 1)] == [0.7, 0.7]
    assert [policy.changes_masks(n) for n in (0, 1, 2)] == [True, False, False]
    clients, memory = ALL.init_server(looking.server, looking.ctx(0))
    assert (clients.mask, memory) == (None, False)


def test_who_is_asked_and_when(looking):
    (everyone,) = ALL.exchanges(False, looking.ctx(1))
    assert (everyone.name, everyone.clients) == ("snip", "all")
    (some,) = replace(ALL, clients="cohort").exchanges(False, looking.ctx(1))
    assert some.clients == "cohort"
    assert ALL.exchanges(True, looking.ctx(2)) == ()
    assert [ALL.sparsity_after(n) for n in (0, 1, 9)] == [0.0, 0.7, 0.7]
    assert [ALL.changes_masks(n) for n in (0, 1, 2)] == [False, True, False]


def test_when_the_mask_is_cut_is_promised_only_where_all_are_asked():
    """A cohort may be empty, and then the next is asked."""
    some = replace(ALL, clients="cohort")
    assert [some.sparsity_after(n) for n in (0, 1, 9)] == [0.0, None, None]
    assert [some.changes_masks(n) for n in (0, 1, 2)] == [False, None, None]
    assert [replace(some, scores="server").changes_masks(n) for n in (0, 1)] == [True, False]


def test_where_nobody_could_be_asked_the_next_round_asks_again(looking):
    server, memory = nobody(ALL, looking)
    assert equal(server.params, looking.server.params)
    assert server.mask is None
    assert len(ALL.exchanges(memory, looking.ctx(2))) == 1


def test_a_mask_that_the_model_came_with_is_respected(looking):
    layout = looking.engine.params_layout
    inherited = Mask.of(layout, {"fc.weight": torch.arange(30).view(5, 6) % 2 == 0})
    answers, server, _ = looking.ask(ALL, looking.server.cut(inherited))
    assert not (server.mask.flat & ~inherited.flat).any()
    assert sum(server.mask.counts(("fc.weight", "out.weight")).values()) == 14
    assert not torch.equal(answers[0]["scores"].flat, looking.ask(ALL, looking.server)[0][0]["scores"].flat)


def federation(policy, *others, **changes):
    population = synthetic((6,), sizes=(12, 5, 9, 4, 16, 7), num_classes=CLASSES, key=Key.of(3), public=12)
    task = Task(build=partial(MLP, hidden=(8,), shape=(6,), num_classes=CLASSES))
    named = [(type(one).__name__.lower(), one) for one in (policy, *(others or (FedAvg(),)))]
    return run(run_spec(named, task, rounds=3, **changes), population)


def asks(row):
    return row.get("exchange") == "snip"


@pytest.mark.parametrize("clients", ["all", "cohort"])
def test_a_run_asks_once_at_four_bytes_a_parameter_and_then_keeps_its_mask(clients):
    ran = federation(Snip(sparsity=0.8, clients=clients))
    asked = 6 if clients == "all" else 4
    size = ran.servers[0].params.layout.size
    rounds = [[row for row in record.transfers if asks(row)] for record in ran.records]
    assert not rounds[1] + rounds[2]
    up, down = ([row for row in rounds[0] if row["direction"] == way] for way in ("up", "down"))
    assert len({row["client"] for row in up}) == len({row["client"] for row in down}) == asked
    assert sum(row["value_bytes"] for row in up) == 4 * size * asked
    assert sum(row["value_bytes"] + row["mask_bytes"] for row in down) <= asked  # a code of one byte each
    masks = [server.mask for server in ran.servers[1:]]
    assert ran.servers[0].mask is None
    assert masks[0] == masks[1] == masks[2]
    weights = ran.driver.worker.prunable
    assert sum(masks[0].counts(weights).values()) == round(0.2 * sum(masks[0][name].numel() for name in weights))
    # In force in the first round already.
    assert all(upload.job.mask == masks[0] for upload in ran.heard if upload.round == 1)


def test_a_run_on_public_data_sends_nothing_for_its_mask():
    ran = federation(Snip(sparsity=0.8, scores="server"), public=12)
    assert not [row for record in ran.records for row in record.transfers if asks(row)]
    assert ran.servers[0].mask is not None
    assert ran.servers[0].mask == ran.servers[-1].mask


def test_a_server_without_public_data_is_refused():
    policy = Snip(sparsity=0.5, scores="server")
    facts(policy, public=1)
    with pytest.raises(ConfigError) as caught:
        facts(policy)
    assert str(caught.value) == (
        "pruner.scores is 'server'; the server scores on public data, and it has none: set public above 0, such as "
        "public=250, or pruner.scores=clients"
    )


def test_the_file_is_complete_and_accepted_from_ten_rounds_on():
    check_file("snip")


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("sparsity", 1.0, "it is 0 to below 1; 0.9 keeps 1 in 10"),
        ("scores", "public", "choose clients or server"),
        ("clients", "some", "choose all or cohort"),
        ("absolute", "never", "choose after or before"),
        ("batch_size", 0, "it is a number of examples, at least 1, or null for all"),
        ("budget", "all", "choose prunable_weights or all_parameters"),
        ("rounding", "up", "choose nearest or floor"),
    ],
)
def test_a_bad_value_is_refused_in_one_sentence(field, value, rule):
    with pytest.raises(FieldError) as caught:
        Snip(**{"sparsity": 0.5, field: value})
    assert str(caught.value) == f"{field} is {value!r}; {rule}"
