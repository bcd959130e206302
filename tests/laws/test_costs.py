"""FLOPs are two for a multiply-add, by formula, and fall with the mask layer by layer; memory, seconds and joules are
what can be worked out by hand."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from laws_support import population, run, spec
from omegaconf import OmegaConf
from torch import nn

from fedray import costs
from fedray.config import _make
from fedray.costs import Device, FixedLink, LogNormalLink, simulate
from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.models import MLP, LeNet, McMahanCNN
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


# -- memory ----------------------------------------------------------------------------------------------------------


def total(outputs):
    """A loss that saves nothing but the shape."""
    return outputs.sum()


def cross_entropy(outputs):
    return F.cross_entropy(outputs, torch.zeros(len(outputs), dtype=torch.int64))


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_activations_of_a_perceptron_by_hand(batch):
    net = MLP(shape=(1, 28, 28), num_classes=10, hidden=(200, 50))
    images = torch.zeros(batch, 1, 28, 28)
    # What each layer takes in: the ReLU's output is the next layer's input, one storage.
    inputs = batch * (784 + 200 + 50) * 4
    assert costs.activation_bytes(net, images, loss=total) == inputs
    # Cross-entropy keeps the log-probabilities, the targets (int64) and the sum of class weights (a scalar).
    probabilities = batch * 10 * 4 + batch * 8 + 4
    assert costs.activation_bytes(net, images, loss=cross_entropy) == inputs + probabilities


def test_activations_of_a_convolution_by_hand():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 5),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(6 * 36, 2),
    )
    image, mapped, pooled = 3 * 16 * 16, 6 * 12 * 12, 6 * 6 * 6
    floats = image + mapped + mapped + pooled  # input, the convolution's output, the ReLU's output, dropped out
    once = 2 * 6 * 4  # mean and inverse deviation of the batch
    indices = pooled * 8  # where each maximum was, int64
    batch = 4
    found = costs.activation_bytes(net, torch.zeros(batch, 3, 16, 16), loss=total)
    # Dropout keeps its mask: bytes on a CPU of some versions, floats of others.
    assert found - batch * (4 * floats + indices) - once in (batch * pooled, batch * pooled * 4)


def test_what_is_saved_twice_counts_once_and_parameters_never():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(100, 100))

        def forward(self, x):
            return x @ self.weight + x @ self.weight.T + x * x

    assert costs.activation_bytes(Twice(), torch.zeros(3, 100), loss=total) == 3 * 100 * 4
    views = torch.zeros(50, 100)[3:6]  # a batch out of a large tensor is no larger for that
    assert costs.activation_bytes(Twice(), views, loss=total) == 3 * 100 * 4


def test_measuring_activations_leaves_no_trace():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout()).eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch.no_grad():
        assert costs.activation_bytes(net, torch.randn(6, 4, generator=Key.of(0).torch()), loss=total) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert not net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("states", [0, 1, 2])
def test_memory_is_that_of_the_weights_that_the_mask_keeps(states):
    net = nn.Sequential(nn.Linear(10, 4), nn.BatchNorm1d(4))
    layout = Layout.of(dict(net.named_parameters()))
    mask = Mask.of(layout, {"0.weight": torch.arange(40) < 13})
    buffers = 4 * 4 + 4 * 4 + 8  # mean, variance, and a counter of int64
    for kept, under in ((40 + 4 + 8, None), (13 + 4 + 8, mask)):
        memory = costs.client_memory(net, activations=777, optimizer_states=states, mask=under)
        assert memory.weight_bytes == 4 * kept + buffers
        assert memory.gradient_bytes == 4 * kept
        assert memory.optimizer_bytes == 4 * kept * states
        assert memory.peak_bytes == 4 * kept * (2 + states) + buffers + 777


# -- time and energy -------------------------------------------------------------------------------------------------

DEVICE = {
    "name": "toy", "flops_per_s": 1e9, "memory_bytes": 10**9, "joules_per_flop": 2e-9, "joules_per_byte_up": 3e-6,
    "joules_per_byte_down": 1e-6,
}  # fmt: skip
WORK = {"key": Key.of(0), "client": 3, "train_flops": 5e9, "down_bytes": 2e6, "up_bytes": 1e6}


def test_a_clients_time_and_energy_by_hand():
    device, link = Device(**DEVICE), FixedLink(up_mbps=4, down_mbps=32, latency_s=0.1)
    done = simulate(device, link, **WORK)
    assert (done.compute_s, done.down_s, done.up_s) == pytest.approx((5.0, 0.1 + 0.5, 0.1 + 2.0))
    assert done.seconds == pytest.approx(7.7)
    assert done.joules == pytest.approx(10 + 3 + 2)


def test_without_a_device_or_a_link_its_share_is_nothing():
    device, link = Device(**DEVICE), FixedLink(up_mbps=4, down_mbps=32, latency_s=0.1)
    alone = simulate(device, None, **WORK)
    assert (alone.seconds, alone.joules) == pytest.approx((5.0, 15))
    alone = simulate(None, link, **WORK)
    assert (alone.seconds, alone.joules) == pytest.approx((2.7, 0))
    assert simulate(None, None, **WORK).seconds == 0
    nothing = simulate(device, link, **{**WORK, "up_bytes": 0})
    assert nothing.up_s == 0


def test_a_round_waits_for_the_slowest_client():
    device = Device(**DEVICE)
    clients = [simulate(device, None, **{**WORK, "train_flops": flops}) for flops in (1e9, 4e9, 2e9)]
    assert costs.round_seconds(clients) == 4.0
    assert costs.round_seconds([]) == 0.0


def test_a_drawn_link_belongs_to_the_client_and_the_seed():
    link = LogNormalLink(up_mbps=6, down_mbps=13, latency_s=0.035, spread=0.7)
    own = link.of(3, Key.of(1))
    assert own == link.of(3, Key.of(1))
    assert own != link.of(4, Key.of(1))
    assert own != link.of(3, Key.of(2))
    assert own.down_mbps / own.up_mbps == pytest.approx(13 / 6)
    assert own.latency_s == 0.035
    draws = torch.tensor([link.of(client, Key.of(0)).up_mbps / 6 for client in range(4000)]).log()
    assert float(draws.mean()) == pytest.approx(0, abs=4 * 0.7 / math.sqrt(4000))
    assert float(draws.std()) == pytest.approx(0.7, rel=0.05)
    assert LogNormalLink(up_mbps=6, down_mbps=13, spread=0).of(3, Key.of(1)) == FixedLink(up_mbps=6, down_mbps=13)
    # The simulation draws the same.
    slow = simulate(None, link, **{**WORK, "key": Key.of(1), "down_bytes": 0, "up_bytes": 1e6})
    assert slow.up_s == pytest.approx(0.035 + 8 / own.up_mbps)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Device(**{**DEVICE, "flops_per_s": 0}), "flops_per_s is 0; it must be above 0"),
        (lambda: Device(**{**DEVICE, "memory_bytes": -1}), "memory_bytes is -1"),
        (lambda: Device(**{**DEVICE, "joules_per_flop": -1e-9}), "joules_per_flop is -1e-09; it must be at least 0"),
        (lambda: Device(**{**DEVICE, "joules_per_byte_up": math.nan}), "joules_per_byte_up is nan"),
        (lambda: Device(**{**DEVICE, "name": ""}), "name is ''"),
        (lambda: FixedLink(up_mbps=0, down_mbps=1), "up_mbps is 0"),
        (lambda: FixedLink(up_mbps=1, down_mbps=math.inf), "down_mbps is inf"),
        (lambda: LogNormalLink(up_mbps=1, down_mbps=1, latency_s=-1), "latency_s is -1"),
        (lambda: LogNormalLink(up_mbps=1, down_mbps=1, spread=-0.1), "spread is -0.1; it must be from 0 to 5"),
        (lambda: LogNormalLink(up_mbps=1, down_mbps=1, spread=5.1), "spread is 5.1; it must be from 0 to 5"),
        (lambda: LogNormalLink(up_mbps=1, down_mbps=1, spread=math.nan), "spread is nan"),
    ],
)
def test_a_device_or_link_that_cannot_be_is_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize("path", sorted((*CONF.glob("device/*.yaml"), *CONF.glob("link/*.yaml"))), ids=lambda p: p.stem)
def test_every_profile_can_be_made(path):
    node = OmegaConf.to_container(OmegaConf.load(path))
    if path.stem == "none":
        assert node == {}
        return
    made = _make(node, path.parent.name)
    assert isinstance(made, Device if path.parent.name == "device" else FixedLink | LogNormalLink)


@pytest.mark.parametrize(
    ("name", "peak", "watts"),
    [("phone", 161.6e9, 4), ("raspberry_pi_4", 48e9, 6.41 - 2.1), ("jetson", 236e9, 8), ("laptop", 204.8e9, 15)],
)
def test_profiles_keep_the_rule_that_they_state(name, peak, watts):
    numbers = OmegaConf.load(CONF / "device" / f"{name}.yaml")
    assert numbers["flops_per_s"] == pytest.approx(peak / 4, rel=0.01)
    assert numbers["joules_per_flop"] == pytest.approx(watts / numbers["flops_per_s"], rel=0.01)
    assert numbers["joules_per_byte_up"] == pytest.approx(8 * 283.17e-9, rel=0.01)
    assert numbers["joules_per_byte_down"] == pytest.approx(8 * 137.01e-9, rel=0.01)


def test_flops_of_a_recurrent_layer_are_its_matrices_once_a_step():
    from fedray.models import CharLSTM

    module = CharLSTM(shape=(9,), vocabulary=11, embedding=4, hidden=6, layers=2)
    flops = costs.forward_flops(module, torch.zeros(1, 9, dtype=torch.int64))
    matrices = {name: w.numel() for name, w in module.named_parameters() if w.dim() == 2 and "embed" not in name}
    assert len([name for name in matrices if "weight_" in name]) == 4
    assert {name: flops[name] for name in matrices} == {name: 2 * 9 * count for name, count in matrices.items()}
    assert sum(flops.values()) == 2 * 9 * sum(matrices.values())
