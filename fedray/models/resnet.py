"""Residual networks for small images. Input (batch, channels, height, width), output logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fedray.errors import ConfigError
from fedray.models.cnn import image_shape
from fedray.models.normalisation import Norm, check_norm, make_norm

Shortcut = Literal["projection", "padding"]


class ResNet(nn.Module):
    """He et al. 2016 for CIFAR: a 3x3 convolution, stages of two-convolution blocks, global mean pooling.

    Each stage but the first halves height and width. Counts on 3x32x32 with ten classes and batch normalisation:
    ResNet-20, blocks (3, 3, 3) of widths (16, 32, 64): 272,474 with projections (option B), 269,722 with padding (A);
    ResNet-8, blocks (1, 1, 1): 78,042 and 75,290; ResNet-18, blocks (2, 2, 2, 2) of widths (64, 128, 256, 512):
    11,173,962 with projections. GroupNorm has as many parameters and no running statistics.
    shortcut: where width or size change, "projection" is a 1x1 convolution with its norm (option B), "padding" takes
    every other pixel and adds zero channels (option A). groups: at most so many, see `normalisation.group_count`.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        num_classes: int,
        blocks: Sequence[int] = (3, 3, 3),
        widths: Sequence[int] = (16, 32, 64),
        norm: Norm = "group",
        groups: int = 8,
        shortcut: Shortcut = "projection",
    ) -> None:
        super().__init__()
        check_norm(norm, groups)
        if not blocks or len(blocks) != len(widths) or min(*blocks, *widths, 1) < 1:
            raise ConfigError(
                f"model.blocks is {list(blocks)} and model.widths is {list(widths)}; give one of each for every stage, "
                "all at least 1, as in model.blocks=[3,3,3] model.widths=[16,32,64]"
            )
        if shortcut not in ("projection", "padding"):
            raise ConfigError(f"model.shortcut is {shortcut!r}; choose projection or padding")
        if shortcut == "padding" and list(widths) != sorted(widths):
            raise ConfigError(
                f"model.widths is {list(widths)}; padding only adds channels, so let widths rise or write "
                "model.shortcut=projection"
            )
        channels, _, _ = image_shape(shape, "resnet", 2 ** len(blocks))
        self.conv = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.norm = make_norm(norm, widths[0], groups)
        found: list[nn.Module] = []
        before = widths[0]
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                found.append(_Block(before, width, stride, norm, groups, shortcut))
                before = width
        self.blocks = nn.Sequential(*found)
        self.fc = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.conv(x))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """Two convolutions beside a shortcut. `residual_branch` and `skipped` are for `find_structure`."""

    residual_branch: ClassVar = ("conv1", "norm1", "conv2", "norm2")

    def __init__(self, before: int, width: int, stride: int, norm: Norm, groups: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.norm1 = make_norm(norm, width, groups)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = make_norm(norm, width, groups)
        self.stride, self.added = stride, width - before
        self.skipped = False
        self.shortcut: nn.Module | None = None
        if shortcut == "projection" and (stride > 1 or self.added):
            projection = nn.Conv2d(before, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, make_norm(norm, width, groups))

    def forward(self, x: Tensor) -> Tensor:
        if self.skipped:
            return F.relu(self._identity(x))
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self._identity(x))

    def _identity(self, x: Tensor) -> Tensor:
        if self.shortcut is not None:
            return self.shortcut(x)  # type: ignore[no-any-return]
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.added)) if self.added else x
