"""Small convolutional networks of the literature. Input (batch, channels, height, width), output logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fedray.errors import ConfigError


def image_shape(shape: tuple[int, ...], name: str, smallest: int) -> tuple[int, int, int]:
    """Channels, height and width of a sample; refuses what is no image of at least `smallest` pixels each way."""
    if len(shape) != 3 or min(shape[1:]) < smallest:
        raise ConfigError(
            f"model={name} needs images of at least {smallest}x{smallest} pixels, and the data has samples of shape "
            f"{shape}; use model=mlp or other data"
        )
    return shape[0], shape[1], shape[2]


class LeNet(nn.Module):
    """LeNet-5 with ReLU and max pooling: 44,426 parameters on 1x28x28, 62,006 on 3x32x32 with ten classes.

    LeCun et al. 1998, in the variant of NIID-Bench (Li et al. 2022): 6 and 16 filters of 5x5, then 120, 84.
    """

    def __init__(self, *, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape(shape, "lenet", 16)
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2), 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        # Pooling before the ReLU gives the same numbers and leaves it a quarter of the work.
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2)).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))  # type: ignore[no-any-return]


class SmallCNN(nn.Module):
    """Two convolutions and two linear layers: 21,840 parameters on 1x28x28 with ten classes, 21,750 of them weights.

    5x5 convolutions with 10 and 20 channels, each with 2x2 max pooling, then 50 units. LotteryFL (Li et al. 2021)
    counts its MNIST bytes on it.
    """

    def __init__(self, *, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape(shape, "small_cnn", 16)
        self.conv1 = nn.Conv2d(channels, 10, 5)
        self.conv2 = nn.Conv2d(10, 20, 5)
        self.fc1 = nn.Linear(20 * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2), 50)
        self.fc2 = nn.Linear(50, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2)).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))  # type: ignore[no-any-return]


class McMahanCNN(nn.Module):
    """The CNN of McMahan et al. 2017, section 3: 1,663,370 parameters on 1x28x28 with ten classes.

    5x5 convolutions with 32 and 64 channels, each with 2x2 max pooling, then a layer of 512 units.
    """

    def __init__(self, *, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape(shape, "mcmahan_cnn", 4)
        self.conv1 = nn.Conv2d(channels, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.fc1 = nn.Linear(64 * (height // 4) * (width // 4), 512)
        self.fc2 = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2)).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))  # type: ignore[no-any-return]


class BatchNormCNN(nn.Module):
    """Two 3x3 convolutions with batch normalisation, pooling and one linear layer.

    Its running statistics are buffers: they go through the round as a part of their own and are averaged.
    """

    def __init__(self, *, shape: tuple[int, ...], num_classes: int, width: int = 16) -> None:
        super().__init__()
        if width < 1:
            raise ConfigError(f"model.width is {width}; it is a number of channels, at least 1")
        channels, height, width_pixels = image_shape(shape, "batchnorm_cnn", 4)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * width)
        self.fc = nn.Linear(2 * width * (height // 4) * (width_pixels // 4), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2).flatten(1)
        return self.fc(x)  # type: ignore[no-any-return]
