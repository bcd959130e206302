from dataclasses import replace

import pytest
import torch
from looking import Looking, along, gradient, nobody, of_client, one_thread
from yaml_checks import check_file, facts

from fedray.errors import ConfigError
from fedray.prune.score import sensitivity
from fedray.pruners import GraSP
from fedray.round import FieldError, Message, Part, Server
from fedray.sums import Sums
from fedray.tree import Layout, Tree

HALF = GraSP(sparsity=0.5, per_class=None, temperature=3.0)


@pytest.fixture(scope="module")
def looking():
    with one_thread():
        yield Looking.at()


def flow(looking, client):
    """|gradient|^2 of a client's tempered loss, as a function of the weights."""
    loss = of_client(looking, client, temperature=3.0)
    return lambda flat: gradient(loss, flat).square().sum()


def test_the_score_is_half_of_what_the_flow_of_the_gradient_gains_by_each_weight(looking):
    answers, _, _ = looking.ask(HALF, looking.server)
    origin = looking.server.params.flat.double()
    for client, answer in enumerate(answers):
        gained = torch.tensor([along(flow(looking, client), origin, at) for at in range(len(origin))])
        assert float((2 * answer["scores"].flat - gained).norm() / gained.norm()) < 1e-3
        assert answer.parts["scores"].weight == looking.sizes[client]
    assert (answers[0]["scores"].flat < 0).any()
    assert (answers[0]["scores"].flat > 0).any()


def test_what_is_cut_is_what_the_flow_loses_least_by(looking):
    """The sign: to take a little off all that is cut raises the flow, against the same off all that is kept."""
    policy = replace(HALF, scores="server")
    server, done = policy.init_server(looking.server, looking.ctx(0))
    assert done is True
    origin, names = looking.server.params.flat.double(), looking.ctx(0).prunable
    prunable = torch.zeros(len(origin), dtype=torch.bool)
    for name in names:
        prunable[looking.engine.params_layout.spans[name]] = True
    assert int((server.mask.flat & prunable).sum()) == round(0.5 * 45)
    change = {}
    for what, chosen in (("cut", ~server.mask.flat), ("kept", server.mask.flat & prunable)):
        less = torch.where(chosen, origin * (1 - 1e-4), origin)
        change[what] = float(flow(looking, None)(less) - flow(looking, None)(origin))
    assert change["cut"] > 0 > change["kept"]
    each = torch.tensor([along(flow(looking, None), origin, at) for at in range(len(origin))])
    assert each[server.mask.flat & prunable].min() >= each[~server.mask.flat].max()


def test_with_nothing_removed_the_flow_is_that_of_the_dense_model(looking):
    _, server, _ = looking.ask(replace(HALF, sparsity=0.0), looking.server)
    assert bool(server.mask.flat.all())
    assert torch.equal(server.params.flat, looking.server.params.flat)


def test_the_mean_is_by_examples_and_its_sign_counts_by_hand(world):
    layout = Layout(("a", "free", "b"), ((2,), (1,), (3,)))
    sums = Sums()
    for weight, values in ((3.0, [2.0, -9.0, 0.0, -1.0, 0.5, 2.0]), (1.0, [-2.0, -9.0, 0.0, 5.0, 0.5, -8.0])):
        sums.add(Message(parts={"scores": Part(value=Tree(layout, torch.tensor(values)), weight=weight)}))
    # Means: 1, -9, -, 0.5, 0.5, -0.5; the largest magnitude goes first.
    server = Server(params=Tree(layout, torch.ones(6)), buffers=Tree.zeros(Layout((), ())))
    ctx = replace(world.ctx(1), prunable=("a", "b"))
    policy = GraSP(sparsity=0.4)
    server, _ = policy.learn(policy.exchanges(False, ctx)[0], server, sums, False, ctx)
    assert server.mask.flat.tolist() == [True, False, True, True, True, False]


def test_the_batch_has_so_many_of_each_class_and_the_loss_its_temperature(looking):
    asked = []

    def probe(params, buffers, mask, **options):
        asked.append(options)
        return {}, {"hvp": params}

    ctx = replace(looking.ctx(1, 0), probe=probe)
    policy = GraSP(sparsity=0.5, per_class=7, temperature=11.0)
    (exchange,) = policy.exchanges(False, ctx)
    assert exchange.name == "grasp"
    answer = policy.answer(exchange, Message(), None, ctx)
    assert torch.equal(answer["scores"].flat, sensitivity(ctx.origin, ctx.origin).flat)
    (options,) = asked
    assert options["wants"] == {"hvp"}
    assert (options["per_class"], options["batch_size"]) == (7, None)
    assert options["loss"].temperature == 11.0


def test_batch_and_temperature_are_read(looking):
    scores = [
        looking.ask(policy, looking.server)[0][0]["scores"].flat
        for policy in (HALF, replace(HALF, per_class=2), replace(HALF, temperature=1.0))
    ]
    assert not torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_where_nobody_could_be_asked_the_next_round_asks_again(looking):
    server, memory = nobody(HALF, looking)
    assert server.mask is None
    assert len(HALF.exchanges(memory, looking.ctx(2))) == 1


def test_the_file_is_complete_and_accepted_from_ten_rounds_on():
    check_file("grasp")


def test_a_task_without_classes_or_logits_is_refused():
    facts(GraSP(sparsity=0.5, per_class=None), objective="next_token")
    facts(GraSP(sparsity=0.5, per_class=None, temperature=1.0), objective="regression")
    facts(GraSP(sparsity=0.5), objective="classification")
    with pytest.raises(ConfigError) as caught:
        facts(GraSP(sparsity=0.5), objective="next_token")
    assert str(caught.value) == (
        "pruner.per_class is 25; the objective of these data is next_token, which has no classes to take as many of "
        "each: set pruner.per_class=null"
    )
    with pytest.raises(ConfigError) as caught:
        facts(GraSP(sparsity=0.5, per_class=None), objective="regression")
    assert str(caught.value) == (
        "pruner.temperature is 200; these data are for regression, where there are no logits to divide: set "
        "pruner.temperature=1"
    )
    with pytest.raises(ConfigError, match=r"pruner\.scores is 'server'; the server scores on public data"):
        facts(GraSP(sparsity=0.5, scores="server"))


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("sparsity", 1.0, "it is 0 to below 1; 0.9 keeps 1 in 10"),
        ("scores", "public", "choose clients or server"),
        ("clients", "some", "choose all or cohort"),
        ("per_class", 0, "it is a number of examples, at least 1, or null for all"),
        ("temperature", 0.0, "it must be above 0; 1 leaves the logits as they are"),
        ("budget", "all", "choose prunable_weights or all_parameters"),
        ("rounding", "up", "choose nearest or floor"),
    ],
)
def test_a_bad_value_is_refused_in_one_sentence(field, value, rule):
    with pytest.raises(FieldError) as caught:
        GraSP(**{"sparsity": 0.5, field: value})
    assert str(caught.value) == f"{field} is {value!r}; {rule}"
