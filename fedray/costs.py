"""What a model costs under a mask: FLOPs and memory, and what these and its bytes cost on a device and a link.

FLOPs count two for a multiply-add, in matrix products and convolutions only (torch's FlopCounterMode), for one
sample. Under a mask each layer's count is multiplied by the kept fraction of its weight: the theoretical count of
an unstructured mask, which dense kernels do not turn into time. A training step costs three forward passes.

Seconds and joules are a model, not a measurement: FLOPs over a constant speed, bytes over a constant rate.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fedray.keys import Key
from fedray.round import refuse
from fedray.tree import Layout, Mask

TRAIN_FACTOR = 3
"""Forward, gradient of the inputs, gradient of the weights: each about one forward pass."""

FLOAT_BYTES = 4


def forward_flops(module: nn.Module, sample: Tensor) -> dict[str, int]:
    """Dense FLOPs of one sample by the name of the weight that causes them. sample: (1, *shape).

    Recurrent layers, which torch counts as nothing where a fused kernel runs them, multiply by each matrix once a step.
    """
    from torch.utils.flop_counter import FlopCounterMode

    weights = {prefix: f"{prefix}.weight" if prefix else "weight" for prefix, _ in module.named_modules()}
    known = {name for name, _ in module.named_parameters()}
    modes = [(child, child.training) for child in module.modules()]
    recurrent = {prefix: child for prefix, child in module.named_modules() if isinstance(child, nn.RNNBase)}
    steps: dict[str, int] = {}

    def watch(prefix: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def seen(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            steps[prefix] = inputs[0].shape[1 if layer.batch_first else 0]

        return seen

    handles = [child.register_forward_pre_hook(watch(prefix)) for prefix, child in recurrent.items()]
    module.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(sample)
    for handle in handles:
        handle.remove()
    for child, training in modes:
        child.training = training
    flops: dict[str, int] = {}
    root = type(module).__name__
    for path, by_operator in counter.get_flop_counts().items():
        if path in ("Global", root):
            continue
        name = weights.get(path.removeprefix(f"{root}."))
        if name in known:
            flops[str(name)] = sum(by_operator.values())
    total = counter.get_total_flops()
    # Products outside a layer with a weight of its own (attention scores, functional calls) have no mask to go by: they
    # count as dense, also where heads or whole blocks are cut and the smaller model computes fewer.
    flops[""] = total - sum(flops.values())
    for prefix, count in steps.items():
        counted = counter.get_flop_counts().get(f"{root}.{prefix}" if prefix else root, {})
        flops[""] -= sum(counted.values())
        for local, weight in recurrent[prefix].named_parameters(recurse=False):
            if local.startswith("weight_"):
                name = f"{prefix}.{local}" if prefix else local
                flops[name] = 2 * count * weight.numel()
    return flops


def masked_flops(dense: Mapping[str, int], mask: Mask | None) -> float:
    """FLOPs of one sample under a mask: each layer's dense count times the kept fraction of its weight.

    A layer that the mask does not cover (a constant one, or one that clients keep) counts in full.
    """
    if mask is None:
        return float(sum(dense.values()))
    return kept_flops(dense, mask.layout, mask.counts([name for name in dense if name in mask.layout.spans]))


def kept_flops(dense: Mapping[str, int], layout: Layout, kept: Mapping[str, float]) -> float:
    """As `masked_flops`, from the number of kept coordinates by tensor."""
    sizes = dict(zip(layout.names, layout.sizes, strict=True))
    return sum(
        count * (kept[name] / sizes[name] if name in kept and name in sizes else 1.0) for name, count in dense.items()
    )


# -- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClientMemory:
    """Bytes that a client needs for one training step. See `client_memory` for what each counts."""

    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


def activation_bytes(module: nn.Module, batch: Tensor, *, loss: Callable[[Tensor], Tensor]) -> int:
    """Bytes of the tensors that autograd saves in one training step, up to the loss, in eager torch.

    batch: (batch_size, *shape), values do not matter. loss: from the module's outputs to a scalar; targets are its
    own business, and count if they are saved. A storage counts once, however many operators saved it; parameters and
    buffers do not count, the batch and the targets do. `module` and the global generator are left alone.
    """
    module = copy.deepcopy(module).train()  # a step in training mode moves running statistics
    model = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in model:
            saved[storage.data_ptr()] = storage  # held, so that no later tensor gets the same address
        return tensor

    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        loss(module(batch.clone()))  # a view would count all of what it looks into
    return sum(storage.nbytes() for storage in saved.values())


def client_memory(
    module: nn.Module, *, activations: int, optimizer_states: int, mask: Mask | None = None
) -> ClientMemory:
    """The memory of one training step: the sum of weights, gradients, optimiser and activations, all alive at once.

    activations: from `activation_bytes`. optimizer_states: values that the optimiser keeps for each weight, 0 for
    SGD, 1 with momentum, 2 for Adam. mask: None means dense.

    Weights, gradients and states are float32 and counted where the mask keeps them, positions not included: like the
    FLOPs the theoretical figure of an unstructured mask, because dense kernels hold the zeros too. Buffers count
    with the weights, and so do constant parameters, which have no gradient. Left out: the data set, the
    framework, workspaces of kernels.
    """
    moving = {name: parameter.numel() for name, parameter in module.named_parameters() if parameter.requires_grad}
    kept = sum(moving.values())
    if mask is not None:
        kept += sum(mask.counts().values()) - sum(moving[name] for name in mask.layout.names)
    constant = sum(parameter.nbytes for parameter in module.parameters() if not parameter.requires_grad)
    return ClientMemory(
        weight_bytes=FLOAT_BYTES * kept + constant + sum(buffer.nbytes for buffer in module.buffers()),
        gradient_bytes=FLOAT_BYTES * kept,
        optimizer_bytes=FLOAT_BYTES * kept * optimizer_states,
        activation_bytes=activations,
    )


# -- time and energy -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Device:
    """A client's hardware. Profiles: conf/device.

    flops_per_s:  sustained in training, well below the peak of a data sheet.
    memory_bytes: what training may use.
    joules_per_flop, joules_per_byte_up, joules_per_byte_down: energy on top of an idle device.
    """

    name: str
    flops_per_s: float
    memory_bytes: int
    joules_per_flop: float
    joules_per_byte_up: float
    joules_per_byte_down: float

    def __post_init__(self) -> None:
        refuse(not self.name, "name", self.name, "it must not be empty")
        for field in ("flops_per_s", "memory_bytes"):
            _positive(getattr(self, field), field)
        for field in ("joules_per_flop", "joules_per_byte_up", "joules_per_byte_down"):
            _not_negative(getattr(self, field), field)


class Link(Protocol):
    """The connections of a population of clients. Profiles: conf/link."""

    def of(self, client: int, key: Key) -> FixedLink:
        """The connection of one client, the same in every round. key: that of the run, `Key.of(seed)`."""
        ...


@dataclass(frozen=True, kw_only=True)
class FixedLink:
    """Every client has the same connection.

    up_mbps, down_mbps: megabit (1e6 bit) per second. latency_s: seconds from sending to the first byte, one way.
    """

    up_mbps: float
    down_mbps: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        _check_link(self.up_mbps, self.down_mbps, self.latency_s)

    def of(self, client: int, key: Key) -> FixedLink:  # noqa: ARG002 - all clients are alike
        return self

    def seconds(self, num_bytes: float, mbps: float) -> float:
        """Of one transfer. Nothing sent takes no time, so a direction that a convention leaves out costs none."""
        return self.latency_s + num_bytes * 8 / (mbps * 1e6) if num_bytes else 0.0


@dataclass(frozen=True, kw_only=True)
class LogNormalLink:
    """Clients differ: both rates of a client are the medians times `exp(spread * z)`, z drawn once, standard normal.

    up_mbps, down_mbps: medians, megabit (1e6 bit) per second. latency_s: as in `FixedLink`, the same for all.
    spread: standard deviation of the rate's logarithm, 0 to 5; at 0.5 one client in six is below 0.61 medians.
    """

    up_mbps: float
    down_mbps: float
    latency_s: float = 0.0
    spread: float = 0.5

    def __post_init__(self) -> None:
        _check_link(self.up_mbps, self.down_mbps, self.latency_s)
        # Far beyond what links do, and no rate that is drawn comes near 0.
        rule = "it must be from 0 to 5; at 0.5 one client in six is below 0.61 medians"
        refuse(not 0 <= self.spread <= 5, "spread", self.spread, rule)

    def of(self, client: int, key: Key) -> FixedLink:
        factor = math.exp(self.spread * float(key.fold("link", client).numpy().standard_normal()))
        return FixedLink(up_mbps=self.up_mbps * factor, down_mbps=self.down_mbps * factor, latency_s=self.latency_s)


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """One client's round: download, training and upload one after the other. joules: energy of all three."""

    compute_s: float
    down_s: float
    up_s: float
    joules: float

    @property
    def seconds(self) -> float:
        return self.down_s + self.compute_s + self.up_s


def simulate(
    device: Device | None,
    link: Link | None,
    *,
    key: Key,
    client: int,
    train_flops: float,
    down_bytes: float,
    up_bytes: float,
) -> Simulated:
    """The time and energy of one client in one round.

    Without a device computing takes no time and nothing costs energy; without a link transfers take no time (with a
    device their energy counts). key: that of the run, `Key.of(seed)`. train_flops: of the client's training in the
    round. Left out: the server, contention between clients, evaluation.
    """
    own = link.of(client, key) if link is not None else None
    return Simulated(
        compute_s=train_flops / device.flops_per_s if device is not None else 0.0,
        down_s=own.seconds(down_bytes, own.down_mbps) if own is not None else 0.0,
        up_s=own.seconds(up_bytes, own.up_mbps) if own is not None else 0.0,
        joules=0.0
        if device is None
        else train_flops * device.joules_per_flop
        + down_bytes * device.joules_per_byte_down
        + up_bytes * device.joules_per_byte_up,
    )


def round_seconds(clients: Iterable[Simulated]) -> float:
    """A synchronous round waits for the slowest client; 0.0 without any."""
    return max((client.seconds for client in clients), default=0.0)


def _check_link(up_mbps: float, down_mbps: float, latency_s: float) -> None:
    _positive(up_mbps, "up_mbps")
    _positive(down_mbps, "down_mbps")
    _not_negative(latency_s, "latency_s")


def _positive(value: float, field: str) -> None:
    refuse(not (value > 0 and math.isfinite(value)), field, value, "it must be above 0 and finite")


def _not_negative(value: float, field: str) -> None:
    refuse(not (value >= 0 and math.isfinite(value)), field, value, "it must be at least 0 and finite")
