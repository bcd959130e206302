"""VGG-11 for images of 32x32 and more. Input (batch, channels, height, width), output logits."""

from __future__ import annotations

import math

from torch import Tensor, nn

from fedray.models.cnn import image_shape
from fedray.models.normalisation import Norm, check_norm, make_norm

WIDTHS = (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)  # 0 stands for 2x2 max pooling


class VGG11(nn.Module):
    """VGG-11 with two hidden layers of 512 units: 9,750,922 parameters on 3x32x32 with ten classes and norm "none".

    Simonyan & Zisserman 2015, configuration A, in the CIFAR variant that FedNova (Wang et al. 2020) trains:
    convolutions with biases and no normalisation, dropout before both hidden layers. Without norms the convolutions
    start with a deviation of sqrt(2 / (9 * out_channels)) and zero biases (He et al. 2015, equation 14).
    norm: none | batch | group, after every convolution. groups: at most so many, see `normalisation.group_count`.
    dropout: the probability of a zero in training, 0 for none.
    """

    def __init__(
        self, *, shape: tuple[int, ...], num_classes: int, norm: Norm = "none", groups: int = 32, dropout: float = 0.5
    ) -> None:
        super().__init__()
        check_norm(norm, groups)
        channels, height, width = image_shape(shape, "vgg11", 32)
        layers: list[nn.Module] = []
        for out in WIDTHS:
            if not out:
                layers.append(nn.MaxPool2d(2))
                continue
            layers.append(nn.Conv2d(channels, out, 3, padding=1))
            if norm != "none":
                layers.append(make_norm(norm, out, groups))
            layers.append(nn.ReLU())
            channels = out
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(512 * (height // 32) * (width // 32), 512),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, num_classes),
        )

        if norm == "none":
            # By the default initialisation eleven layers without norms let hardly any signal through.
            for layer in self.features:
                if isinstance(layer, nn.Conv2d):
                    nn.init.normal_(layer.weight, std=math.sqrt(2 / (9 * layer.out_channels)))
                    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]
