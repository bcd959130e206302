"""FLOPs are two for a multiply-add, by formula, and fall with the mask layer by layer."""

import pytest
import torch
from laws_support import population, run, spec
from torch import nn

from fedray import costs
from fedray.models import LeNet, McMahanCNN
from fedray.pruners import Magnitude, NoPruning
from fedray.strategies import FedAvg
from fedray.tree import Layout, Mask


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (784, 200), (7, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_costs_two_flops_a_weight(inputs, outputs, bias):
    net = nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs, bias=bias), nn.ReLU())
    assert costs.forward_flops(net, torch.zeros(1, inputs)) == {"1.weight": 2 * inputs * outputs, "": 0}
    assert net.training


@pytest.mark.parametrize(
    ("channels", "filters", "kernel", "stride", "padding", "groups"),
    [(1, 6, 5, 1, 0, 1), (3, 8, 3, 2, 1, 1), (4, 8, 1, 1, 0, 2), (4, 4, 3, 1, 1, 4)],
)
def test_a_convolution_costs_two_flops_a_weight_and_output_pixel(channels, filters, kernel, stride, padding, groups):
    net = nn.Sequential(nn.Conv2d(channels, filters, kernel, stride, padding, groups=groups))
    side = (12 + 2 * padding - kernel) // stride + 1
    flops = costs.forward_flops(net, torch.zeros(1, channels, 12, 12))
    assert flops["0.weight"] == 2 * side * side * filters * (channels // groups) * kernel * kernel
    assert sum(flops.values()) == flops["0.weight"]


def test_flops_of_known_networks():
    lenet = costs.forward_flops(LeNet(shape=(3, 32, 32), num_classes=10), torch.zeros(1, 3, 32, 32))
    assert lenet == {
        "conv1.weight": 2 * 28 * 28 * 6 * 75,
        "conv2.weight": 2 * 10 * 10 * 16 * 150,
        "fc1.weight": 2 * 400 * 120,
        "fc2.weight": 2 * 120 * 84,
        "fc3.weight": 2 * 84 * 10,
        "": 0,
    }
    mcmahan = costs.forward_flops(McMahanCNN(shape=(1, 28, 28), num_classes=10), torch.zeros(1, 1, 28, 28))
    assert mcmahan["conv2.weight"] == 2 * 14 * 14 * 64 * 32 * 25
    assert mcmahan["fc1.weight"] == 2 * 3136 * 512


class Attention(nn.Module):
    """A product of two activations beside a layer: it belongs to no weight."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        y = self.fc(x)
        return y @ y.transpose(-1, -2)


def test_products_without_a_weight_are_counted_and_never_pruned():
    flops = costs.forward_flops(Attention(), torch.zeros(1, 5, 8))
    assert flops == {"fc.weight": 2 * 5 * 8 * 8, "": 2 * 5 * 5 * 8}
    layout = Layout(("fc.weight", "fc.bias"), ((8, 8), (8,)))
    nothing = Mask.of(layout, {"fc.weight": torch.zeros(8, 8, dtype=torch.bool)})
    assert costs.masked_flops(flops, nothing) == flops[""]


def test_a_mask_scales_each_layer_by_what_it_keeps():
    layout = Layout(("a.weight", "b.weight", "b.bias"), ((4, 5), (2, 4), (2,)))
    dense = {"a.weight": 400, "b.weight": 1000, "": 30}
    mask = Mask.of(
        layout, {"a.weight": torch.arange(20) < 5, "b.weight": torch.arange(8) < 4, "b.bias": torch.zeros(2) > 0}
    )
    assert costs.masked_flops(dense, mask) == 400 / 4 + 1000 / 2 + 30
    assert costs.masked_flops(dense, None) == costs.masked_flops(dense, Mask.full(layout)) == 1430


@pytest.mark.parametrize(("epochs", "steps"), [(2, None), (None, 3)])
def test_rows_count_the_flops_of_the_mask_that_trained_times_the_examples_seen(epochs, steps):
    pruner = Magnitude(sparsity=0.5, start=2)
    ran = run(spec(pruner, FedAvg(), rounds=3, epochs=epochs, steps=steps), population())
    dense = 2 * (6 * 8 + 8 * 3)
    flops = [dense if s.mask is None else costs.masked_flops(ran.driver.flops, s.mask) for s in ran.servers]
    assert flops[0] == flops[1] == dense
    assert flops[2] == pytest.approx(dense / 2, rel=0.05)
    assert [row["model/flops"] for row in ran.rows] == flops[1:]
    total = 0.0
    for at, record in enumerate(ran.records):
        for client in record.clients:
            size = client["num_examples"]
            total += costs.TRAIN_FACTOR * flops[at] * (2 * size if steps is None else seen_in(3, 4, size))
        assert record.row["model/train_flops"] == pytest.approx(total)


def seen_in(steps, batch_size, size):
    """Examples in that many steps over epochs whose last batch is smaller."""
    seen, left = 0, size
    for _ in range(steps):
        batch = min(batch_size, left)
        seen, left = seen + batch, left - batch or size
    return seen


def test_flops_fall_with_sparsity():
    found = [
        run(spec(pruner, FedAvg(), rounds=1), population()).rows[0]["model/flops"]
        for pruner in (NoPruning(), Magnitude(sparsity=0.3), Magnitude(sparsity=0.9))
    ]
    assert found[0] > found[1] > found[2] > 0
