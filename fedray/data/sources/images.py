"""Images as uint8 arrays, channel first: decoding, grey and RGB, sizes, statistics."""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from fedray.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

Mode = Literal["grey", "rgb"]
_CHUNK = 1024  # images worked on together
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "La", "RGBa", "CMYK", "YCbCr", "HSV")


def decode_image(data: bytes, where: str) -> np.ndarray:
    """Pixels of an image file in bytes: uint8 (1, H, W) where it is grey, (3, H, W) else.

    Transparency is laid on white, as a page shows it. Raises ConfigError for damaged files and more than 8 bits.
    """
    from PIL import Image as pillow

    try:
        with pillow.open(io.BytesIO(data)) as image:
            image.load()
            mode = image.mode
            if mode in _EIGHT_BIT:
                pixels = np.asarray(_plain(image))
    except Exception as error:  # whatever a decoder raises on bad bytes
        raise ConfigError(
            f"data.path has an image that cannot be decoded in {where} ({_first_line(error)}); fetch the file anew or "
            "drop the image"
        ) from error
    if mode not in _EIGHT_BIT:
        raise ConfigError(
            f"data.path has an image of mode {mode} in {where}; only 8 bits per channel are read, so convert it"
        )
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _plain(image: Image.Image) -> Image.Image:
    """The same image in mode L or RGB."""
    from PIL import Image as pillow

    if image.mode in ("L", "RGB"):
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("LA", "La", "RGBA", "PA", "RGBa") or "transparency" in image.info:
        grey = image.mode in ("LA", "La")
        image = image.convert("RGBA")
        page = pillow.new("RGBA", image.size, (255, 255, 255, 255))
        return pillow.alpha_composite(page, image).convert("L" if grey else "RGB")
    return image.convert("RGB")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def recolour(x: np.ndarray, mode: Mode | None) -> np.ndarray:
    """Images (..., C, H, W) with one channel for "grey", three for "rgb"; None leaves them.

    Grey is 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), rounded.
    """
    channels = x.shape[-3]
    if mode == "grey" and channels == 3:
        red, green, blue = (x[..., i, :, :].astype(np.uint32) for i in range(3))
        return ((red * 299 + green * 587 + blue * 114 + 500) // 1000).astype(np.uint8)[..., None, :, :]
    if mode == "rgb" and channels == 1:
        return np.repeat(x, 3, axis=-3)
    return x


def resize(x: np.ndarray, size: int | None) -> np.ndarray:
    """Images (..., H, W), uint8, at size x size: bilinear, and over the whole area where they shrink; None leaves them.

    Each output pixel is a triangle-weighted mean around its centre, as of PIL's BILINEAR and of torch's
    `interpolate(mode="bilinear", antialias=True)`.
    """
    height, width = x.shape[-2:]
    if size is None or (height, width) == (size, size):
        return x
    rows, columns = _weights(height, size), _weights(width, size)
    resized = np.empty((*x.shape[:-2], size, size), np.uint8)
    flat, out = x.reshape(-1, height, width), resized.reshape(-1, size, size)
    for start in range(0, len(flat), _CHUNK):
        values = rows @ flat[start : start + _CHUNK].astype(np.float64) @ columns.T
        out[start : start + _CHUNK] = np.clip(np.rint(values), 0, 255)
    return resized


@lru_cache(maxsize=256)
def _weights(before: int, after: int) -> np.ndarray:
    """How much each of `before` pixels has in each of `after`: float64 (after, before), rows sum to one."""
    step = before / after
    reach = max(step, 1.0)
    centres = (np.arange(after)[:, None] + 0.5) * step
    weights = np.maximum(0.0, 1.0 - np.abs(np.arange(before) + 0.5 - centres) / reach)
    weights /= weights.sum(axis=1, keepdims=True)
    weights.setflags(write=False)
    return weights


def fit(x: np.ndarray, size: int | None, mode: Mode | None) -> np.ndarray:
    """Images (n, C, H, W) recoloured and resized, in pieces."""
    if not len(x) or (size is None and mode is None):
        return x
    return np.concatenate([resize(recolour(x[i : i + _CHUNK], mode), size) for i in range(0, len(x), _CHUNK)])


def stack(
    images: Iterable[tuple[bytes, str]], *, count: int, file: Path, size: int | None, mode: Mode | None
) -> np.ndarray:
    """Encoded images, each with where it lies, as one mapped array (count, C, H, W)."""
    x: np.ndarray | None = None
    for row, (data, where) in enumerate(images):
        image = resize(recolour(decode_image(data, where), mode), size)
        if x is None:
            x = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=(count, *image.shape))
        if image.shape != x.shape[1:]:
            raise ConfigError(
                f"data.path has an image of shape {image.shape} in {where}; all must have the shape {x.shape[1:]} of "
                "the first, so set data.size=32 to resize all of them"
                f"{', or data.mode=grey or rgb' if image.shape[0] != x.shape[1] else ''}"
            )
        x[row] = image
    assert x is not None
    return x


def statistics(x: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel (axis 1) of what a model sees before it is normalised.

    uint8 is scaled by 1/255 and summed exactly; other types are summed in float64. A channel that never changes has
    the standard deviation 1.
    """
    if x.dtype == np.uint8:
        return pixel_statistics(x, scale=1 / 255)
    axes, shape = (0, *range(2, x.ndim)), (1, x.shape[1]) + (1,) * (x.ndim - 2)
    count = x.size / x.shape[1]

    def total(power: int, centre: np.ndarray) -> np.ndarray:
        sums = np.zeros(x.shape[1])
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused by `Dataset.check`
            for i in range(0, len(x), _CHUNK):
                sums += ((x[i : i + _CHUNK].astype(np.float64) - centre) ** power).sum(axis=axes)
        return sums

    mean = total(1, np.zeros(shape)) / count
    std = np.sqrt(total(2, mean.reshape(shape)) / count)
    return tuple(mean.tolist()), tuple(np.where(std == 0, 1.0, std).tolist())


def pixel_statistics(x: np.ndarray, *, scale: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`statistics` of uint8 after scaling, from exact integer sums."""
    means, stds = [], []
    for channel in range(x.shape[1]):
        count = np.bincount(x[:, channel].reshape(-1), minlength=256).tolist()
        total = sum(count)
        first = sum(value * n for value, n in enumerate(count))
        second = sum(value * value * n for value, n in enumerate(count))
        means.append(scale * first / total)
        stds.append(scale * (total * second - first * first) ** 0.5 / total or 1.0)
    return tuple(means), tuple(stds)
