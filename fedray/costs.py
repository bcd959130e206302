"""What a model costs under a mask: parameters and FLOPs.

FLOPs count two for a multiply-add, in matrix products and convolutions only (torch's FlopCounterMode), for one
sample. Under a mask each layer's count is multiplied by the kept fraction of its weight: the theoretical count of
an unstructured mask, which dense kernels do not turn into time. A training step costs three forward passes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedray.tree import Mask

TRAIN_FACTOR = 3
"""Forward, gradient of the inputs, gradient of the weights: each about one forward pass."""


def forward_flops(module: nn.Module, sample: Tensor) -> dict[str, int]:
    """Dense FLOPs of one sample by the name of the weight that causes them. sample: (1, *shape)."""
    from torch.utils.flop_counter import FlopCounterMode

    weights = {prefix: f"{prefix}.weight" if prefix else "weight" for prefix, _ in module.named_modules()}
    known = {name for name, _ in module.named_parameters()}
    was_training = module.training
    module.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(sample)
    module.train(was_training)
    flops: dict[str, int] = {}
    root = type(module).__name__
    for path, by_operator in counter.get_flop_counts().items():
        if path in ("Global", root):
            continue
        name = weights.get(path.removeprefix(f"{root}."))
        if name in known:
            flops[str(name)] = sum(by_operator.values())
    total = counter.get_total_flops()
    # Products outside a layer with a weight of its own (attention scores, functional calls) are never pruned.
    flops[""] = total - sum(flops.values())
    return flops


def masked_flops(dense: Mapping[str, int], mask: Mask | None) -> float:
    """FLOPs of one sample under a mask: each layer's dense count times the kept fraction of its weight."""
    if mask is None:
        return float(sum(dense.values()))
    kept = mask.counts([name for name in dense if name])
    sizes = dict(zip(mask.layout.names, mask.layout.sizes, strict=True))
    return sum(count * (kept[name] / sizes[name] if name else 1.0) for name, count in dense.items())
