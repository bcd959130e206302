"""Which units of a model can be cut whole, and that the model without them computes what the masked one does."""

import copy
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_pruning
from torch import nn

from fedray.costs import forward_flops, masked_flops
from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.models import (
    GPT,
    MLP,
    VGG11,
    BatchNormCNN,
    CharLSTM,
    LeNet,
    Linear,
    McMahanCNN,
    ResNet,
    SmallCNN,
    TransformerClassifier,
)
from fedray.models.structure import find_structure, shrunk
from fedray.models.task import trainable
from fedray.prune.structure import Group, Member, Slices, Structure
from fedray.tree import Layout, Mask, Tree, equal

GREY = {"shape": (1, 16, 16), "num_classes": 10}
COLOUR = {"shape": (3, 32, 32), "num_classes": 10}
TEXT = {"shape": (6,), "vocabulary": 9}
RESNET = partial(ResNet, shape=(3, 16, 16), num_classes=10, blocks=(1, 1), widths=(4, 6), groups=2)
MODELS = {
    "mlp": partial(MLP, **GREY, hidden=(12, 8)),
    "lenet": partial(LeNet, **GREY),
    "small_cnn": partial(SmallCNN, **GREY),
    "mcmahan_cnn": partial(McMahanCNN, **GREY),
    "batchnorm_cnn": partial(BatchNormCNN, **GREY, width=4),
    "vgg11": partial(VGG11, **COLOUR, dropout=0.0),
    "vgg11 with norms": partial(VGG11, **COLOUR, dropout=0.0, norm="batch"),
    "resnet": partial(RESNET, norm="batch"),
    "resnet with padding": partial(RESNET, norm="batch", shortcut="padding"),
    "resnet with groups": partial(RESNET, norm="group"),
    "resnet without norms": partial(RESNET, norm="none"),
    "gpt": partial(GPT, **TEXT, width=12, layers=2, heads=3),
    "transformer_classifier": partial(TransformerClassifier, **TEXT, num_classes=4, width=12, layers=1, heads=3),
}


def fresh(build, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def inputs(module, count=1):
    if hasattr(module, "token"):
        return (torch.arange(count * 6) * 7 % 9).view(count, 6)
    shape = {"VGG11": (3, 32, 32), "ResNet": (3, 16, 16)}.get(type(module).__name__, (1, 16, 16))
    return torch.randn(count, *shape, generator=Key.of(0).torch())


def found(build):
    module = fresh(build)
    return module, find_structure(module, inputs(module))


def trained(module, steps=2):
    """The module after a few steps, so that biases, norms and statistics are no longer zeros and ones."""
    module.train()
    x = inputs(module, 5)
    for _ in range(steps):
        module.zero_grad()
        module(x).square().mean().backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.sub_(0.1 * parameter.grad / (1e-3 + parameter.grad.norm()))
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=Key.of(len(parameter)).torch()))
    return module.eval()


def some(structure, seed=0, blocks=True):
    """About half of the units of each group, drawn; every second block."""
    kept, random = {}, Key.of(seed).numpy()
    for at, group in enumerate(structure.groups):
        if group.kind == "block":
            kept[group.name] = torch.tensor([not blocks or at % 2 == 0])
            continue
        order = random.permutation(group.size)[: max(1, group.size // 2)]
        kept[group.name] = torch.zeros(group.size, dtype=torch.bool).index_fill(0, torch.from_numpy(order), True)
    return kept


def masked(module, mask):
    """The module with zeros outside a mask."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in trainable(other).items():
            parameter.mul_(mask[name])
    return other


# -- what is found ---------------------------------------------------------------------------------------------------


def test_the_units_of_plain_networks_are_all_layers_but_the_last():
    expected = {
        "mlp": [("layers.1", "neuron", 12), ("layers.3", "neuron", 8)],
        "lenet": [("conv1", "filter", 6), ("conv2", "filter", 16), ("fc1", "neuron", 120), ("fc2", "neuron", 84)],
        "mcmahan_cnn": [("conv1", "filter", 32), ("conv2", "filter", 64), ("fc1", "neuron", 512)],
        "batchnorm_cnn": [("conv1", "filter", 4), ("conv2", "filter", 8)],
    }
    for name, groups in expected.items():
        structure = found(MODELS[name])[1]
        assert [(group.name, group.kind, group.size) for group in structure.groups] == groups
        assert structure.left_out == ()


def test_a_filter_before_a_flattening_owns_a_run_of_columns_and_its_statistics():
    structure = found(MODELS["batchnorm_cnn"])[1]
    members = {(member.tensor, member.dim): member for member in structure.by_name["conv2"].members}
    own = {(name, dim): member.output for (name, dim), member in members.items()}
    norms = ("weight", "bias", "running_mean", "running_var")
    assert own == {("conv2.weight", 0): True, **{(f"norm2.{n}", 0): True for n in norms}, ("fc.weight", 1): False}
    assert np.array_equal(members["fc.weight", 1].positions, np.arange(128).reshape(8, 16))


def test_a_residual_stream_is_one_group_and_each_block_a_unit():
    structure = found(MODELS["resnet"])[1]
    sizes = {group.name: (group.kind, group.size, group.least) for group in structure.groups}
    assert sizes == {
        "conv": ("filter", 4, 1), "blocks.0.conv1": ("filter", 4, 1), "blocks.1.conv1": ("filter", 6, 1),
        "blocks.1.conv2": ("filter", 6, 1), "blocks.0": ("block", 1, 0), "blocks.1": ("block", 1, 0),
    }  # fmt: skip
    stream = {(m.tensor, m.dim) for m in structure.by_name["conv"].members if m.tensor.endswith("weight")}
    assert stream == {
        ("conv.weight", 0), ("norm.weight", 0), ("blocks.0.conv2.weight", 0), ("blocks.0.norm2.weight", 0),
        ("blocks.0.conv1.weight", 1), ("blocks.1.conv1.weight", 1), ("blocks.1.shortcut.0.weight", 1),
    }  # fmt: skip
    branch = {member.tensor for member in structure.by_name["blocks.1"].members}
    assert not any("shortcut" in name for name in branch)
    assert {"blocks.1.conv1.weight", "blocks.1.norm2.running_var"} <= branch


def test_channels_that_are_normalised_together_are_one_unit():
    structure = found(MODELS["resnet with groups"])[1]
    assert [(g.name, g.size) for g in structure.groups if g.kind == "filter"] == [
        ("conv", 2), ("blocks.0.conv1", 2), ("blocks.1.conv1", 2), ("blocks.1.conv2", 2),
    ]  # fmt: skip
    rows = {member.positions.shape for member in structure.by_name["blocks.1.conv2"].members}
    assert rows == {(2, 3)}  # six channels in two groups


def test_heads_go_with_their_queries_keys_values_and_columns_of_the_projection():
    structure = found(MODELS["gpt"])[1]
    kinds = [(group.name, group.kind, group.size) for group in structure.groups]
    assert kinds == [
        ("blocks.0.attention", "head", 3), ("blocks.0.expansion", "neuron", 48),
        ("blocks.1.attention", "head", 3), ("blocks.1.expansion", "neuron", 48),
        ("blocks.0", "block", 1), ("blocks.1", "block", 1),
    ]  # fmt: skip
    weight, bias, projection = structure.by_name["blocks.0.attention"].members
    head1 = [*range(4, 8), *range(16, 20), *range(28, 32)]
    assert (weight.tensor, weight.dim, weight.positions[1].tolist()) == ("blocks.0.attention.weight", 0, head1)
    assert (bias.tensor, bias.positions[1].tolist()) == ("blocks.0.attention.bias", head1)
    assert (projection.dim, projection.positions[1].tolist(), projection.output) == (1, [4, 5, 6, 7], False)
    (sentence,) = structure.left_out
    assert (
        sentence == "blocks.0.projection: its units pass through blocks.0.norm2, which normalises all of them together"
    )


def test_finding_units_leaves_the_model_and_the_generator_alone():
    module = fresh(MODELS["resnet"])
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    with torch.inference_mode():
        find_structure(module, inputs(module))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(child.training for child in module.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not any(child._forward_hooks for child in module.modules())


# -- masked = shrunk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", MODELS)
def test_the_smaller_model_computes_what_the_masked_one_does(name, training):
    module, structure = found(MODELS[name])
    trained(module)
    for seed in range(1 if name.startswith("vgg") else 2):
        mask = structure.mask(some(structure, seed))
        slices = structure.slices(mask)
        small, whole = shrunk(module, slices).train(training), masked(module, mask).train(training)
        x = inputs(module, 3)
        with torch.no_grad():
            wanted, made, dense = whole(x), small(x), module(x)
        assert float((made - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))
        # Exactly what is kept is there; what is gone with a skipped block counts nothing.
        assert sum(p.numel() for p in small.parameters()) == int(mask.flat.sum())
        assert float((dense - wanted).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["lenet", "mcmahan_cnn", "vgg11", "resnet", "resnet with padding", "mlp"])
def test_flops_of_the_smaller_model_are_those_of_the_masked_one(name):
    module, structure = found(MODELS[name])
    mask = structure.mask(some(structure))
    small, x = shrunk(module, structure.slices(mask)), inputs(module)
    assert sum(forward_flops(small, x).values()) == masked_flops(forward_flops(module, x), mask)


def test_parameters_and_flops_of_a_narrow_lenet_are_those_of_the_formula():
    module, structure = found(MODELS["lenet"])
    a, b, c, d = 3, 5, 70, 11
    kept = {name: torch.arange(structure.by_name[name].size) < count
            for name, count in zip(("conv1", "conv2", "fc1", "fc2"), (a, b, c, d), strict=True)}  # fmt: skip
    small = shrunk(module, structure.slices(structure.mask(kept)))
    # 16x16 pixels: 12x12, pooled 6x6; 2x2, pooled 1x1.
    assert sum(p.numel() for p in small.parameters()) == (25 * a + a) + (25 * a * b + b) + (b * c + c) + (c * d + d) + (
        d * 10 + 10
    )
    flops = forward_flops(small, inputs(module))
    assert flops == {
        "conv1.weight": 2 * 25 * a * 12 * 12, "conv2.weight": 2 * 25 * a * b * 2 * 2,
        "fc1.weight": 2 * b * c, "fc2.weight": 2 * c * d, "fc3.weight": 2 * d * 10, "": 0,
    }  # fmt: skip
    assert (small.conv2.in_channels, small.conv2.out_channels, small.fc1.in_features) == (a, b, b)


def test_a_skipped_block_leaves_its_shortcut():
    module, structure = found(MODELS["resnet"])
    trained(module)
    kept = {"blocks.0": torch.tensor([False]), "blocks.1": torch.tensor([False])}
    small = shrunk(module, structure.slices(structure.mask(kept)))
    x = inputs(module, 2)
    stream = F.relu(module.norm(module.conv(x)))
    stream = F.relu(module.blocks[1].shortcut(F.relu(stream)))
    assert torch.allclose(small(x), module.fc(stream.mean((2, 3))), atol=1e-6)
    assert not [name for name, _ in small.named_parameters() if "conv1" in name]


@pytest.mark.parametrize("name", ["lenet", "vgg11", "resnet", "batchnorm_cnn", "mlp"])
def test_the_smaller_model_is_that_of_torch_pruning(name):
    module, structure = found(MODELS[name])
    trained(module)
    kept = some(structure, blocks=False)
    ours, theirs, x = shrunk(module, structure.slices(structure.mask(kept))), copy.deepcopy(module), inputs(module, 2)
    graph = torch_pruning.DependencyGraph().build_dependency(theirs, x[:1], verbose=False)
    for group in structure.groups:
        if group.kind != "block":
            layer = theirs.get_submodule(group.name)
            prune = graph.get_pruner_of_module(layer).prune_out_channels
            gone = (~kept[group.name]).nonzero().flatten().tolist()
            graph.get_pruning_group(layer, prune, gone).prune()
    state = ours.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in theirs.state_dict().items())
    assert len(state) == len(theirs.state_dict())
    assert torch.equal(ours(x), theirs(x))


# -- models of other people ------------------------------------------------------------------------------------------


class Foreign(nn.Module):
    """A body between a convolution and two linear layers."""

    def __init__(self, body):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.body = body
        self.fc, self.last = nn.Linear(6, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(F.relu(self.fc(self.body(F.relu(self.stem(x))).mean((2, 3)))))


class Concatenated(nn.Module):
    """Its input beside two convolutions of it, as in a dense network."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 5, 1)
        self.last = nn.Conv2d(15, 6, 1)

    def forward(self, x):
        return self.last(torch.cat([self.one(x), x, torch.sigmoid(self.two(x))], 1))


class Fixed(nn.Module):
    """A convolution that trusts in its number of channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        x = self.conv(x)
        return x.view(-1, 6, 8, 8)


class Ranked(nn.Module):
    """A softmax over channels: a unit that is zero is not a unit that is not there."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        return self.conv(x).softmax(1)


PICTURE = torch.randn(1, 1, 8, 8, generator=Key.of(3).torch())


@pytest.mark.parametrize(
    ("body", "groups"),
    [
        (nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.PReLU(6)), {"stem": 6, "fc": 3}),
        (Concatenated(), {"stem": 6, "body.one": 4, "body.two": 5, "body.last": 6, "fc": 3}),
        (nn.Sequential(nn.InstanceNorm2d(6, affine=True), nn.Sigmoid()), {"stem": 6, "fc": 3}),
    ],
    ids=["depthwise", "concatenation", "instance norm"],
)
def test_foreign_models_shrink_as_they_are_masked(body, groups):
    module = fresh(lambda: Foreign(body))
    structure = find_structure(module, PICTURE)
    assert {group.name: group.size for group in structure.groups} == groups
    assert structure.left_out == ()
    mask = structure.mask(some(structure))
    small, whole = shrunk(module.eval(), structure.slices(mask)), masked(module, mask)
    assert torch.allclose(small(PICTURE), whole(PICTURE), atol=1e-6)


@pytest.mark.parametrize(
    ("body", "sentences"),
    [
        (nn.Conv2d(6, 6, 1, groups=2), ["stem: its units pass through body, a convolution of 2 groups",
                                        "body: its units pass through body, a convolution of 2 groups"]),
        (nn.GroupNorm(1, 6), ["stem: its units pass through body, which normalises all of them together"]),
        (nn.Sequential(nn.GroupNorm(2, 6), nn.GroupNorm(3, 6)),
         ["stem: its units pass through body.1, which groups them in a way of its own"]),
        (Ranked(), ["body.conv: the model without some of its units does not compute what it does with zeros in their "
                    "place"]),
    ],
    ids=["grouped", "layer norm", "two groupings", "softmax"],
)  # fmt: skip
def test_what_cannot_be_cut_is_left_out_with_a_reason(body, sentences):
    structure = find_structure(fresh(lambda: Foreign(body)), PICTURE)
    assert list(structure.left_out) == sentences
    assert "fc" in structure.by_name


def test_a_model_that_trusts_in_its_sizes_loses_that_group_alone():
    structure = find_structure(fresh(lambda: Foreign(Fixed())), PICTURE)
    assert [group.name for group in structure.groups] == ["stem", "fc"]
    (sentence,) = structure.left_out
    assert sentence.startswith("body.conv: the model does not work without some of its units (RuntimeError")


def test_shared_and_constant_tensors_and_foreign_attention_are_left_out():
    tied = fresh(lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 5)))
    tied[2].weight = tied[0].weight
    structure = find_structure(nn.Sequential(tied, nn.ReLU(), nn.Linear(5, 2)), torch.randn(1, 4))
    assert [group.name for group in structure.groups] == ["0.4"]
    assert "0.0: 0.0.weight and 0.2.weight are one tensor" in structure.left_out

    frozen = fresh(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)))
    frozen[0].requires_grad_(False)
    structure = find_structure(frozen, torch.randn(1, 4))
    assert [group.name for group in structure.groups] == ["2"]
    assert structure.left_out == ("0: 0.weight is constant",)

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.attention, self.fc = nn.Linear(4, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 2)
            self.hidden, self.last = nn.Linear(2, 5), nn.Linear(5, 2)

        def forward(self, x):
            x = self.inner(x)
            return self.last(F.relu(self.hidden(self.fc(self.attention(x, x, x, need_weights=False)[0]))))

    structure = find_structure(fresh(Attending), torch.randn(1, 3, 4))
    assert {"fc", "hidden"} <= set(structure.by_name)
    assert not any(name.startswith("attention") for name in structure.by_name)
    assert "attention: the heads of nn.MultiheadAttention cannot be cut out of it" in structure.left_out


@pytest.mark.parametrize(
    "build", [partial(Linear, **GREY), partial(CharLSTM, **TEXT, hidden=8)], ids=["linear", "lstm"]
)
def test_a_model_without_units_is_refused_with_a_remedy(build):
    module = fresh(build)
    x = torch.arange(6).view(1, 6) if isinstance(module, CharLSTM) else inputs(module)
    with pytest.raises(ConfigError, match=r"has no units that can be cut whole.*pruner=magnitude"):
        find_structure(module, x)


def test_without_torch_pruning_the_remedy_is_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedray\[prune\]'"):
        find_structure(fresh(MODELS["mlp"]), torch.randn(1, 1, 16, 16))


# -- masks and slices ------------------------------------------------------------------------------------------------

LAYOUT = Layout(("a.weight", "a.bias", "b.weight"), ((3, 2), (3,), (2, 3)))
UNITS = np.arange(3)[:, None]
TINY = Structure(
    LAYOUT,
    (
        Group("a", "neuron", 3, (Member("a.weight", 0, UNITS, True), Member("a.bias", 0, UNITS, True),
                                 Member("a.mean", 0, UNITS, True), Member("b.weight", 1, UNITS, False))),
    ),
    (),
    Layout(("a.mean",), ((3,),)),
)  # fmt: skip


def test_a_mask_cuts_rows_bias_and_the_columns_that_read_the_unit():
    mask = TINY.mask({"a": torch.tensor([True, False, True])})
    assert mask["a.weight"].tolist() == [[True, True], [False, False], [True, True]]
    assert mask["a.bias"].tolist() == [True, False, True]
    assert mask["b.weight"].tolist() == [[True, False, True]] * 2
    slices = TINY.slices(mask)
    assert {name: [None if d is None else d.tolist() for d in dims] for name, dims in slices.kept.items()} == {
        "a.weight": [[0, 2], None], "a.bias": [[0, 2]], "a.mean": [[0, 2]], "b.weight": [None, [0, 2]],
    }  # fmt: skip
    assert slices.layout(LAYOUT).shapes == ((2, 2), (2,), (2, 2))
    assert slices.positions(LAYOUT).tolist() == [0, 1, 4, 5, 6, 8, 9, 11, 12, 14]


def test_a_unit_of_which_anything_is_left_stays():
    whole = TINY.mask({"a": torch.tensor([True, False, True])})
    for name in LAYOUT.names:  # were the columns left, weight decay would go on moving them
        flat = whole.flat.clone()
        flat[LAYOUT.spans[name]] = True
        assert TINY.slices(Mask(LAYOUT, flat)) is None
    assert TINY.slices(None) is None
    assert TINY.slices(Mask.full(LAYOUT)) is None


def test_a_group_that_would_lose_everything_keeps_a_unit_under_the_mask():
    slices = TINY.slices(TINY.mask({"a": torch.zeros(3, dtype=torch.bool)}))
    assert slices.layout(LAYOUT).shapes == ((1, 2), (1,), (2, 1))


def test_put_gives_back_what_take_took():
    slices = TINY.slices(TINY.mask({"a": torch.tensor([True, False, True])}))
    tree = Tree(LAYOUT, torch.arange(15.0))
    small = slices.take(tree)
    assert small["b.weight"].tolist() == [[9.0, 11.0], [12.0, 14.0]]
    assert equal(slices.put(tree, small), tree)
    assert slices.put(Tree.zeros(LAYOUT), small).flat.tolist() == [
        0, 1, 0, 0, 4, 5, 6, 0, 8, 9, 0, 11, 12, 0, 14,
    ]  # fmt: skip
    assert equal(Slices({}).take(tree), tree)


def test_scores_of_units_read_what_computes_them():
    score = Tree(LAYOUT, torch.arange(15.0))
    assert TINY.unit_scores(score, TINY.groups[0]).tolist() == [0 + 1 + 6, 2 + 3 + 7, 4 + 5 + 8]
    assert TINY.unit_scores(score, TINY.groups[0], "mean").tolist() == pytest.approx([7 / 3, 12 / 3, 17 / 3])
    mask = Mask(LAYOUT, torch.arange(15) != 2)
    assert TINY.kept(mask)["a"].tolist() == [True, True, True]
    assert TINY.kept(TINY.mask({"a": torch.tensor([True, False, True])}))["a"].tolist() == [True, False, True]
    assert TINY.kept(None)["a"].all()


def test_over_other_parameters_masks_cut_what_is_there():
    same = TINY.over(LAYOUT)
    assert same is TINY
    body = TINY.over(LAYOUT.select(["a.weight", "a.bias"]))
    mask = body.mask({"a": torch.tensor([True, False, True])})
    assert [mask["a.weight"].all(1).tolist(), mask["a.bias"].tolist()] == [[True, False, True]] * 2
    head = TINY.over(LAYOUT.select(["b.weight"]))
    assert head.groups == ()
    assert head.left_out == ("a: what computes its units stays with clients",)
