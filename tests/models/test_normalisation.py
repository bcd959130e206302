"""Group for batch, statistics of the whole from those of its parts, and statistics that no longer move."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.models import MLP, VGG11, BatchNormCNN, LeNet, ResNet, Task
from fedray.models.normalisation import (
    FrozenBatchNorm,
    freeze_statistics,
    from_second_moments,
    group_count,
    group_normed,
    norm_layers,
    pooled,
    second_moments,
    statistics,
    to_group_norm,
)
from fedray.models.task import buffers_of, layouts, params_of
from fedray.tree import Tree

SHAPE = (2, 8, 8)
MODELS = {
    "batchnorm_cnn": partial(BatchNormCNN, width=6),
    "resnet": partial(ResNet, blocks=(1, 1), widths=(6, 12), norm="batch"),
}


def made(name="resnet", seed=0):
    module = Task(build=partial(MODELS[name], shape=SHAPE, num_classes=3)).module(Key.of(seed))
    random = Key.of(seed).fold("statistics").torch()
    for layer in norm_layers(module).values():
        with torch.no_grad():
            for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=random) + 0.5)
    return module


def some(count, seed=0, offset=0.0):
    return torch.randn(count, *SHAPE, generator=Key.of(seed).fold("x").torch()) + offset


# -- group norm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "groups", "count"), [(64, 32, 32), (16, 32, 16), (6, 4, 3), (7, 4, 1), (12, 8, 6), (5, 1, 1)]
)
def test_groups_are_the_largest_divisor_that_is_allowed(channels, groups, count):
    assert group_count(channels, groups) == count


@pytest.mark.parametrize("name", MODELS)
def test_every_batch_norm_becomes_a_group_norm_with_its_scale_and_shift(name):
    before, module = made(name), made(name)
    layers = norm_layers(before)
    assert to_group_norm(module, 4) is module
    assert norm_layers(module) == {}
    assert layouts(module)[1].size == 0
    assert params_of(module).layout == params_of(before).layout
    assert torch.equal(params_of(module).flat, params_of(before).flat)
    found = {key: child for key, child in module.named_modules() if isinstance(child, nn.GroupNorm)}
    assert set(found) == set(layers)
    for key, layer in found.items():
        assert (layer.num_channels, layer.num_groups) == (layers[key].num_features, group_count(layer.num_channels, 4))
        assert layer.eps == layers[key].eps
    x = some(4)
    torch.testing.assert_close(module(x)[:1], module(x[:1]), rtol=1e-4, atol=1e-5)


def test_group_norm_by_option_is_the_model_with_group_norm_by_setting():
    build = partial(ResNet, shape=SHAPE, num_classes=3, blocks=(1, 1), widths=(6, 12))
    ours = Task(build=partial(group_normed, partial(build, norm="batch"), 4)).module(Key.of(0))
    theirs = Task(build=partial(build, norm="group", groups=4)).module(Key.of(0))
    x = some(3)
    assert torch.equal(ours(x), theirs(x))


def test_what_has_no_affine_part_or_no_batch_norm_stays_so():
    bare = to_group_norm(nn.Sequential(nn.BatchNorm2d(6, affine=False)), 3)
    assert isinstance(bare[0], nn.GroupNorm)
    assert list(bare.parameters()) == []
    assert isinstance(to_group_norm(nn.BatchNorm1d(4)), nn.GroupNorm)
    plain = LeNet(shape=(1, 16, 16), num_classes=3)
    assert [type(m) for m in to_group_norm(copy.deepcopy(plain)).modules()] == [type(m) for m in plain.modules()]
    with pytest.raises(ConfigError, match="groups is 0"):
        to_group_norm(plain, 0)


# -- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_statistics_of_one_batch_are_those_of_one_pass_of_batch_norm(name):
    module, x = made(name), some(7, offset=3.0)
    found, count = statistics(module, [x])
    reference = copy.deepcopy(module).train()
    sizes = {}
    for key, layer in norm_layers(reference).items():
        layer.momentum = 1.0
        layer.register_forward_hook(lambda _, inputs, __, key=key: sizes.update({key: inputs[0][:, 0].numel()}))
    reference(x)
    assert count == 7
    assert found.layout == buffers_of(module).layout
    for key, layer in norm_layers(reference).items():
        torch.testing.assert_close(found[f"{key}.running_mean"], layer.running_mean, rtol=1e-4, atol=1e-5)
        # A running variance is unbiased; that of a population is not.
        biased = layer.running_var * (sizes[key] - 1) / sizes[key]
        torch.testing.assert_close(found[f"{key}.running_var"], biased, rtol=1e-4, atol=1e-5)


def _first(module):
    return next(iter(norm_layers(module)))


def test_statistics_of_clients_pool_to_those_of_one_big_batch():
    module, sizes = made(), (5, 2, 9)
    clients = [some(size, seed=size, offset=10.0 * at) for at, size in enumerate(sizes)]
    parts = [statistics(module, x.split(4)) for x in clients]
    assert [count for _, count in parts] == list(sizes)
    together, _ = statistics(module, [torch.cat(clients)])
    union, first = pooled(parts), _first(module)
    for which in ("running_mean", "running_var"):
        torch.testing.assert_close(union[f"{first}.{which}"], together[f"{first}.{which}"], rtol=1e-4, atol=1e-4)
    # The mean of variances lacks what lies between the clients.
    naive = sum(tree[f"{first}.running_var"] * count for tree, count in parts) / sum(sizes)
    assert (union[f"{first}.running_var"] > naive + 0.1).all()


def test_later_layers_pool_by_the_published_rule():
    module = made()
    parts = [statistics(module, [some(size, seed=size, offset=size)]) for size in (3, 6)]
    union, total = pooled(parts), 9
    for key in norm_layers(module):
        mean = sum(tree[f"{key}.running_mean"].double() * n / total for tree, n in parts)
        square = sum(
            (tree[f"{key}.running_var"].double() + tree[f"{key}.running_mean"].double() ** 2) * n / total
            for tree, n in parts
        )
        torch.testing.assert_close(union[f"{key}.running_mean"].double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(union[f"{key}.running_var"].double(), square - mean**2, rtol=1e-4, atol=1e-5)


def test_averaged_second_moments_are_pooled_statistics():
    module = made()
    parts = [statistics(module, [some(size, seed=size)]) for size in (3, 6)]
    averaged = sum(second_moments(tree).flat * count / 9 for tree, count in parts)
    found = from_second_moments(Tree(parts[0][0].layout, averaged))
    torch.testing.assert_close(found.flat, pooled(parts).flat, rtol=1e-4, atol=1e-5)


def test_statistics_leave_the_module_as_it_was():
    module = made().train()
    module.fc.eval()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    modes = [child.training for child in module.modules()]
    statistics(module, [some(4), some(2)])
    assert [child.training for child in module.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert not any(child._forward_pre_hooks for child in module.modules())


def test_dropout_is_off_while_statistics_are_taken():
    module = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(2)).train()
    x = some(6)
    found, _ = statistics(module, [x])
    torch.testing.assert_close(found["1.running_mean"], x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_a_model_without_batch_norm_has_no_statistics():
    found, count = statistics(MLP(shape=(4,), num_classes=2), [torch.randn(3, 4)])
    assert (found.layout.size, count) == (0, 3)


def test_a_bare_layer_has_statistics_and_nothing_pools_to_nothing():
    x = torch.randn(8, 3)
    found, _ = statistics(nn.BatchNorm1d(3), x.split(3))
    torch.testing.assert_close(found["running_var"], x.var(0, correction=0))
    with pytest.raises(ValueError, match="at least one part"):
        pooled([])


# -- frozen ----------------------------------------------------------------------------------------------------------


def test_frozen_statistics_are_constants_that_give_what_evaluation_gave():
    module = made()
    module.requires_grad_(False)
    module.fc.requires_grad_(True)
    x = some(4)
    expected = module.eval()(x)
    names = set(module.state_dict())
    freeze_statistics(module).train()
    assert torch.equal(module(x), expected)
    assert set(module.state_dict()) == {name for name in names if not name.endswith("num_batches_tracked")}
    assert [layout.names for layout in layouts(module)] == [("fc.weight", "fc.bias"), ()]
    assert any(isinstance(child, FrozenBatchNorm) for child in module.modules())


def test_a_norm_that_trains_keeps_its_running_statistics():
    module = freeze_statistics(VGG11(shape=(3, 32, 32), num_classes=3, norm="batch"))
    assert len(norm_layers(module)) == 8
