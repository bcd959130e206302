"""What can be seen of a model without training it: gradients, curvature, and the flow without data.

The engine's own gradient is recorded or by autograd; what is here needs a graph that can be differentiated again, or
float64, and so always goes through autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedray.errors import ConfigError, NumericError
from fedray.keys import Key
from fedray.models.task import Objective, constants, float_buffers, trainable
from fedray.round import Loss
from fedray.tree import Layout


def chosen(targets: Tensor, key: Key, *, batch_size: int | None, per_class: int | None) -> Tensor:
    """Positions of the examples that a probe looks at, int64, in the order of a keyed permutation.

    targets:    of all examples, (m,) or (m, ...). batch_size: how many at most; None for all.
    per_class:  so many of each class instead, or all of a class that has fewer.
    Raises ConfigError where classes are wanted of targets that are none.
    """
    order = key.permutation(len(targets))
    if per_class is None:
        return order[:batch_size]
    if targets.dim() != 1 or targets.is_floating_point():
        raise ConfigError(
            f"a batch of {per_class} examples of each class is wanted, and these data have no classes; take a batch "
            "of any examples, as in pruner.per_class=null"
        )
    shuffled = targets.cpu()[order]
    rows = [(shuffled == label).nonzero().flatten()[:per_class] for label in torch.unique(shuffled)]
    return order[torch.cat(rows).sort().values] if rows else order


def add_curvature(
    module: nn.Module, objective: Objective, x: Tensor, y: Tensor, loss: Loss, vector: list[Tensor]
) -> None:
    """Add to each parameter's `grad` the Hessian of the mean loss of a batch times a vector, by double backward.

    vector: one tensor per trainable parameter, with its shape.
    Raises ConfigError for a model that PyTorch cannot differentiate twice.
    """
    params = list(trainable(module).values())
    try:
        with torch.enable_grad(), _twice_differentiable():
            value = objective.loss(module(x), y, loss)
            first = torch.autograd.grad(value, params, create_graph=True, allow_unused=True)
            products = [(a * b).sum() for a, b in zip(first, vector, strict=True) if a is not None]
            # `backward` and not `grad`: the latter passes by what refuses a second derivative, and gives zeros.
            torch.stack(products).sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "is not implemented" not in str(error) and "differentiate twice" not in str(error):
            raise
        raise ConfigError(
            f"the model is {type(module).__name__}; PyTorch cannot differentiate it twice ({error}), and curvature is "
            "wanted of it: take a pruner that looks at gradients alone, such as pruner=snip"
        ) from error


def flow(
    module: nn.Module, weights: list[Tensor], shape: tuple[int, ...], device: torch.device, layout: Layout
) -> Tensor:
    """|w * dR/d|w|| over its largest value, float64, flat in logical order; see round.Flow.

    module: in evaluation mode, with its buffers loaded; nothing in it is written to.
    weights: one per trainable parameter, with its shape. shape: of one sample.
    Raises NumericError where the flow is beyond float64, ConfigError for a model that is bound to float32.
    """
    magnitudes = [weight.detach().double().abs().contiguous().requires_grad_() for weight in weights]
    stand_in = dict(zip(trainable(module), magnitudes, strict=True))
    others = {name: value.double().abs() for name, value in constants(module).items()}
    others |= {name: value.double() for name, value in float_buffers(module).items()}
    ones = torch.ones(1, *shape, dtype=torch.float64, device=device)
    try:
        # cuDNN has no backward for recurrent layers in evaluation mode.
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
            total = functional_call(module, {**stand_in, **others}, (ones,)).sum()
            slopes = torch.autograd.grad(total, magnitudes, materialize_grads=True)
    except RuntimeError as error:
        raise ConfigError(
            f"the model is {type(module).__name__}; its flow without data is computed in float64, and it cannot be "
            f"({error}): take a pruner that looks at data, such as pruner=snip"
        ) from error
    # Slopes below zero come from layers that subtract, such as a GroupNorm, or from activations that fall.
    score = torch.cat([(a.detach() * b).abs().reshape(-1) for a, b in zip(magnitudes, slopes, strict=True)])
    if not bool(score.isfinite().all()):
        name = layout.locate(int((~score.isfinite()).nonzero()[0]))
        raise NumericError(
            f"the flow through tensor {name!r} is beyond float64: the model is too deep, or its weights are too large, "
            "for a score without data; take a pruner that looks at data, such as pruner=snip"
        )
    largest = score.max() if score.numel() else score.new_ones(())
    return score / largest if largest > 0 else score


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Fused kernels of attention and recurrent layers have one derivative; their plain forms have all."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield
