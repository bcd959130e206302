"""Feature skew: every client sees its samples in its own way.

A skew is a value called with a batch as the model sees it, that is normalised. It is pure: what becomes of a sample
depends on the client, the sample's place among the client's samples and the key, not on the batch that it is in.
What belongs to a client is the same for all its samples; what belongs to a sample also depends on `kind`, which tells
training, held-out and test samples apart, as their places coincide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fedray.errors import ConfigError
from fedray.keys import Key

_STEPS = 1 << 16  # equally likely values of a noise variable
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Skew(Protocol):
    """Changes the samples of a client; returns new ones of the same shape and leaves `x` as it is."""

    def __call__(
        self, x: Tensor, *, positions: Tensor, size: int, client: int, num_clients: int, key: Key, kind: str = "train"
    ) -> Tensor:
        """
        x:         float32 (batch, *shape), normalised.
        positions: int64 (batch,), the place of each among the client's samples, from 0 to size - 1.
        client:    from 0 to num_clients - 1. kind: "train", "held" or "test".
        """
        ...

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ConfigError if samples of this shape cannot be skewed so."""
        ...


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Gaussian noise that grows with the client's number: its standard deviation is std * (client + 1) / num_clients
    (NIID-Bench, Li et al. 2022, section 4.2: `noise-based feature imbalance`).

    A normal variable here has 65,536 equally likely values, so that the same bits come out wherever it is drawn.

    std: of the last client, at least 0, in units of the model's input; the paper has 0.1.
    """

    std: float = 0.1

    def __post_init__(self) -> None:
        _refuse_outside("std", self.std, 0.0, math.inf, "0.1 as in NIID-Bench")

    def check(self, shape: tuple[int, ...]) -> None:
        if not shape:
            raise ConfigError("skew is Noise and samples are single numbers; they need a shape, so take skew=none")

    def __call__(
        self,
        x: Tensor,
        *,
        positions: Tensor,
        size: int,  # noqa: ARG002
        client: int,
        num_clients: int,
        key: Key,
        kind: str = "train",
    ) -> Tensor:
        if self.std == 0:
            return x.clone()
        values = _normal(positions, math.prod(x.shape[1:]), key.fold("noise", client, kind)).view_as(x)
        return torch.add(x, values, alpha=self.std * (client + 1) / num_clients)


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Images turned counter-clockwise by an angle of the client or of its group: degrees * group / groups.

    With degrees=360 and groups=4 these are the four quarter turns of clustered federated learning (Ghosh et al. 2020,
    section 6: rotated MNIST). Quarter turns of square images are exact; others are bilinear, and what comes in from
    outside repeats the border.

    degrees: the full range of angles, from -360 to 360; the last group stays one step below it.
    groups:  client c is in group c modulo groups; None gives every client an angle of its own.
    """

    degrees: float = 360.0
    groups: int | None = 4

    def __post_init__(self) -> None:
        _refuse_outside("degrees", self.degrees, -360.0, 360.0, "360")
        if self.groups is not None and (not _is_int(self.groups) or self.groups < 1):
            raise ConfigError(
                f"skew.groups is {self.groups!r}; it must be a whole number of at least 1, or null for one of each "
                "client"
            )

    def check(self, shape: tuple[int, ...]) -> None:
        _refuse_no_image("Rotation", shape)

    def angle(self, client: int, num_clients: int) -> float:
        """Of a client, in degrees."""
        groups = num_clients if self.groups is None else self.groups
        return self.degrees * (client % groups) / groups

    def __call__(
        self,
        x: Tensor,
        *,
        positions: Tensor,  # noqa: ARG002
        size: int,  # noqa: ARG002
        client: int,
        num_clients: int,
        key: Key,  # noqa: ARG002
        kind: str = "train",  # noqa: ARG002
    ) -> Tensor:
        degrees = self.angle(client, num_clients)
        turns, rest = divmod(degrees, 90.0)
        if rest == 0 and (x.shape[2] == x.shape[3] or turns % 2 == 0):
            return torch.rot90(x, int(turns) % 4, (2, 3)).clone(memory_format=torch.contiguous_format)
        angle = math.radians(degrees)
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        return _resampled(x, turn)


@dataclass(frozen=True, kw_only=True)
class Affine:
    """A hand of its own for each client: slant, size, contrast and inversion, drawn once per client from the key.

    This imitates writers and cameras and is synthetic: no paper's data set, and no substitute for natural clients.

    shear_degrees: the slant is drawn evenly from -shear_degrees to shear_degrees; from 0 to below 90.
    scale:         logarithm of the largest magnification, drawn evenly from -scale to scale; at least 0.
    contrast:      likewise for the factor on the values, around the mean colour.
    inversion:     probability that a client's images are inverted: a value v becomes lowest + highest - v, taken in
                   each image; from 0 to 1.
    """

    shear_degrees: float = 20.0
    scale: float = 0.2
    contrast: float = 0.5
    inversion: float = 0.0

    def __post_init__(self) -> None:
        _refuse_outside("shear_degrees", self.shear_degrees, 0.0, 89.0, "20")
        _refuse_outside("scale", self.scale, 0.0, 3.0, "0.2 for up to a fifth")
        _refuse_outside("contrast", self.contrast, 0.0, 3.0, "0.5")
        _refuse_outside("inversion", self.inversion, 0.0, 1.0, "0.5 for every other client")

    def check(self, shape: tuple[int, ...]) -> None:
        _refuse_no_image("Affine", shape)

    def hand(self, client: int, key: Key) -> tuple[float, float, float, bool]:
        """Of a client: slant in degrees, magnification, contrast, and whether it inverts."""
        slant, size, contrast, invert = key.fold("affine", client).numpy().random(4).tolist()
        return (
            self.shear_degrees * (2 * slant - 1),
            math.exp(self.scale * (2 * size - 1)),
            math.exp(self.contrast * (2 * contrast - 1)),
            invert < self.inversion,
        )

    def __call__(
        self,
        x: Tensor,
        *,
        positions: Tensor,  # noqa: ARG002
        size: int,  # noqa: ARG002
        client: int,
        num_clients: int,  # noqa: ARG002
        key: Key,
        kind: str = "train",  # noqa: ARG002
    ) -> Tensor:
        slant, magnification, contrast, inverts = self.hand(client, key)
        if inverts:
            x = x.amin((1, 2, 3), keepdim=True) + x.amax((1, 2, 3), keepdim=True) - x
        if slant or magnification != 1:
            hand = torch.tensor([[1.0, math.tan(math.radians(slant))], [0.0, 1.0]])
            x = _resampled(x, hand / magnification)
        return x * contrast


def _resampled(x: Tensor, matrix: Tensor) -> Tensor:
    """Images whose pixel at p, counted from the centre, is that of `x` at matrix @ p; bilinear.

    matrix: float32 (2, 2), on (right, down) in pixels.
    """
    count, _, height, width = x.shape
    if count == 0:
        return x.clone()
    # grid_sample counts each axis from -1 to 1, which only for square images are the same units.
    ratio = torch.tensor([[1.0, height / width], [width / height, 1.0]])
    theta = torch.cat([matrix * ratio, torch.zeros(2, 1)], dim=1).to(x)
    grid = F.affine_grid(theta.expand(1, 2, 3), [1, 1, height, width], align_corners=False)
    grid = grid.expand(count, height, width, 2)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _normal(positions: Tensor, width: int, key: Key) -> Tensor:
    """A standard normal variable for each element of each sample: float32, shape (batch, width).

    Counter-based: element e of sample p is a function of (key, p, e) alone, by integer arithmetic and a table.
    """
    words = -(-width // 4)  # each gives four values of 16 bits
    counter = positions.to(torch.int64)[:, None] * words + torch.arange(words, device=positions.device)
    bits = _splitmix(counter, key.seed)
    shifts = torch.tensor([0, 16, 32, 48], device=bits.device)
    index = (bits[..., None] >> shifts) & (_STEPS - 1)
    return _quantiles().to(bits.device)[index.view(len(positions), words * 4)[:, :width]]


def _splitmix(counter: Tensor, seed: int) -> Tensor:
    """64 bits for each counter: the output function of SplitMix64 (Steele et al. 2014), in wrapping int64."""
    z = counter * _signed(_GOLDEN) + _signed(seed)
    z = (z ^ _logical(z, 30)) * _signed(_MIX1)
    z = (z ^ _logical(z, 27)) * _signed(_MIX2)
    return z ^ _logical(z, 31)


def _logical(z: Tensor, places: int) -> Tensor:
    return (z >> places) & ((1 << (64 - places)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


@cache
def _quantiles() -> Tensor:
    """The middles of equally likely steps of a standard normal variable, scaled to variance 1: float32 (65536,)."""
    middles = (torch.arange(_STEPS, dtype=torch.float64) + 0.5) / _STEPS
    values = torch.special.ndtri(middles)
    scaled: Tensor = values / values.square().mean().sqrt()
    return scaled.float()


def _refuse_no_image(name: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 3:
        raise ConfigError(
            f"skew is {name} and samples have shape {shape}; it needs images of shape (channels, height, width), so "
            "take skew=noise or skew=none"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _refuse_outside(field: str, value: Any, low: float, high: float, remedy: str) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not low <= value <= high or not math.isfinite(value):
        bounds = f"at least {low:g} and finite" if high == math.inf else f"from {low:g} to {high:g}"
        raise ConfigError(f"skew.{field} is {value!r}; it must be {bounds}, such as {remedy}")
