"""Models have the sizes of the literature, a task says what is prunable, and a key decides the initial weights."""

from functools import partial

import pytest
import torch
from torch import nn

from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.models import MLP, BatchNormCNN, LeNet, McMahanCNN, Scope, SmallCNN, Task
from fedray.models.task import buffers_of, kinds, layouts, params_of, prunable_names

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)


@pytest.mark.parametrize(
    ("build", "shape", "count"),
    [
        (LeNet, CIFAR, 62_006),
        (LeNet, MNIST, 44_426),
        (McMahanCNN, MNIST, 1_663_370),
        (SmallCNN, MNIST, 21_840),
        (partial(MLP, hidden=(200, 200)), MNIST, 199_210),
        (MLP, MNIST, 199_210),
        (partial(MLP, hidden=()), MNIST, 7_850),
        (partial(BatchNormCNN, width=4), (3, 8, 8), 3 * 36 + 8 + 4 * 72 + 16 + 10 * 33),
    ],
)
def test_a_model_has_the_parameters_of_the_literature(build, shape, count):
    module = build(shape=shape, num_classes=10)
    assert params_of(module).layout.size == sum(p.numel() for p in module.parameters()) == count
    assert module(torch.zeros(2, *shape)).shape == (2, 10)


@pytest.mark.parametrize("build", [MLP, LeNet, SmallCNN, McMahanCNN, BatchNormCNN])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 20, 17), (2, 33, 28)])
def test_a_model_takes_images_of_any_size(build, shape):
    assert build(shape=shape, num_classes=7)(torch.randn(3, *shape)).shape == (3, 7)


@pytest.mark.parametrize(
    ("build", "shape"),
    [(LeNet, (1, 8, 8)), (SmallCNN, (1, 8, 8)), (LeNet, (64,)), (McMahanCNN, (1, 3, 9)), (BatchNormCNN, (5,))],
)
def test_images_that_do_not_fit_are_refused_by_name(build, shape):
    with pytest.raises(ConfigError, match=r"model=\w+ needs images"):
        build(shape=shape, num_classes=10)


def test_a_width_of_zero_is_refused():
    with pytest.raises(ConfigError, match=r"model\.hidden"):
        MLP(shape=(4,), num_classes=2, hidden=(3, 0))


def test_scope_says_which_tensors_are_prunable():
    module = BatchNormCNN(shape=(1, 8, 8), num_classes=3)
    assert kinds(module) == {
        "conv1.weight": "weight",
        "norm1.weight": "norm",
        "norm1.bias": "norm",
        "conv2.weight": "weight",
        "norm2.weight": "norm",
        "norm2.bias": "norm",
        "fc.weight": "weight",
        "fc.bias": "bias",
    }
    assert prunable_names(module, Scope()) == ("conv1.weight", "conv2.weight", "fc.weight")
    assert prunable_names(module, Scope(first_layer=False)) == ("conv2.weight", "fc.weight")
    assert prunable_names(module, Scope(last_layer=False)) == ("conv1.weight", "conv2.weight")
    assert prunable_names(module, Scope(biases=True)) == ("conv1.weight", "conv2.weight", "fc.weight", "fc.bias")
    everything = prunable_names(module, Scope(biases=True, norms=True))
    assert everything == tuple(name for name, _ in module.named_parameters())
    embedding = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2))
    assert kinds(embedding)["0.weight"] == "other"
    assert prunable_names(embedding, Scope()) == ("1.weight",)


def test_running_statistics_are_buffers_and_counters_stay():
    module = BatchNormCNN(shape=(1, 8, 8), num_classes=3, width=4)
    params, buffers = layouts(module)
    assert params == params_of(module).layout
    assert buffers == buffers_of(module).layout
    assert buffers.names == ("norm1.running_mean", "norm1.running_var", "norm2.running_mean", "norm2.running_var")
    assert buffers.sizes == (4, 4, 8, 8)
    assert layouts(MLP(shape=(4,), num_classes=2))[1].size == 0


def test_initial_weights_are_a_function_of_the_key_and_the_global_generator_is_left_alone():
    task = Task(build=partial(LeNet, shape=(1, 16, 16), num_classes=3))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, other = params_of(task.module(Key.of(0))), params_of(task.module(Key.of(1)))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(one.flat, params_of(task.module(Key.of(0))).flat)
    assert not torch.equal(one.flat, other.flat)


def test_scores_are_per_sample_and_the_loss_is_their_mean():
    task, outputs, targets = (
        Task(build=nn.Identity),
        torch.randn(9, 4, generator=Key.of(0).torch()),
        torch.arange(9) % 4,
    )
    scores = task.score(outputs, targets)
    assert set(scores) == set(task.metrics)
    expected = -torch.log_softmax(outputs, 1)[torch.arange(9), targets]
    torch.testing.assert_close(scores["loss"], expected)
    assert scores["accuracy"].tolist() == [float(row.argmax() == t) for row, t in zip(outputs, targets, strict=True)]
    torch.testing.assert_close(task.loss(outputs, targets), expected.mean())


def test_what_is_no_module_or_has_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="made a dict"):
        Task(build=dict).module(Key.of(0))
    with pytest.raises(ConfigError, match="no parameters"):
        Task(build=nn.Flatten).module(Key.of(0))
