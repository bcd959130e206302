"""What a job may ask for beyond plain steps: another loss, sharpness, a part that moves, a part that stays at home."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_engine_laws import KEY, batches, distance, engine, fit, flat, half, job, samples, view
from torch import nn

from fedray.keys import Key
from fedray.models import Task
from fedray.models.task import NextToken, Regression
from fedray.round import Loss, Optim
from fedray.train import Samples
from fedray.tree import Tree, equal, put, restrict, take


class Normed(nn.Module):
    """A layer, batch normalisation, a head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.body(x))))


def reference(mine, given, data, gradient):
    """Plain SGD on the same batches with `gradient(module, x, y)`; flat weights."""
    module = mine.task.module(Key.of(0)).train()
    for x, y in batches(data, given.num_steps, given.batch_size):
        grads = gradient(module, x, y)
        with torch.no_grad():
            for parameter, grad in zip(module.parameters(), grads, strict=True):
                parameter.sub_(given.lr * grad)
    return flat(module.parameters())


def plain(module, x, y, **options):
    return torch.autograd.grad(F.cross_entropy(module(x), y, **options), list(module.parameters()))


@pytest.mark.parametrize("kind", ["eager", "traced"])
def test_label_smoothing_and_logit_shifts_are_those_of_cross_entropy(kind):
    mine, shift = engine(kind=kind), (0.5, -1.0, 0.0)
    given = job(mine, num_steps=3, loss=Loss(smoothing=0.2, logit_shift=shift))

    def gradient(module, x, y):
        value = F.cross_entropy(module(x) - torch.tensor(shift), y, label_smoothing=0.2)
        return torch.autograd.grad(value, list(module.parameters()))

    ours = fit(mine, given, samples()).params
    assert distance(ours, reference(mine, given, samples(), gradient)) < 1e-6
    for other in (Loss(smoothing=0.2), Loss(logit_shift=shift), Loss()):
        assert distance(ours, fit(mine, replace(given, loss=other), samples()).params) > 1e-4


@pytest.mark.parametrize("kind", ["eager", "traced"])
def test_sharpness_takes_the_gradient_at_the_top_of_a_ball(kind):
    mine = engine(kind=kind)
    given = job(mine, num_steps=3, sharpness=0.3)

    def gradient(module, x, y):
        first = plain(module, x, y)
        length = torch.sqrt(sum(g.square().sum() for g in first))
        with torch.no_grad():
            for parameter, grad in zip(module.parameters(), first, strict=True):
                parameter.add_(0.3 * grad / length)
        second = plain(module, x, y)
        with torch.no_grad():
            for parameter, grad in zip(module.parameters(), first, strict=True):
                parameter.sub_(0.3 * grad / length)
        return second

    ours = fit(mine, given, samples()).params
    assert distance(ours, reference(mine, given, samples(), gradient)) < 1e-5
    assert distance(ours, fit(mine, replace(given, sharpness=0.0), samples()).params) > 1e-4


def test_sharpness_climbs_inside_the_mask_and_counts_each_batch_once_in_the_statistics():
    mine = engine(made=(Task(build=Normed), (6,)))
    mask = half(mine.params_layout)
    given = job(mine, mask=mask, num_steps=1, batch_size=11, sharpness=0.3)
    sharp, flat_ = fit(mine, given, samples()), fit(mine, replace(given, sharpness=0.0), samples())
    assert sharp.params.flat[~mask.flat].count_nonzero() == 0
    assert equal(sharp.buffers, flat_.buffers)  # after one batch they are those of the batch at w, whatever rho is
    assert not equal(sharp.params, flat_.params)


@pytest.mark.parametrize(
    "optim", [Optim(), Optim(momentum=0.9, weight_decay=0.1), Optim(name="adamw", weight_decay=0.1)]
)
def test_only_the_named_tensors_move(optim):
    mine = engine()
    names = frozenset(mine.params_layout.names[-2:])
    given = job(mine, num_steps=4, optim=optim, trains=names)
    done = fit(mine, given, samples()).params
    for name, before in given.params.items():
        assert torch.equal(done[name], before) == (name not in names)
    everything = fit(mine, replace(given, trains=frozenset(mine.params_layout.names)), samples()).params
    assert equal(everything, fit(mine, replace(given, trains=None), samples()).params)


def test_the_pull_leads_to_the_anchor_and_to_the_start_without_one():
    mine = engine()
    given = job(mine, num_steps=1, batch_size=11, lr=0.1, prox=0.5)
    anchor = Tree(given.params.layout, given.params.flat + 2.0)
    still = fit(mine, given, samples()).params  # the first step has nothing to be pulled back from
    pulled = fit(mine, replace(given, anchor=anchor), samples()).params
    assert distance(pulled, still.flat + 0.1 * 0.5 * 2.0) < 1e-6
    assert equal(fit(mine, replace(given, anchor=given.params), samples()).params, still)


# -- what stays at clients -------------------------------------------------------------------------------------------


def kept_engine(kept):
    from fedray.train import Engine

    return Engine(
        Task(build=Normed), key=Key.of(0), sample_shape=(6,), device="cpu", kind="eager", kept=frozenset(kept)
    )


KEPT = ("head.weight", "head.bias", "norm.running_mean", "norm.running_var")


@pytest.mark.parametrize("extra", [{}, {"prox": 0.3}, {"sharpness": 0.1}], ids=str)
def test_a_model_in_two_parts_trains_as_the_whole(extra):
    whole, split = engine(made=(Task(build=Normed), (6,))), kept_engine(KEPT)
    one = fit(
        whole, job(whole, num_steps=3, optim=Optim(momentum=0.9), **({} if "prox" in extra else extra)), samples()
    )
    params, buffers, local, local_buffers = split.origin()
    assert set(params.layout.names) | set(local.layout.names) == set(whole.params_layout.names)
    assert (set(params.layout.names) | set(buffers.layout.names)).isdisjoint(KEPT)
    given = job(split, num_steps=3, optim=Optim(momentum=0.9), local=local, local_buffers=local_buffers, **extra)
    two = fit(split, given, samples())
    assert two.params.layout == params.layout
    assert two.local.layout == local.layout
    assert two.local_buffers.layout == local_buffers.layout
    if "prox" not in extra:
        assert equal(put(put(one.params, two.params), two.local), one.params)
        assert equal(put(put(one.buffers, two.buffers), two.local_buffers), one.buffers)


def test_what_clients_keep_is_pulled_nowhere_and_cut_nowhere():
    split = kept_engine(KEPT)
    params, _, local, local_buffers = split.origin()
    other = Tree(local.layout, local.flat + 1.0)
    common = {"num_steps": 1, "batch_size": 11, "lr": 0.1, "local": other, "local_buffers": local_buffers}
    free = fit(split, job(split, **common), samples())
    anchor = Tree(params.layout, params.flat + 5.0)
    pulled = fit(split, job(split, prox=1.0, anchor=anchor, **common), samples())
    assert equal(pulled.local, free.local)
    assert distance(pulled.params, free.params.flat + 0.5) < 1e-5
    mask = half(params.layout)
    cut = fit(split, job(split, mask=mask, **common), samples())
    assert equal(cut.params, restrict(cut.params, mask))
    assert cut.local.flat.count_nonzero() == cut.local.flat.numel()


def test_a_probe_gradient_is_of_what_the_server_owns_at_the_clients_own_head():
    split = kept_engine(KEPT)
    params, buffers, local, local_buffers = split.origin()
    wants = frozenset({"grad"})
    looks = []
    for shift in (0.0, 1.0):
        seen = replace(
            view(params, buffers), local=Tree(local.layout, local.flat * (1.0 + shift)), local_buffers=local_buffers
        )
        looks.append(split.probe(seen, samples(), KEY, wants=wants, batch_size=None)[1]["grad"])
    assert looks[0].layout == params.layout
    assert distance(*looks) > 1e-4


def test_take_and_put_are_each_others_inverse():
    tree = Tree.of({"a": torch.ones(2), "b": torch.arange(3.0), "c": torch.zeros(1, 2)})
    part = take(tree, ["c", "a"])
    assert part.layout.names == ("a", "c")
    assert equal(put(tree, part), tree)
    moved = put(tree, Tree(part.layout, part.flat + 1))
    assert moved["b"].tolist() == [0.0, 1.0, 2.0]
    assert moved["c"].tolist() == [[1.0, 1.0]]
    assert take(tree, []).flat.numel() == 0


# -- what a batch is made of -----------------------------------------------------------------------------------------


def test_augmentation_changes_what_is_trained_on_and_is_a_function_of_key_and_epoch():
    mine, calls = engine(), []

    def shifted(x, generator):
        noise = torch.randn(x.shape, generator=generator)
        calls.append(noise)
        return x + noise

    data = replace(samples(), augment=shifted)
    given = job(mine, num_steps=6, batch_size=4)  # three steps an epoch
    first = fit(mine, given, data)
    assert len(calls) == 2
    assert not torch.equal(calls[0], calls[1])
    assert equal(fit(mine, given, data).params, first.params)
    assert not equal(fit(mine, given, samples()).params, first.params)
    seen = mine.evaluate(view(given.params, given.buffers), data)
    assert torch.equal(seen["loss"], mine.evaluate(view(given.params, given.buffers), samples())["loss"])


def test_a_skew_is_seen_whenever_samples_are_read_and_goes_by_position():
    data = replace(samples(), skew=lambda x, positions: x + positions.float().view(-1, 1))
    whole, _ = data.take(slice(None), torch.device("cpu"))
    plain_x, _ = samples().take(slice(None), torch.device("cpu"))
    assert torch.allclose(whole - plain_x, torch.arange(11.0).view(-1, 1).expand(11, 6), atol=1e-5)
    some = torch.tensor([7, 2])
    assert torch.equal(data.take(some, torch.device("cpu"))[0], whole[some])
    assert torch.equal(data.take(slice(3, 5), torch.device("cpu"))[0], whole[3:5])


class Tokens(nn.Module):
    def __init__(self, *, vocabulary=5):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 4)
        self.head = nn.Linear(4, vocabulary)

    def forward(self, x):
        return self.head(self.embed(x))


@pytest.mark.parametrize("kind", ["eager", "traced"])
def test_tokens_reach_the_model_as_they_are_and_every_position_is_predicted(kind):
    from fedray.train import Engine

    task = Task(build=Tokens, objective=NextToken())
    mine = Engine(task, key=Key.of(0), sample_shape=(7,), device="cpu", kind=kind, vocabulary=5)
    x = torch.randint(0, 5, (11, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = Samples(
        x[:, :-1].contiguous(), x[:, 1:].long(), torch.arange(11), torch.zeros(1), torch.ones(1), 1.0, tokens=True
    )
    given = job(mine, num_steps=2, batch_size=11)

    def gradient(module, inputs, targets):
        value = F.cross_entropy(module(inputs).flatten(0, 1), targets.flatten())
        return torch.autograd.grad(value, list(module.parameters()))

    assert distance(fit(mine, given, data).params, reference(mine, given, data, gradient)) < 1e-6
    scores = mine.evaluate(view(given.params, given.buffers), data)
    module = task.module(Key.of(0))
    wanted = F.cross_entropy(module(x[:, :-1].long()).transpose(1, 2), x[:, 1:].long()).detach()
    assert float(scores["loss"].mean()) == pytest.approx(float(wanted), rel=1e-5)
    assert task.objective.derive({"loss": 2.0}) == {"perplexity": pytest.approx(7.38905609893065)}


@pytest.mark.parametrize("kind", ["eager", "traced"])
def test_a_regression_minimises_the_mean_squared_error(kind):
    from fedray.train import Engine

    task = Task(build=partial(nn.Linear, 6, 2), objective=Regression())
    mine = Engine(task, key=Key.of(0), sample_shape=(6,), device="cpu", kind=kind)
    data = replace(samples(), y=torch.randn(40, 2, generator=torch.Generator().manual_seed(0)))
    given = job(mine, num_steps=3)

    def gradient(module, x, y):
        return torch.autograd.grad(((module(x) - y) ** 2).mean(), list(module.parameters()))

    assert distance(fit(mine, given, data).params, reference(mine, given, data, gradient)) < 1e-6
    x, y = data.take(slice(None), torch.device("cpu"))
    error = (task.module(Key.of(0))(x) - y).detach()
    scores = mine.evaluate(view(given.params, given.buffers), data)
    assert torch.allclose(scores["mse"], error.square().mean(1), atol=1e-6)
    assert torch.allclose(scores["mae"], error.abs().mean(1), atol=1e-6)


def test_constants_are_no_parameters():
    def build():
        module = Normed()
        module.body.requires_grad_(False)
        return module

    mine = engine(made=(Task(build=build), (6,)))
    assert mine.params_layout.names == ("norm.weight", "norm.bias", "head.weight", "head.bias")
    before = mine.module.body.weight.detach().clone()
    done = fit(mine, job(mine, num_steps=5, optim=Optim(weight_decay=0.1)), samples())
    assert torch.equal(mine.module.body.weight, before)
    assert not equal(done.params, mine.origin().params)


def test_a_part_that_the_constructor_put_into_evaluation_mode_behaves_alike_before_and_after_an_evaluation():
    def build():
        return nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5).eval(), nn.Linear(5, 3))

    mine = engine(made=(Task(build=build), (6,)))
    given = job(mine, num_steps=3)
    before = fit(mine, given, samples()).params
    mine.evaluate(view(given.params, given.buffers), samples())
    assert equal(fit(mine, given, samples()).params, before)


def test_what_stays_still_has_no_part_in_the_norm_that_is_clipped():
    mine = engine()
    names = frozenset(mine.params_layout.names[-2:])
    given = job(mine, num_steps=1, batch_size=11, lr=1.0, trains=names, optim=Optim(clip_norm=0.01))
    done = fit(mine, given, samples()).params
    assert float((done.flat - given.params.flat).norm()) == pytest.approx(0.01, rel=1e-3)


def test_sharpness_takes_two_gradients_of_every_example():
    mine = engine()
    assert [fit(mine, job(mine, num_steps=3, sharpness=s), samples()).num_seen for s in (0.0, 0.1)] == [11, 22]
