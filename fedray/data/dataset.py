"""A data set in memory (or mapped from a file): arrays, how to normalise them, and a digest of all that."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedray.errors import ConfigError

_CHUNK = 4096  # samples looked at together, so that checking a mapped file does not load it whole


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Training and test samples with integer labels. Nobody writes into the arrays.

    train_x, test_x: uint8 or float32, shape (n, *shape); images are channel-first, (n, C, H, W).
    train_y, test_y: int64, shape (n,), from 0 to num_classes - 1. The test set is the global one.
    mean, std:       one per channel, or one for all; what a model sees is (x * scale - mean) / std in float32.
    scale:           1/255 for images in uint8.
    digest:          hex blake2b of the arrays and of how they are normalised; part of a run's id. Two data sets
                     are equal if their names and digests are.
    """

    name: str
    train_x: np.ndarray = field(repr=False, compare=False)
    train_y: np.ndarray = field(repr=False, compare=False)
    test_x: np.ndarray = field(repr=False, compare=False)
    test_y: np.ndarray = field(repr=False, compare=False)
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1.0
    digest: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample, (C, H, W) for images."""
        return tuple(self.train_x.shape[1:])

    @classmethod
    def of(
        cls,
        *,
        name: str,
        train_x: Any,
        train_y: Any,
        test_x: Any,
        test_y: Any,
        num_classes: int | None = None,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        scale: float = 1.0,
    ) -> Dataset:
        """A checked data set from NumPy arrays or torch tensors.

        Samples of any float type become float32, labels of any integer type int64. num_classes: None for one more
        than the largest label. Raises ConfigError as `check` does, and for types that cannot be converted.
        """
        train_x, test_x = _samples("train_x", train_x), _samples("test_x", test_x)
        train_y, test_y = _labels("train_y", train_y), _labels("test_y", test_y)
        if num_classes is None:
            num_classes = 1 + max((int(y.max()) for y in (train_y, test_y) if y.size), default=-1)
        mean, std = tuple(float(m) for m in mean), tuple(float(s) for s in std)
        content = digest_arrays(train_x, train_y, test_x, test_y)
        dataset = cls(
            name=name,
            train_x=train_x,
            train_y=train_y,
            test_x=test_x,
            test_y=test_y,
            num_classes=num_classes,
            mean=mean,
            std=std,
            scale=float(scale),
            digest=seal(content, num_classes=num_classes, mean=mean, std=std, scale=float(scale)),
        )
        dataset.check()
        return dataset

    def check(self) -> None:
        """Raise ConfigError, in one sentence that names array and sample, if the data cannot be trained on."""
        for split in ("train", "test"):
            self._check_split(split, getattr(self, f"{split}_x"), getattr(self, f"{split}_y"))
        if self.test_x.shape[1:] != self.train_x.shape[1:] or self.test_x.dtype != self.train_x.dtype:
            raise ConfigError(
                f"data.test_x has samples of shape {self.test_x.shape[1:]} and type {self.test_x.dtype}, data.train_x "
                f"of shape {self.train_x.shape[1:]} and type {self.train_x.dtype}; give both the same"
            )
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"data.scale is {self.scale}; it must be above 0 and finite, such as 1/255 for uint8")
        channels = self.shape[0] if self.shape else 1
        for which, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise ConfigError(
                    f"data.{which} has {len(values)} values for samples of shape {self.shape}; give one, or one for "
                    f"each of the {channels} channels"
                )
            if not all(math.isfinite(v) and (which == "mean" or v > 0) for v in values):
                rule = "it must be finite" if which == "mean" else "it must be finite and above 0"
                raise ConfigError(f"data.{which} is {values}; {rule}, so leave out or rescale a constant channel")

    def _check_split(self, split: str, x: np.ndarray, y: np.ndarray) -> None:
        if x.dtype not in (np.uint8, np.float32):
            raise ConfigError(f"data.{split}_x has type {x.dtype}; it must be uint8 or float32, so convert it")
        if y.dtype != np.int64 or y.ndim != 1:
            raise ConfigError(
                f"data.{split}_y has type {y.dtype} and shape {y.shape}; it must be int64 of shape (n,), one class "
                "index for each sample"
            )
        if len(x) != len(y):
            raise ConfigError(
                f"data.{split}_x has {len(x)} samples and data.{split}_y has {len(y)} labels; give one label for each"
            )
        if len(y) == 0:
            raise ConfigError(f"data.{split}_x has no samples; a data set needs at least one to {split} on")
        outside = np.flatnonzero((y < 0) | (y >= self.num_classes))
        if outside.size:
            raise ConfigError(
                f"data.{split}_y is {y[outside[0]]} at sample {outside[0]}; labels must lie from 0 to "
                f"{self.num_classes - 1}, so renumber them, drop unlabelled samples or raise num_classes"
            )
        if x.dtype == np.float32:
            for start in range(0, len(x), _CHUNK):
                finite = np.isfinite(x[start : start + _CHUNK]).reshape(len(x[start : start + _CHUNK]), -1).all(axis=1)
                if not finite.all():
                    raise ConfigError(
                        f"data.{split}_x holds NaN or infinity, first at sample {start + int(np.argmin(finite))}; "
                        "every value must be finite, so repair or drop such samples"
                    )


def digest_arrays(*arrays: np.ndarray) -> str:
    """Hex blake2b of types, shapes and values, in this order."""
    state = hashlib.blake2b(digest_size=16)
    for array in arrays:
        state.update(f"{array.dtype.str}{array.shape};".encode())
        state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def seal(content: str, *, num_classes: int, mean: tuple[float, ...], std: tuple[float, ...], scale: float) -> str:
    """The digest of a data set: that of its arrays, and of everything that changes what a model sees of them."""
    text = f"{content};{num_classes};{mean!r};{std!r};{scale!r}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _array(which: str, value: Any) -> np.ndarray:
    torch = sys.modules.get("torch")  # whoever hands in a tensor has imported it
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    try:
        return np.asarray(value)
    except ValueError as error:  # ragged nested lists
        raise ConfigError(f"data.{which} is not an array ({error}); give all samples the same shape") from error


def _samples(which: str, value: Any) -> np.ndarray:
    array = _array(which, value)
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ConfigError(f"data.{which} has type {array.dtype}; it must be uint8 or a float type, so convert it")
    with np.errstate(over="ignore"):  # beyond float32 becomes infinity, which `check` refuses by name
        return array.astype(np.float32, copy=False)


def _labels(which: str, value: Any) -> np.ndarray:
    array = _array(which, value)
    if not np.issubdtype(array.dtype, np.integer):
        raise ConfigError(f"data.{which} has type {array.dtype}; labels must be integers, one class index per sample")
    return array.astype(np.int64, copy=False)
