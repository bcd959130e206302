"""What a model is made of, and what stands between a foreign model and a task."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fedray.errors import ConfigError
from fedray.models.task import LAYERS


def head_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of the last linear or convolutional layer, in the order of definition.

    It is what a transfer replaces. A tied head has the name of the tensor that it shares. Empty without such a layer.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    layers = [child for child in module.modules() if isinstance(child, LAYERS)]
    if not layers:
        return ()
    return tuple(names[id(parameter)] for parameter in layers[-1].parameters(recurse=False))


class Logits(nn.Module):
    """The tensor `.logits` of a module that returns an object, as those of transformers do.

    A module that returns a tensor is taken as it is. Its tensors have the names `module.<name>`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        outputs: Any = self.module(x)
        if isinstance(outputs, Tensor):
            return outputs
        if not hasattr(outputs, "logits"):
            raise ConfigError(
                f"the model {type(self.module).__name__} returns a {type(outputs).__name__} without logits; choose one "
                "with a head, such as AutoModelForSequenceClassification"
            )
        return outputs.logits  # type: ignore[no-any-return]
