"""Evidence without training: curvature by finite differences, class-balanced batches, the flow without data."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from laws_support import CLASSES, distance
from test_engine_laws import KEY, engine, half, samples, view
from torch import nn

from fedray.errors import ConfigError, NumericError
from fedray.keys import Key
from fedray.models import Task
from fedray.models.task import OBJECTIVES
from fedray.round import Loss
from fedray.train import Engine
from fedray.train import engine as engine_module
from fedray.train.evidence import chosen
from fedray.tree import Mask, Tree, equal

HVP, BOTH = frozenset({"hvp"}), frozenset({"grad", "hvp"})
KINDS = [("mlp", "eager"), ("mlp", "traced"), ("lenet", "eager"), ("lenet", "traced"), ("batchnorm_cnn", "eager")]


@pytest.fixture(scope="module")
def engines():
    made = {}

    def get(model, kind):
        if (model, kind) not in made:
            made[model, kind] = engine(model, kind=kind)
        return made[model, kind]

    return get


def loaded(engine, params, buffers, mask=None):
    """The module in float64 and plain memory, at these weights."""
    module = copy.deepcopy(engine.module).to(memory_format=torch.contiguous_format).double()
    for name, parameter in module.named_parameters():
        kept = 1.0 if mask is None else mask[name]
        parameter.data = (params[name] * kept).double()
        parameter.grad = None
    for name, buffer in buffers.items():
        dict(module.named_buffers())[name].copy_(buffer)
    return module.train()


def gradient(module, x, y, loss=Loss()):  # noqa: B008
    value = F.cross_entropy(module(x.double()) / loss.temperature, y, label_smoothing=loss.smoothing)
    return torch.autograd.grad(value, list(module.parameters()))


def by_differences(module, x, y, mask, loss=Loss()):  # noqa: B008
    """H v with v = m g, as the central difference of gradients along v, in float64."""
    vector = [g * k for g, k in zip(gradient(module, x, y, loss), (k for _, k in mask.items()), strict=True)]
    step = 1e-5 / math.sqrt(sum(float(v.square().sum()) for v in vector))
    ends = []
    for sign in (1, -1):
        there = copy.deepcopy(module)
        for parameter, v in zip(there.parameters(), vector, strict=True):
            parameter.data += sign * step * v
        ends.append(torch.cat([g.reshape(-1) for g in gradient(there, x, y, loss)]))
    return (ends[0] - ends[1]) / (2 * step)


def relative(a, b):
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("loss", [None, Loss(temperature=3.0), Loss(smoothing=0.2)], ids=str)
@pytest.mark.parametrize(("model", "kind"), KINDS)
def test_the_hessian_times_the_gradient_of_what_is_kept_is_that_of_finite_differences(engines, model, kind, loss):
    mine, data = engines(model, kind), samples(model)
    mask, (params, buffers) = half(mine.params_layout), mine.origin()[:2]
    seen, evidence = mine.probe(view(params, buffers, mask), data, KEY, wants=BOTH, batch_size=8, loss=loss)
    x, y = data.take(KEY.fold("probe").permutation(11)[:8], torch.device("cpu"))
    module = loaded(mine, params, buffers, mask)
    expected = by_differences(module, x, y, mask, loss or Loss())
    # Float32 against float64; with all coordinates in the vector the error would be of the order of 1.
    assert relative(evidence["hvp"].flat, expected) < 2e-4
    assert evidence["hvp"].flat[~mask.flat].count_nonzero() > 0
    assert (
        relative(evidence["grad"].flat, torch.cat([g.reshape(-1) for g in gradient(module, x, y, loss or Loss())]))
        < 1e-4
    )
    alone, without = mine.probe(view(params, buffers, mask), data, KEY, wants=HVP, batch_size=8, loss=loss)
    assert (alone, set(without)) == (seen, {"hvp"})


def test_the_curvature_in_chunks_is_that_of_the_mean_loss_at_once(engines, monkeypatch):
    mine = engines("mlp", "eager")
    point = view(*mine.origin()[:2], half(mine.params_layout))
    whole = mine.probe(point, samples(), KEY, wants=HVP, batch_size=None)[1]["hvp"]
    monkeypatch.setattr(engine_module, "PROBE_CHUNK", 4)  # 4, 4 and 3: each with a gradient of its own would differ
    chunked = mine.probe(point, samples(), KEY, wants=HVP, batch_size=None)[1]["hvp"]
    assert relative(chunked.flat, whole.flat.double()) < 1e-5


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.drop, self.out = nn.Linear(6, 40), nn.Dropout(0.5), nn.Linear(40, CLASSES)

    def forward(self, x):
        return self.out(self.drop(self.fc(x).tanh()))


@pytest.mark.parametrize("kind", ["eager", "traced"])
def test_both_passes_of_the_curvature_drop_the_same_units(kind):
    mine = engine(made=(Task(build=Dropping), (6,)), kind=kind)
    params, buffers = mine.origin()[:2]
    state = torch.get_rng_state()
    _, evidence = mine.probe(view(params, buffers), samples(count=1), KEY, wants=BOTH, batch_size=None)
    assert torch.equal(torch.get_rng_state(), state)
    # The one example does not reach a unit that is dropped: it has neither gradient nor curvature.
    idle = evidence["grad"]["out.weight"].abs().sum(0) == 0
    assert 5 < int(idle.sum()) < 35
    assert torch.equal(evidence["hvp"]["out.weight"].abs().sum(0) == 0, idle)


def test_a_look_at_the_curvature_leaves_nothing_behind(engines):
    for model, kind in KINDS:
        mine = engines(model, kind)
        point = view(*mine.origin()[:2])
        ask = {"wants": frozenset({"grad"}), "batch_size": None}
        before = mine.probe(point, samples(model), KEY, **ask)[1]["grad"]
        mine.probe(point, samples(model, offset=12), KEY, wants=HVP, batch_size=None)
        assert equal(mine.probe(point, samples(model), KEY, **ask)[1]["grad"], before)
        assert not any(p.grad is None for p in mine.module.parameters())


class Attending(nn.Module):
    """Fused attention has no second derivative on a CPU."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 12), nn.Linear(4, CLASSES)

    def forward(self, x):
        q, k, v = self.qkv(x.unsqueeze(1).repeat(1, 3, 1)).unsqueeze(1).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(_, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(_, grad):
        return grad * 2


def test_the_curvature_of_attention_is_that_of_finite_differences():
    mine, data = engine(made=(Task(build=Attending), (6,))), samples()
    mask, (params, buffers) = Mask.full(mine.params_layout), mine.origin()[:2]
    found = mine.probe(view(params, buffers), data, KEY, wants=HVP, batch_size=None)[1]["hvp"]
    x, y = data.take(slice(0, 11), torch.device("cpu"))
    assert relative(found.flat, by_differences(loaded(mine, params, buffers), x, y, mask)) < 1e-3


# -- batches by class ------------------------------------------------------------------------------------------------


def test_a_batch_by_class_has_so_many_of_each_and_all_of_a_class_that_has_fewer():
    targets = torch.tensor([0] * 10 + [1] * 2 + [2] * 6)
    rows = chosen(targets, KEY, batch_size=1, per_class=3)
    assert targets[rows].bincount().tolist() == [3, 2, 3]
    assert len(set(rows.tolist())) == 8
    order = KEY.permutation(18).tolist()
    assert [order.index(row) for row in rows.tolist()] == sorted(order.index(row) for row in rows.tolist())
    others = chosen(targets, Key.of(99), batch_size=None, per_class=3)
    assert set(rows.tolist()) != set(others.tolist())
    assert set(chosen(targets, KEY, batch_size=None, per_class=99).tolist()) == set(range(18))


def test_a_probe_by_class_looks_at_those_examples_alone(engines):
    mine, data = engines("mlp", "traced"), samples(count=30)
    point = view(*mine.origin()[:2])
    seen, evidence = mine.probe(point, data, KEY, wants=frozenset({"grad"}), batch_size=4, per_class=2)
    rows = chosen(data.y[data.index], KEY.fold("probe"), batch_size=None, per_class=2)
    assert len(rows) == 2 * CLASSES
    x, y = data.take(rows, torch.device("cpu"))
    module = loaded(mine, *mine.origin()[:2])
    expected = torch.cat([g.reshape(-1) for g in gradient(module, x, y)])
    assert relative(evidence["grad"].flat, expected) < 1e-5
    assert seen["loss"] == pytest.approx(F.cross_entropy(module(x.double()), y).item(), rel=1e-5)


@pytest.mark.parametrize("targets", [torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4)])
def test_a_batch_by_class_of_targets_that_are_no_classes_is_refused(targets):
    with pytest.raises(ConfigError) as caught:
        chosen(targets, KEY, batch_size=None, per_class=5)
    assert str(caught.value) == (
        "a batch of 5 examples of each class is wanted, and these data have no classes; take a batch of any "
        "examples, as in pruner.per_class=null"
    )


# -- the flow without data -------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """A network without biases whose activations pass what is positive: its flow is conserved."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.fc = nn.Linear(16, 7, bias=False)
        self.out = nn.Linear(7, CLASSES, bias=False)

    def forward(self, x):
        return self.out(F.relu(self.fc(F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1))))


def chain():
    return engine(made=(Task(build=Chain), (1, 6, 6)))


@pytest.mark.parametrize("cut", [False, True])
def test_the_flow_through_every_layer_sums_to_the_same(cut):
    mine = chain()
    params, buffers = mine.origin()[:2]
    score = mine.flow(params, buffers, half(mine.params_layout, 0.7) if cut else None)
    sums = [float(values.double().sum()) for _, values in score.items()]
    assert min(sums) > 0
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("cut", [False, True])
def test_the_flow_of_a_weight_is_what_the_sum_of_outputs_loses_with_it(cut):
    mine = chain()
    params, buffers = mine.origin()[:2]
    mask = half(mine.params_layout, 0.7) if cut else Mask.full(mine.params_layout)
    score = mine.flow(params, buffers, mask)
    point = (params.flat * mask.flat).double().abs()

    def outputs(flat):
        module = loaded(mine, Tree(params.layout, flat.float()), buffers).eval()
        for name, parameter in module.named_parameters():
            parameter.data = flat[params.layout.spans[name]].view(parameter.shape)
        with torch.no_grad():
            return float(module(torch.ones(1, 1, 6, 6, dtype=torch.float64)).sum())

    lost = torch.zeros(len(point), dtype=torch.float64)
    for at in range(len(point)):
        without = point.clone()
        without[at] *= 1 - 1e-6  # a max-pool may choose another input where much is taken
        lost[at] = (outputs(point) - outputs(without)) / 1e-6
    assert torch.allclose(score.flat.double(), lost / lost.max(), atol=1e-6)
    assert float(score.flat.max()) == 1.0
    assert not score.flat[~mask.flat].any()


@pytest.mark.parametrize("model", ["mlp", "lenet", "batchnorm_cnn"])
@pytest.mark.parametrize("kind", ["eager", "traced"])
def test_the_flow_leaves_signs_statistics_and_the_engine_as_they_were(engines, model, kind):
    if (model, kind) == ("batchnorm_cnn", "traced"):
        return  # statistics cannot be recorded
    mine = engines(model, kind)
    params, buffers = mine.origin()[:2]
    before = params.flat.clone(), buffers.flat.clone()
    ask = {"wants": frozenset({"grad"}), "batch_size": None}
    first = mine.probe(view(params, buffers), samples(model), KEY, **ask)
    score = mine.flow(params, buffers, None)
    assert torch.equal(mine.arrangement.logical(mine.weights), params.flat)
    assert equal(mine._read_buffers(), buffers)
    assert torch.equal(params.flat, before[0])
    assert torch.equal(buffers.flat, before[1])
    assert all(p.dtype == torch.float32 for p in mine.module.parameters())
    assert equal(mine.flow(params, buffers, None), score)
    again = mine.probe(view(params, buffers), samples(model), KEY, **ask)
    assert equal(again[1]["grad"], first[1]["grad"])
    assert score.flat.isfinite().all()
    assert float(score.flat.min()) >= 0.0
    flipped = Tree(params.layout, -params.flat)
    assert distance(mine.flow(flipped, buffers, None), score) == 0.0


class Deep(nn.Module):
    """Thirty layers of 64: the sum of outputs is near 1e50, beyond float32."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(30))
        for layer in self.layers:
            nn.init.constant_(layer.weight, gain)

    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        return x[:, :CLASSES]


def test_a_flow_beyond_float32_is_found_and_one_beyond_float64_is_refused():
    mine = Engine(Task(build=Deep), key=Key.of(0), sample_shape=(64,), device="cpu", kind="eager")
    score = mine.flow(*mine.origin()[:2], None)
    # The last layer has three live rows, so each of its weights carries 64 / 3 as much as one of the others.
    assert float(score["layers.29.weight"][0, 0]) == 1.0
    assert torch.allclose(score["layers.3.weight"], torch.tensor(3 / 64))
    far = Tree(mine.params_layout, mine.origin_params.flat * 1e10)
    with pytest.raises(NumericError, match="is beyond float64: the model is too deep"):
        mine.flow(far, mine.origin_buffers, None)


def test_without_any_way_through_the_flow_is_zero():
    mine = chain()
    params, buffers = mine.origin()[:2]
    score = mine.flow(params, buffers, Mask.of(params.layout, {"fc.weight": torch.zeros(7, 16, dtype=torch.bool)}))
    assert not score.flat.any()


def test_a_model_of_tokens_has_no_flow_without_data():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(9, 4), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.out(self.embed(x).mean(1))

    task = Task(build=Words, objective=OBJECTIVES["classification"])
    mine = Engine(task, key=Key.of(0), sample_shape=(5,), device="cpu", kind="eager", vocabulary=9)
    with pytest.raises(ConfigError) as caught:
        mine.flow(*mine.origin()[:2], None)
    assert str(caught.value) == (
        "the model is Words; it takes tokens, and a flow without data needs an input of ones: take a pruner that "
        "looks at data, such as pruner=snip"
    )


def test_a_model_that_cannot_be_differentiated_twice_is_refused():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(6, 5), nn.Linear(5, CLASSES)

        def forward(self, x):
            return self.out(Once.apply(self.fc(x)))

    mine = engine(made=(Task(build=Fused), (6,)))
    with pytest.raises(ConfigError, match=r"the model is Fused; PyTorch cannot differentiate it twice"):
        mine.probe(view(*mine.origin()[:2]), samples(), KEY, wants=HVP, batch_size=None)
