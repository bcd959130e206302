"""Linear models and multi-layer perceptrons."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from fedray.errors import ConfigError


class MLP(nn.Module):
    """Flatten, then linear layers with ReLU between. `hidden=(200, 200)` on 28x28 is the 2NN of McMahan 2017.

    shape: of one sample. Input (batch, *shape), output logits (batch, num_classes).
    """

    def __init__(self, *, shape: tuple[int, ...], num_classes: int, hidden: Sequence[int] = (200, 200)) -> None:
        super().__init__()
        if any(width < 1 for width in hidden):
            raise ConfigError(
                f"model.hidden is {list(hidden)}; every width must be at least 1, as in model.hidden=[200,200]"
            )
        layers: list[nn.Module] = [nn.Flatten()]
        for width_in, width_out in itertools.pairwise([math.prod(shape), *hidden, num_classes]):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Linear(nn.Module):
    """Flatten, then one linear layer: logistic regression, or linear regression on a regression's data.

    shape: of one sample. Input (batch, *shape), output (batch, num_classes).
    """

    def __init__(self, *, shape: tuple[int, ...], num_classes: int, bias: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(math.prod(shape), num_classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))  # type: ignore[no-any-return]
