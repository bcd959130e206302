"""Augmentation of training images: what a batch looks like is drawn anew each time that it is trained on.

Stages are values called with images as the model sees them, that is normalised, and with a generator; they return new
images and change nothing. All samples of a batch are done at once, and each is drawn for itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fedray.errors import ConfigError


class Stage(Protocol):
    """One kind of change to images."""

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """x: float32 (n, C, H, W), on the generator's device. Returns the same shape; x stays as it is."""
        ...


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A window of the image's size out of the image with a margin, at a random place (He et al. 2016, section 4.2).

    padding: width of the margin in pixels, above 0 and below 128.
    fill:    its value, in the model's units: 0 is the mean colour, (0 - mean) / std is black.
    reflect: whether the margin shows the image's own border mirrored, and `fill` is not used. The border's outermost
             line is not repeated, so that `padding` must be below the image's height and width.
    """

    padding: int = 4
    fill: float = 0.0
    reflect: bool = False

    def __post_init__(self) -> None:
        if not _is_int(self.padding) or not 0 < self.padding < 128:
            raise ConfigError(
                f"augment.crop.padding is {self.padding!r}; it must be a whole number from 1 to 127, such as 4"
            )
        if not _is_real(self.fill) or not math.isfinite(self.fill):
            raise ConfigError(
                f"augment.crop.fill is {self.fill!r}; it must be a finite number, such as 0 for the mean colour"
            )
        if not isinstance(self.reflect, bool):
            raise ConfigError(f"augment.crop.reflect is {self.reflect!r}; it must be true or false")

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ConfigError if images of this shape have no such margin."""
        if self.reflect and self.padding >= min(shape[1:]):
            raise ConfigError(
                f"augment.crop.padding is {self.padding} and reflects images of {shape[1]}x{shape[2]}; it must be "
                "below both, so make it smaller or set augment.crop.reflect=false"
            )

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        count, channels, height, width = x.shape
        if count == 0:
            return x.clone()
        margin = (self.padding,) * 4
        padded = F.pad(x, margin, "reflect") if self.reflect else F.pad(x, margin, value=self.fill)
        down, right = self._places(count, generator).unbind(1)
        tall, wide = padded.shape[2:]
        lines = torch.arange(count * channels, device=x.device).view(count, channels, 1) * tall
        lines = lines + torch.arange(height, device=x.device) + down[:, None, None]
        starts = (lines * wide + right[:, None, None]).flatten()
        # Every stretch of `width` values, of which each line of a window is one: lines are copied whole.
        return padded.flatten().unfold(0, width, 1).index_select(0, starts).view_as(x)

    def _places(self, count: int, generator: torch.Generator) -> Tensor:
        """The upper left corner of each window in its padded image: int64, shape (count, 2), rows first."""
        return torch.randint(0, 2 * self.padding + 1, (count, 2), generator=generator, device=generator.device)


@dataclass(frozen=True, kw_only=True)
class Flip:
    """Left and right exchanged, in a share of the images.

    probability: of each image, from 0 to 1.
    """

    probability: float = 0.5

    def __post_init__(self) -> None:
        if not _is_real(self.probability) or not 0 <= self.probability <= 1:
            raise ConfigError(f"augment.flip.probability is {self.probability!r}; it must lie from 0 to 1, such as 0.5")

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return torch.where(self._turned(len(x), generator).view(-1, 1, 1, 1), x.flip(3), x)

    def _turned(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.rand(count, generator=generator, device=generator.device) < self.probability


@dataclass(frozen=True, kw_only=True)
class Cutout:
    """A square of each image set to the mean colour. Its centre is any pixel, so it may lie partly outside (DeVries and
    Taylor 2017, section 3.2).

    size: side of the square in pixels, at least 1; the paper has 16 for CIFAR-10 and 8 for CIFAR-100.
    """

    size: int = 16

    def __post_init__(self) -> None:
        if not _is_int(self.size) or self.size < 1:
            raise ConfigError(
                f"augment.cutout.size is {self.size!r}; it must be a whole number of at least 1, such as 16"
            )

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        height, width = x.shape[2:]
        draws = self._centres(len(x), height, width, generator)
        hidden = [
            (place >= start) & (place < start + self.size)
            for start, place in (
                (draws[:, axis, None] - self.size // 2, torch.arange(extent, device=x.device))
                for axis, extent in enumerate((height, width))
            )
        ]
        return x.masked_fill(hidden[0][:, None, :, None] & hidden[1][:, None, None, :], 0.0)

    def _centres(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Row and column: int64, shape (count, 2)."""
        place = torch.rand(count, 2, generator=generator, device=generator.device, dtype=torch.float64)
        return (place * torch.tensor([height, width], device=place.device)).long()


@dataclass(frozen=True)
class Augment:
    """Stages one after the other; without any, images stay as they are."""

    stages: tuple[Stage, ...] = ()

    @classmethod
    def of(cls, stages: Mapping[str, Any], group: str = "augment") -> Augment:
        """These stages in their order, by the names under which the configuration has them; None is left out.

        Raises ConfigError.
        """
        for name, stage in stages.items():
            if stage is not None and not callable(stage):
                raise ConfigError(
                    f"{group}.{name} is {stage!r}; it must be a stage such as fedray.data.augment.Crop, or null"
                )
        return cls(tuple(stage for stage in stages.values() if stage is not None))

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ConfigError if samples of this shape cannot be augmented."""
        if self.stages and len(shape) != 3:
            raise ConfigError(
                f"augment has {len(self.stages)} stages and samples have shape {shape}; they need images of shape "
                "(channels, height, width), so take augment=none"
            )
        for stage in self.stages:
            if isinstance(stage, Crop):
                stage.check(shape)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """x: float32 (n, C, H, W), on the generator's device. Returns the same shape; x stays as it is."""
        for stage in self.stages:
            x = stage(x, generator)
        return x


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
