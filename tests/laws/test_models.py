"""Models have the sizes of the literature, a task says what is prunable, and a key decides the initial weights."""

from functools import partial

import pytest
import torch
from torch import nn

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
    LSTMClassifier,
    McMahanCNN,
    ResNet,
    Scope,
    SmallCNN,
    Task,
    TransformerClassifier,
)
from fedray.models.task import buffers_of, kinds, layouts, params_of, prunable_names

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)
SMALL, LARGE = (16, 32, 64), (64, 128, 256, 512)


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
        (Linear, MNIST, 7_850),
        (partial(Linear, bias=False), MNIST, 7_840),
        (VGG11, CIFAR, 9_750_922),
        (partial(VGG11, norm="batch"), CIFAR, 9_750_922 + 2 * (64 + 128 + 2 * 256 + 4 * 512)),
        (partial(ResNet, norm="batch"), CIFAR, 272_474),
        (partial(ResNet, norm="batch", shortcut="padding"), CIFAR, 269_722),
        (partial(ResNet, norm="group"), CIFAR, 272_474),
        (partial(ResNet, blocks=(1, 1, 1), widths=SMALL), CIFAR, 78_042),
        (partial(ResNet, blocks=(1, 1, 1), widths=SMALL, shortcut="padding"), CIFAR, 75_290),
        (partial(ResNet, blocks=(2, 2, 2, 2), widths=LARGE, norm="batch"), CIFAR, 11_173_962),
    ],
)
def test_a_model_has_the_parameters_of_the_literature(build, shape, count):
    module = build(shape=shape, num_classes=10)
    assert params_of(module).layout.size == sum(p.numel() for p in module.parameters()) == count
    assert module(torch.zeros(2, *shape)).shape == (2, 10)


@pytest.mark.parametrize(
    ("build", "shape", "vocabulary", "count"),
    [
        # TensorFlow's 820,522 with the second bias that PyTorch gives each of 2 x 1,024 gates.
        (CharLSTM, (80,), 90, 820_522 + 2 * 1_024),
        # GPT-2 small.
        (partial(GPT, width=768, layers=12, heads=12), (1024,), 50_257, 124_439_808),
        (partial(GPT, width=768, layers=12, heads=12, tied=False), (1024,), 50_257, 124_439_808 + 50_257 * 768),
    ],
)
def test_a_language_model_has_the_parameters_of_the_literature(build, shape, vocabulary, count):
    with torch.device("meta"):
        module = build(shape=shape, vocabulary=vocabulary)
        assert sum(p.numel() for p in module.parameters()) == count
        assert module(torch.zeros(2, *shape, dtype=torch.int64)).shape == (2, *shape, vocabulary)


@pytest.mark.parametrize(
    "build",
    [MLP, LeNet, SmallCNN, McMahanCNN, BatchNormCNN, Linear, ResNet, partial(ResNet, norm="none", shortcut="padding")],
)
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 20, 17), (2, 33, 28)])
def test_a_model_takes_images_of_any_size(build, shape):
    assert build(shape=shape, num_classes=7)(torch.randn(3, *shape)).shape == (3, 7)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (LeNet, (1, 8, 8)),
        (SmallCNN, (1, 8, 8)),
        (LeNet, (64,)),
        (McMahanCNN, (1, 3, 9)),
        (BatchNormCNN, (5,)),
        (VGG11, MNIST),
        (ResNet, (3, 7, 9)),
        (partial(ResNet, blocks=(1, 1, 1, 1), widths=LARGE), (1, 8, 8)),
        (ResNet, (20,)),
    ],
)
def test_images_that_do_not_fit_are_refused_by_name(build, shape):
    with pytest.raises(ConfigError, match=r"model=\w+ needs images"):
        build(shape=shape, num_classes=10)


def test_a_width_of_zero_is_refused():
    with pytest.raises(ConfigError, match=r"model\.hidden"):
        MLP(shape=(4,), num_classes=2, hidden=(3, 0))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (partial(VGG11, norm="layer"), r"model\.norm is 'layer'"),
        (partial(ResNet, groups=0), r"model\.groups is 0"),
        (partial(ResNet, blocks=(1, 1)), r"model\.blocks is \[1, 1\] and model\.widths"),
        (partial(ResNet, blocks=(1, 0, 1)), r"model\.blocks is \[1, 0, 1\]"),
        (partial(ResNet, shortcut="none"), r"model\.shortcut is 'none'"),
        (partial(ResNet, shortcut="padding", widths=(32, 16, 64)), r"padding only adds channels"),
    ],
)
def test_settings_that_make_no_network_are_refused(build, words):
    with pytest.raises(ConfigError, match=words):
        build(shape=CIFAR, num_classes=10)


@pytest.mark.parametrize("build", [GPT, CharLSTM, LSTMClassifier, TransformerClassifier])
def test_a_model_of_tokens_refuses_other_data_and_empty_layers(build):
    classes = {} if build in (GPT, CharLSTM) else {"num_classes": 3}
    with pytest.raises(ConfigError, match=r"model=\w+ reads tokens"):
        build(shape=(1, 8, 8), vocabulary=None, **classes)
    with pytest.raises(ConfigError, match="that are no tokens"):
        build(shape=(8,), vocabulary=None, **classes)
    with pytest.raises(ConfigError, match=r"model\.layers is 0"):
        build(shape=(8,), vocabulary=5, layers=0, **classes)
    if build in (GPT, TransformerClassifier):
        with pytest.raises(ConfigError, match=r"model\.heads is 3"):
            build(shape=(8,), vocabulary=5, width=8, heads=3, **classes)


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
    scores = task.objective.score(outputs, targets)
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
