"""Training the physically smaller model is the masked fit; submodels, distillation and scaler are what they say."""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from test_engine_laws import KEY, OPTIMS, RATES, batches, fit
from torch import nn

from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.models import GPT, MLP, BatchNormCNN, LeNet, ResNet, Task
from fedray.models.structure import find_structure
from fedray.models.task import NextToken, Regression, trainable
from fedray.round import Job, Loss, Optim
from fedray.train import Engine, Samples
from fedray.train.shrink import hidden_tensors
from fedray.tree import Mask, Tree, equal, put, restrict, take

VOCABULARY = 9
CLASSES = 4
BUILDS = {
    "mlp": (partial(MLP, shape=(6,), num_classes=CLASSES, hidden=(8, 6)), (6,)),
    "lenet": (partial(LeNet, shape=(1, 16, 16), num_classes=CLASSES), (1, 16, 16)),
    "batchnorm_cnn": (partial(BatchNormCNN, shape=(1, 8, 8), num_classes=CLASSES, width=4), (1, 8, 8)),
    "resnet": (
        partial(ResNet, shape=(1, 8, 8), num_classes=CLASSES, blocks=(1, 1), widths=(4, 6), norm="batch"),
        (1, 8, 8),
    ),
    "resnet with groups": (
        partial(ResNet, shape=(1, 8, 8), num_classes=CLASSES, blocks=(1, 1), widths=(4, 6), groups=2),
        (1, 8, 8),
    ),
    "gpt": (partial(GPT, shape=(5,), vocabulary=VOCABULARY, width=12, layers=2, heads=3), (5,)),
}


def engine(name, kind="eager", kept=(), objective=None, with_structure=True):
    build, shape = BUILDS[name]
    objective = objective or ({"objective": NextToken()} if name == "gpt" else {})
    task = Task(build=build, **objective)
    structure = find_structure(task.module(Key.of(0)), inputs(name, 1)) if with_structure else None
    return Engine(
        task, key=Key.of(0), sample_shape=shape, device="cpu", kind=kind, kept=frozenset(kept), structure=structure,
        vocabulary=VOCABULARY if name == "gpt" else None,
    )  # fmt: skip


@cache
def shared(name, kind):
    """An engine that several tests use, for a recording takes seconds."""
    return engine(name, kind)


def inputs(name, count):
    if name == "gpt":
        return (torch.arange(count * 5) * 7 % VOCABULARY).view(count, 5)
    return torch.randn(count, *BUILDS[name][1], generator=Key.of(1).torch())


def samples(name, count=11):
    x = inputs(name, count)
    random = Key.of(2).numpy()
    y = torch.from_numpy(
        random.integers(0, VOCABULARY if name == "gpt" else CLASSES, x.shape if name == "gpt" else count)
    )
    return Samples(x, y, torch.arange(count), torch.tensor([0.0]), torch.tensor([1.0]), 1.0, tokens=name == "gpt")


def draw(layout, *names):
    return Tree(layout, torch.randn(layout.size, generator=Key.of(4).fold(*names).torch()))


def job(mine, *, optim=None, num_steps=7, batch_size=4, **changes):
    params, buffers, local, local_buffers = mine.origin()
    given = Job(
        params=params, buffers=buffers, mask=None, num_steps=num_steps, batch_size=batch_size,
        lr=RATES[(optim or Optim()).name], optim=optim or Optim(), local=local, local_buffers=local_buffers,
    )  # fmt: skip
    return replace(given, **changes)


def units(mine, seed=0, fraction=0.5, blocks=False):
    """A mask of about half of the units of each group; with `blocks` the last residual block goes too."""
    kept, random = {}, Key.of(seed).numpy()
    for group in mine.structure.groups:
        if group.kind == "block":
            kept[group.name] = torch.tensor([not (blocks and group is mine.structure.groups[-1])])
            continue
        order = torch.from_numpy(random.permutation(group.size)[: max(1, int(fraction * group.size))])
        kept[group.name] = torch.zeros(group.size, dtype=torch.bool).index_fill(0, order, True)
    return mine.structure.mask(kept)


def prefixes(mine, *rates):
    return tuple(
        mine.structure.mask({g.name: torch.arange(g.size) < max(1, int(rate * g.size)) for g in mine.structure.groups})
        for rate in rates
    )


def same(one, two, start, mask=None):
    """Whether two fits agree to 1e-5 of what training moved, in what the mask keeps."""
    moved = restrict(Tree(start.layout, two.params.flat - start.flat), mask).flat
    return float((one.params.flat - two.params.flat).norm()) <= 1e-5 * float(moved.norm())


# -- shrunk = masked -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("kind", ["eager", "traced"])
def test_a_smaller_model_trains_as_the_masked_one(kind, optim):
    mine = shared("lenet", kind)
    mask = units(mine)
    given = job(mine, optim=OPTIMS[optim], mask=mask)
    masked, small = fit(mine, given, samples("lenet")), fit(mine, replace(given, shrink=True), samples("lenet"))
    assert same(small, masked, given.params, mask)
    assert small.params.flat[~mask.flat].count_nonzero() == 0
    assert small.loss == pytest.approx(masked.loss, rel=1e-5)
    assert (small.mask, small.num_seen, small.num_steps) == (mask, masked.num_seen, masked.num_steps)
    runner = mine._engine_of(mine.structure.slices(mask))
    assert (runner.kind, runner.params_layout.size) == (kind, int(mask.flat.sum()))


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("name", BUILDS)
def test_every_kind_of_unit_goes_from_training(name, blocks):
    mine = engine(name)
    mask = units(mine, blocks=blocks)
    given = job(mine, mask=mask, optim=Optim(momentum=0.9, weight_decay=0.01), lr=0.05)
    data = samples(name)
    masked, small = fit(mine, given, data), fit(mine, replace(given, shrink=True), data)
    assert same(small, masked, given.params, mask)
    assert small.loss == pytest.approx(masked.loss, rel=1e-5)
    assert next(iter(mine._smaller.values())).params_layout.size == int(mask.flat.sum())


@pytest.mark.parametrize("kind", ["eager", "traced"])
def test_drift_pull_evidence_and_other_losses_shrink_too(kind):
    mine = engine("mlp", kind)
    mask = units(mine)
    layout = mine.params_layout
    for changes in (
        {"drift": draw(layout, "drift"), "wants": frozenset({"grad_sum"})},
        {"prox": 0.4, "anchor": draw(layout, "anchor")},
        {"loss": Loss(smoothing=0.2, zeroed=(1,)), "sharpness": 0.1},
        {"trains": frozenset(layout.names[:3])},
    ):
        given = job(mine, mask=mask, **changes)
        masked, small = fit(mine, given, samples("mlp")), fit(mine, replace(given, shrink=True), samples("mlp"))
        assert same(small, masked, restrict(given.params, mask), mask), changes
        for name, tree in masked.evidence.items():
            wanted = restrict(tree, mask).flat
            assert float((small.evidence[name].flat - wanted).norm()) <= 1e-5 * float(wanted.norm())
            assert small.evidence[name].flat[~mask.flat].count_nonzero() == 0


def test_a_mask_of_single_weights_stays_inside_the_smaller_model():
    mine = engine("mlp")
    mask = units(mine) & Mask(mine.params_layout, draw(mine.params_layout, "single").flat > -0.5)
    given = job(mine, mask=mask, optim=Optim(momentum=0.9))
    masked, small = fit(mine, given, samples("mlp")), fit(mine, replace(given, shrink=True), samples("mlp"))
    assert same(small, masked, given.params, mask)
    assert small.params.flat[~mask.flat].count_nonzero() == 0
    (runner,) = mine._smaller.values()
    assert int(mask.flat.sum()) < runner.params_layout.size < mine.params_layout.size


def test_statistics_of_units_that_go_stay_as_they_were_received():
    mine = engine("batchnorm_cnn")
    mask = units(mine)
    buffers = Tree(mine.buffers_layout, draw(mine.buffers_layout, "statistics").flat.abs() + 0.5)
    given = job(mine, mask=mask, buffers=buffers)
    masked, small = (fit(mine, replace(given, shrink=shrink), samples("batchnorm_cnn")) for shrink in (False, True))
    stays = torch.zeros(mine.buffers_layout.size, dtype=torch.bool)
    stays[mine.structure.slices(mask).positions(mine.buffers_layout)] = True
    assert torch.allclose(small.buffers.flat[stays], masked.buffers.flat[stays], rtol=1e-5, atol=1e-6)
    assert (small.buffers.flat[stays] != buffers.flat[stays]).all()
    assert torch.equal(small.buffers.flat[~stays], buffers.flat[~stays])


@pytest.mark.parametrize("kind", ["eager", "traced"])
def test_with_nothing_to_cut_whole_the_fit_is_the_plain_one_bit_for_bit(kind):
    mine = engine("mlp", kind)
    single = Mask(mine.params_layout, draw(mine.params_layout, "single").flat > -0.5)
    for mask in (None, Mask.full(mine.params_layout), single):
        given = job(mine, mask=mask)
        plain, small = fit(mine, given, samples("mlp")), fit(mine, replace(given, shrink=True), samples("mlp"))
        assert equal(plain.params, small.params)
        assert plain.loss == small.loss
    assert not mine._smaller


def test_other_units_of_the_same_shapes_share_an_engine_and_not_their_weights():
    mine, data = engine("mlp"), samples("mlp")
    for seed in range(3):
        given = job(mine, mask=units(mine, seed))
        assert same(fit(mine, replace(given, shrink=True), data), fit(mine, given, data), given.params, given.mask)
    assert len(mine._smaller) == 1


def test_a_fit_does_not_depend_on_the_fits_before():
    data = samples("batchnorm_cnn")
    fresh, used = engine("batchnorm_cnn"), engine("batchnorm_cnn")
    for seed in (3, 4):
        fit(used, job(used, mask=units(used, seed, 0.25), shrink=True, scaler=0.25), data)
        fit(used, job(used), data)
    given = job(fresh, mask=units(fresh), shrink=True, optim=Optim(momentum=0.9))
    one, two = fit(fresh, given, data), fit(used, given, data)
    assert equal(one.params, two.params)
    assert equal(one.buffers, two.buffers)


def test_a_smaller_model_is_recorded_alike_after_a_job_that_went_astray():
    data, clean, astray = samples("mlp"), engine("mlp", "traced"), engine("mlp", "traced")
    assert not fit(astray, job(astray, lr=1e30), data).params.flat.isfinite().all()
    given = job(clean, mask=units(clean), shrink=True)
    one, two = fit(clean, given, data), fit(astray, given, data)
    assert equal(one.params, two.params)
    assert [small.kind for small in astray._smaller.values()] == ["traced"]
    assert [small._step is astray._step for small in astray._smaller.values()] == [True]


def test_only_so_many_smaller_models_are_kept(monkeypatch):
    monkeypatch.setattr("fedray.train.engine.SMALLER_KEPT", 2)
    mine, data = engine("mlp"), samples("mlp")
    for fraction in (0.2, 0.4, 0.6, 0.8):
        given = job(mine, mask=units(mine, fraction=fraction), num_steps=2)
        assert same(fit(mine, replace(given, shrink=True), data), fit(mine, given, data), given.params, given.mask)
    assert len(mine._smaller) == 2


def test_a_smaller_model_replays_the_recording_of_the_whole_one(monkeypatch):
    mine = shared("lenet", "traced")

    def no_recording(*_):
        raise AssertionError("recorded again")

    monkeypatch.setattr("fedray.train.engine.TracedStep", no_recording)
    mine._smaller.clear()
    given, data = job(mine, mask=units(mine)), samples("lenet")
    assert same(fit(mine, replace(given, shrink=True), data), fit(mine, given, data), given.params, given.mask)
    assert [small._step for small in mine._smaller.values()] == [mine._step]


@pytest.mark.parametrize(
    "kept",
    [
        ("fc.weight", "fc.bias"),
        ("norm1.weight", "norm1.bias", "norm1.running_mean", "norm1.running_var"),
    ],
    ids=["head", "norm"],
)
def test_what_stays_with_clients_is_not_cut(kept):
    mine, whole, data = engine("batchnorm_cnn", kept=kept), engine("batchnorm_cnn"), samples("batchnorm_cnn")
    full = units(whole)
    mask = Mask.of(mine.origin().params.layout, {n: full[n] for n in mine.origin().params.layout.names})
    given = job(mine, mask=mask, optim=Optim(momentum=0.9, weight_decay=0.1), prox=0.2)
    masked, small = fit(mine, given, data), fit(mine, replace(given, shrink=True), data)
    assert same(small, masked, given.params, mask)
    assert torch.allclose(small.local.flat, masked.local.flat, rtol=1e-4, atol=1e-6)
    assert not torch.equal(small.local.flat, given.local.flat)
    assert len(mine._smaller) == 1  # units that the kept tensors have no part in are gone
    assert small.params.layout == given.params.layout
    assert small.local_buffers.layout == given.local_buffers.layout


def test_a_job_on_a_smaller_model_needs_the_structure():
    mine = engine("mlp", with_structure=False)
    with pytest.raises(ConfigError, match="no policy of this run cuts structures"):
        fit(mine, job(mine, shrink=True, mask=Mask.full(mine.params_layout)), samples("mlp"))


# -- scaler ----------------------------------------------------------------------------------------------------------


class Divided(nn.Module):
    """A module whose linear and convolutional layers, but the last, are followed by an explicit division."""

    def __init__(self, module, scaler):
        super().__init__()
        self.inner, self.scaler = module, scaler
        layers = [child for child in module.modules() if isinstance(child, nn.Linear | nn.Conv2d)]
        for layer in layers[:-1]:
            layer.register_forward_hook(lambda layer, _, out: out / scaler if layer.training else out)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("name", "kind"), [("mlp", "eager"), ("mlp", "traced"), ("lenet", "eager"), ("batchnorm_cnn", "eager")]
)
def test_the_scaler_divides_hidden_outputs_in_training(name, kind):
    mine, data = engine(name, kind), samples(name)
    given = job(mine, scaler=0.3, lr=0.05)
    done = fit(mine, given, data)
    module = Divided(mine.task.module(Key.of(0)), 0.3).train()
    for x, y in batches(data, given.num_steps, given.batch_size):
        module.zero_grad()
        F.cross_entropy(module(x), y).backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.sub_(given.lr * parameter.grad)
    wanted = torch.cat([p.detach().flatten() for p in trainable(module).values()])
    moved = float((wanted - given.params.flat).norm())
    assert float((done.params.flat - wanted).norm()) <= 1e-5 * moved
    if mine.has_buffers:
        statistics = dict(module.inner.named_buffers())
        assert all(torch.allclose(tree, statistics[n], rtol=1e-4, atol=1e-6) for n, tree in done.buffers.items())
    plain = fit(mine, replace(given, scaler=1.0), data)
    if name != "batchnorm_cnn":  # where the normalisation undoes it, but for its statistics
        assert float((plain.params.flat - wanted).norm()) > 1e-2 * moved
    # And it leaves nothing behind: a plain fit is that of an engine that never saw a scaler.
    assert equal(plain.params, fit(engine(name, kind), replace(given, scaler=1.0), data).params)


@pytest.mark.parametrize("kind", ["eager", "traced"])
def test_a_scaled_smaller_model_trains_as_the_scaled_masked_one(kind):
    mine, data = shared("lenet", kind), samples("lenet")
    given = job(mine, mask=units(mine), scaler=0.5, optim=Optim(momentum=0.9, clip_norm=1.0))
    assert same(fit(mine, replace(given, shrink=True), data), fit(mine, given, data), given.params, given.mask)


def test_a_scaler_refuses_what_it_cannot_divide():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    assert hidden_tensors(module) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    module[0].weight.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"0\.weight is constant or shared"):
        hidden_tensors(module)
    module[0].weight = module[1].weight
    with pytest.raises(ConfigError, match="constant or shared"):
        hidden_tensors(module)


# -- submodels -------------------------------------------------------------------------------------------------------


def drawn(step, count):
    return int(KEY.fold("submodel", step).numpy().integers(count))


def reference(mine, given, data):
    """Plain torch on the masked model: a mask drawn for each step, SGD with momentum within it."""
    module = mine.task.module(Key.of(0)).train()
    names, masks = list(trainable(module)), given.submodels
    velocity = {name: torch.zeros_like(p) for name, p in trainable(module).items()}
    total = seen = 0.0
    for step, (x, y) in enumerate(batches(data, given.num_steps, given.batch_size)):
        part = masks[drawn(step, len(masks))]
        teaches = given.distils and part is not masks[-1]

        def outputs(mask, x=x):
            weights = {name: p * mask[name] for name, p in trainable(module).items()}
            return torch.func.functional_call(module, weights, (x,))

        if teaches:
            teacher = outputs(masks[-1])
            soft = F.cross_entropy(outputs(part), teacher.detach().softmax(1))
            loss, moving = F.cross_entropy(teacher, y) + soft, masks[-1]
        else:
            loss, moving = F.cross_entropy(outputs(part), y), part
        total, seen = total + float(loss.detach()) * len(y), seen + len(y)
        grads = torch.autograd.grad(loss, list(trainable(module).values()))
        with torch.no_grad():
            for name, parameter, grad in zip(names, trainable(module).values(), grads, strict=True):
                inside, decay = moving[name], given.optim.weight_decay
                own = given.optim.momentum * velocity[name] + grad + decay * parameter
                velocity[name] = torch.where(inside, own, velocity[name])
                parameter.copy_(torch.where(inside, parameter - given.lr * velocity[name], parameter))
    return torch.cat([p.detach().flatten() for p in trainable(module).values()]), total / seen


STEPS = 20


@pytest.mark.parametrize("distils", [False, True])
@pytest.mark.parametrize("optim", [Optim(), Optim(momentum=0.8, weight_decay=0.05)], ids=["sgd", "momentum"])
@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("kind", ["eager", "traced"])
def test_each_step_trains_the_submodel_that_is_drawn_for_it(kind, shrink, optim, distils):
    mine, data = shared("lenet", kind), samples("lenet")
    given = job(
        mine, submodels=prefixes(mine, 0.2, 0.5, 0.8, 1.0), distils=distils, optim=optim, shrink=shrink, lr=0.05,
        num_steps=STEPS,
    )  # fmt: skip
    assert {drawn(step, 4) for step in range(STEPS)} == {0, 1, 2, 3}
    done = fit(mine, given, data)
    wanted, loss = reference(mine, given, data)
    assert float((done.params.flat - wanted).norm()) <= 1e-5 * float((wanted - given.params.flat).norm())
    assert done.loss == pytest.approx(loss, rel=1e-5)
    taught = sum(len(y) for step, (_, y) in enumerate(batches(data, STEPS, 4)) if distils and drawn(step, 4) < 3)
    assert done.num_seen == sum(len(y) for _, y in batches(data, STEPS, 4)) + taught


@pytest.mark.parametrize("distils", [False, True])
@pytest.mark.parametrize("name", ["batchnorm_cnn", "mlp"])
def test_submodels_of_a_narrow_client_stay_within_its_mask(name, distils):
    mine, data = engine(name), samples(name)
    mask, given = prefixes(mine, 0.6)[0], None
    given = job(
        mine, mask=mask, submodels=prefixes(mine, 0.25, 0.6), distils=distils, num_steps=9, scaler=0.6,
        optim=Optim(momentum=0.9, weight_decay=0.1, clip_norm=0.5), prox=0.1, drift=draw(mine.params_layout, "drift"),
        lr=0.05,
    )  # fmt: skip
    masked, small = fit(mine, given, data), fit(mine, replace(given, shrink=True), data)
    assert same(small, masked, given.params, mask)
    assert small.params.flat[~mask.flat].count_nonzero() == 0
    stays = mine.structure.slices(mask).positions(mine.buffers_layout)
    assert torch.allclose(small.buffers.flat[stays], masked.buffers.flat[stays], rtol=1e-4, atol=1e-6)


class Residual(nn.Module):
    """A block that says itself what goes with it, between two linear layers."""

    class Block(nn.Module):
        residual_branch = ("up", "down")

        def __init__(self):
            super().__init__()
            self.up, self.down, self.skipped = nn.Linear(6, 9), nn.Linear(9, 6), False

        def forward(self, x):
            return x if self.skipped else x + self.down(F.relu(self.up(x)))

    def __init__(self):
        super().__init__()
        self.first, self.block, self.last = nn.Linear(5, 6), self.Block(), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.last(F.relu(self.block(self.first(x))))


@pytest.mark.parametrize("kind", ["eager", "traced"])
def test_a_block_of_ones_own_is_skipped_in_a_recording_of_its_own(kind):
    task, data = Task(build=Residual), samples("mlp")
    data = replace(data, x=data.x[:, :5])
    structure = find_structure(task.module(Key.of(0)), data.x[:1])
    mine = Engine(task, key=Key.of(0), sample_shape=(5,), device="cpu", kind=kind, structure=structure)
    assert [(g.name, g.kind, g.size) for g in structure.groups] == [
        ("first", "neuron", 6), ("block.up", "neuron", 9), ("block", "block", 1),
    ]  # fmt: skip
    given = job(mine, mask=structure.mask({"block": torch.tensor([False])}), optim=Optim(momentum=0.9))
    assert same(fit(mine, replace(given, shrink=True), data), fit(mine, given, data), given.params, given.mask)
    (runner,) = mine._smaller.values()
    assert (runner.params_layout.names, runner.kind) == (
        ("first.weight", "first.bias", "last.weight", "last.bias"),
        kind,
    )


def test_evidence_of_submodels_is_summed_up_where_they_are():
    mine, data = engine("mlp"), samples("mlp")
    given = job(mine, submodels=prefixes(mine, 0.3, 0.6, 1.0), wants=frozenset({"grad_sum"}), num_steps=STEPS)
    masked, small = fit(mine, given, data), fit(mine, replace(given, shrink=True), data)
    wanted = masked.evidence["grad_sum"].flat
    assert torch.allclose(small.evidence["grad_sum"].flat, wanted, rtol=1e-4, atol=1e-6)
    assert torch.allclose(small.params.flat, given.params.flat - given.lr * wanted, atol=1e-5)


@pytest.mark.parametrize("optim", ["adam with decay", "everything"])
def test_moments_of_submodels_are_those_of_the_whole_model(optim):
    mine, data = engine("lenet"), samples("lenet")
    given = job(mine, submodels=prefixes(mine, 0.3, 0.6, 1.0), optim=OPTIMS[optim], num_steps=STEPS, prox=0.3)
    assert same(fit(mine, replace(given, shrink=True), data), fit(mine, given, data), given.params)


@pytest.mark.parametrize("shrink", [False, True])
def test_a_step_moves_nothing_outside_its_submodel(shrink):
    mine, data = engine("batchnorm_cnn"), samples("batchnorm_cnn")
    (part,) = prefixes(mine, 0.5)
    given = job(
        mine, submodels=(part,), shrink=shrink, optim=Optim(weight_decay=0.1), drift=draw(mine.params_layout, 1)
    )
    done = fit(mine, given, data)
    assert torch.equal(done.params.flat[~part.flat], given.params.flat[~part.flat])
    assert (done.params.flat[part.flat] != given.params.flat[part.flat]).float().mean() > 0.9
    stays = mine.structure.slices(part).positions(mine.buffers_layout)
    rest = torch.ones(mine.buffers_layout.size, dtype=torch.bool).index_fill(0, stays, False)
    assert torch.equal(done.buffers.flat[rest], given.buffers.flat[rest])
    assert not torch.equal(done.buffers.flat[stays], given.buffers.flat[stays])


@pytest.mark.parametrize("shrink", [False, True])
def test_the_whole_model_as_the_only_submodel_is_the_plain_fit(shrink):
    mine, data = engine("mlp"), samples("mlp")
    given = job(mine, optim=Optim(momentum=0.9))
    parts = replace(given, submodels=(Mask.full(mine.params_layout),), shrink=shrink, distils=True)
    assert equal(fit(mine, parts, data).params, fit(mine, given, data).params)


def test_each_submodel_runs_on_a_model_of_its_own_size(monkeypatch):
    mine, data, sizes = engine("mlp"), samples("mlp"), []
    parts = prefixes(mine, 0.25, 0.5, 1.0)
    gradient = Engine.gradient

    def watched(self, *given):
        sizes.append(self.params_layout.size)
        return gradient(self, *given)

    monkeypatch.setattr(Engine, "gradient", watched)
    fit(mine, job(mine, submodels=parts, shrink=True, num_steps=STEPS), data)
    assert sizes == [int(parts[drawn(step, 3)].flat.sum()) for step in range(STEPS)]


def test_submodels_refuse_sharpness_and_distillation_of_numbers():
    mine = engine("mlp")
    with pytest.raises(ConfigError, match="sharpness"):
        fit(mine, job(mine, submodels=prefixes(mine, 0.5, 1.0), sharpness=0.1), samples("mlp"))
    mine = engine("mlp", objective={"objective": Regression()})
    with pytest.raises(ConfigError, match="regression"):
        fit(mine, job(mine, submodels=prefixes(mine, 0.5, 1.0), distils=True), samples("mlp"))


def test_submodels_of_a_model_in_two_parts_are_those_of_the_whole():
    kept = ("layers.5.weight", "layers.5.bias")
    mine, whole, data = engine("mlp", kept=kept), engine("mlp"), samples("mlp")
    layout = mine.origin().params.layout
    parts = tuple(Mask.of(layout, {n: part[n] for n in layout.names}) for part in prefixes(whole, 0.5, 1.0))
    given = job(mine, submodels=parts, shrink=True)
    done = fit(mine, given, data)
    full = tuple(Mask.of(whole.params_layout, {n: part[n] for n in layout.names}) for part in parts)
    other = fit(whole, job(whole, submodels=full), data).params
    together = put(put(other, done.params), done.local)
    assert float((together.flat - other.flat).abs().max()) < 1e-6
    assert equal(take(done.params, layout.names), done.params)
