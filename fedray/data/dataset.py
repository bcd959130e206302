"""A data set in memory (or mapped from a file): arrays, what they mean to a model, and a digest of all that."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from fedray.errors import ConfigError

Kind = Literal["classification", "regression", "next_token"]
_MOST_INT32 = 2**31 - 1
_CHUNK = 4096  # samples looked at together, so that checking a mapped file does not load it whole


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Training and test samples with their targets. Nobody writes into the arrays.

    objective:       "classification": targets int64 (n,), from 0 to num_classes - 1;
                     "regression": targets float32 (n, num_classes), num_classes being the number of outputs;
                     "next_token": targets int64 (n, length), each sample's tokens one place further, num_classes
                     being the vocabulary.
    train_x, test_x: uint8 or float32, shape (n, *shape); images are channel-first, (n, C, H, W). Tokens are uint8 or
                     int32, shape (n, length), from 0 to vocabulary - 1. The test set is the global one.
    vocabulary:      how many tokens there are; None where samples are no tokens. Tokens reach a model as int64.
    train_owner, test_owner: who made each sample, int64 (n,), the same numbers in both; None where nobody did.
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
    objective: Kind = "classification"
    vocabulary: int | None = None
    train_owner: np.ndarray | None = field(default=None, repr=False, compare=False)
    test_owner: np.ndarray | None = field(default=None, repr=False, compare=False)

    def labels(self, split: Literal["train", "test"]) -> tuple[np.ndarray, int]:
        """What partitions skew by: int64 (n,), and how many labels there are.

        The class; for a regression the decile of the first output among the training targets; for next tokens 0.
        """
        y = self.train_y if split == "train" else self.test_y
        if self.objective == "classification":
            return y, self.num_classes
        if self.objective == "regression":
            edges = np.quantile(self.train_y[:, 0], np.linspace(0, 1, 11)[1:-1])
            return np.searchsorted(edges, y[:, 0], side="right").astype(np.int64), 10
        return np.zeros(len(y), np.int64), 1

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
        objective: Kind = "classification",
        vocabulary: int | None = None,
        train_owner: Any = None,
        test_owner: Any = None,
    ) -> Dataset:
        """A checked data set from NumPy arrays or torch tensors.

        Samples of any float type become float32, labels and owners of any integer type int64, targets of a regression
        float32 of two dimensions. num_classes: None for one more than the largest label, the vocabulary, or the
        number of outputs. Raises ConfigError as `check` does, and for types that cannot be converted.
        """
        tokens = vocabulary is not None
        train_x, test_x = _samples("train_x", train_x, tokens=tokens), _samples("test_x", test_x, tokens=tokens)
        target = _outputs if objective == "regression" else _labels
        train_y, test_y = target("train_y", train_y), target("test_y", test_y)
        if num_classes is None and objective == "next_token":
            num_classes = vocabulary or 0
        elif num_classes is None and objective == "regression":
            num_classes = train_y.shape[1]
        elif num_classes is None:
            num_classes = 1 + max((int(y.max()) for y in (train_y, test_y) if y.size), default=-1)
        if train_owner is not None:
            train_owner = _labels("train_owner", train_owner)
        if test_owner is not None:
            test_owner = _labels("test_owner", test_owner)
        mean, std = tuple(float(m) for m in mean), tuple(float(s) for s in std)
        owners = [owner for owner in (train_owner, test_owner) if owner is not None]
        content = digest_arrays(train_x, train_y, test_x, test_y, *owners)
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
            digest=seal(
                content,
                num_classes=num_classes,
                mean=mean,
                std=std,
                scale=float(scale),
                objective=objective,
                vocabulary=vocabulary,
            ),
            objective=objective,
            vocabulary=vocabulary,
            train_owner=train_owner,
            test_owner=test_owner,
        )
        dataset.check()
        return dataset

    def check(self) -> None:
        """Raise ConfigError, in one sentence that names array and sample, if the data cannot be trained on."""
        if self.objective not in get_args(Kind):
            raise ConfigError(f"data.objective is {self.objective!r}; choose {', '.join(get_args(Kind))}")
        if self.objective == "next_token" and self.num_classes != self.vocabulary:
            raise ConfigError(
                f"data.num_classes is {self.num_classes} and data.vocabulary is {self.vocabulary}; the classes of "
                "next_token are the tokens, so give both the same number"
            )
        for split in ("train", "test"):
            self._check_split(split, getattr(self, f"{split}_x"), getattr(self, f"{split}_y"))
            self._check_owner(split, getattr(self, f"{split}_owner"), len(getattr(self, f"{split}_y")))
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
        types = (np.uint8, np.float32) if self.vocabulary is None else (np.uint8, np.int32)
        if x.dtype not in types:
            raise ConfigError(
                f"data.{split}_x has type {x.dtype}; it must be {types[0].__name__} or {types[1].__name__}"
                f"{' for tokens' if self.vocabulary else ''}, so convert it"
            )
        if len(x) != len(y):
            raise ConfigError(
                f"data.{split}_x has {len(x)} samples and data.{split}_y has {len(y)} labels; give one label for each"
            )
        if len(y) == 0:
            raise ConfigError(f"data.{split}_x has no samples; a data set needs at least one to {split} on")
        if self.objective == "regression":
            self._check_outputs(split, y)
        else:
            self._check_labels(split, x, y)
        if self.vocabulary is not None:
            if x.ndim != 2:
                raise ConfigError(f"data.{split}_x has shape {x.shape}; tokens have shape (n, length)")
            most = int(x.max())
            if most >= self.vocabulary or int(x.min()) < 0:
                raise ConfigError(
                    f"data.{split}_x holds the token {most if most >= self.vocabulary else int(x.min())}; tokens lie "
                    f"from 0 to {self.vocabulary - 1}, so raise data.vocabulary or renumber them"
                )
        if x.dtype == np.float32:
            self._check_finite(f"{split}_x", x)

    def _check_outputs(self, split: str, y: np.ndarray) -> None:
        if y.dtype != np.float32 or y.ndim != 2 or y.shape[1] != self.num_classes:
            raise ConfigError(
                f"data.{split}_y has type {y.dtype} and shape {y.shape}; targets of a regression must be float32 of "
                f"shape (n, {self.num_classes})"
            )
        self._check_finite(f"{split}_y", y)

    def _check_labels(self, split: str, x: np.ndarray, y: np.ndarray) -> None:
        wanted = x.shape if self.objective == "next_token" else x.shape[:1]
        if y.dtype != np.int64 or y.shape != wanted:
            shape, each = ("(n, length)", "position") if self.objective == "next_token" else ("(n,)", "sample")
            raise ConfigError(
                f"data.{split}_y has type {y.dtype} and shape {y.shape}; it must be int64 of shape {shape}, one class "
                f"index for each {each}"
            )
        outside = np.flatnonzero(((y < 0) | (y >= self.num_classes)).reshape(-1))
        if outside.size:
            first = outside[0]
            raise ConfigError(
                f"data.{split}_y is {y.reshape(-1)[first]} at sample {first * len(y) // y.size}; labels must lie from "
                f"0 to {self.num_classes - 1}, so renumber them, drop unlabelled samples or raise num_classes"
            )

    def _check_owner(self, split: str, owner: np.ndarray | None, count: int) -> None:
        if owner is None:
            return
        if owner.dtype != np.int64 or owner.shape != (count,) or owner.min() < 0:
            raise ConfigError(
                f"data.{split}_owner has type {owner.dtype} and shape {owner.shape}; it must be int64 of shape "
                f"({count},), from 0 on"
            )

    def _check_finite(self, which: str, values: np.ndarray) -> None:
        for start in range(0, len(values), _CHUNK):
            piece = values[start : start + _CHUNK]
            finite = np.isfinite(piece).reshape(len(piece), -1).all(axis=1)
            if not finite.all():
                raise ConfigError(
                    f"data.{which} holds NaN or infinity, first at sample {start + int(np.argmin(finite))}; "
                    "every value must be finite, so repair or drop such samples"
                )


def digest_arrays(*arrays: np.ndarray) -> str:
    """Hex blake2b of types, shapes and values, in this order."""
    state = hashlib.blake2b(digest_size=16)
    for array in arrays:
        state.update(f"{array.dtype.str}{array.shape};".encode())
        state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def seal(
    content: str,
    *,
    num_classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    scale: float,
    objective: Kind = "classification",
    vocabulary: int | None = None,
) -> str:
    """The digest of a data set: that of its arrays, and of everything that changes what a model sees of them."""
    text = f"{content};{num_classes};{mean!r};{std!r};{scale!r}"
    if objective != "classification" or vocabulary is not None:
        text += f";{objective};{vocabulary}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _array(which: str, value: Any) -> np.ndarray:
    torch = sys.modules.get("torch")  # whoever hands in a tensor has imported it
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    try:
        return np.asarray(value)
    except ValueError as error:  # ragged nested lists
        raise ConfigError(f"data.{which} is not an array ({error}); give all samples the same shape") from error


def _samples(which: str, value: Any, *, tokens: bool) -> np.ndarray:
    array = _array(which, value)
    if array.dtype == np.uint8:
        return array
    if tokens:
        if not np.issubdtype(array.dtype, np.integer) or (
            array.size and (array.max() > _MOST_INT32 or array.min() < 0)
        ):
            raise ConfigError(f"data.{which} has type {array.dtype}; tokens must be integers from 0 on")
        return array.astype(np.int32, copy=False)
    if not np.issubdtype(array.dtype, np.floating):
        raise ConfigError(f"data.{which} has type {array.dtype}; it must be uint8 or a float type, so convert it")
    with np.errstate(over="ignore"):  # beyond float32 becomes infinity, which `check` refuses by name
        return array.astype(np.float32, copy=False)


def _labels(which: str, value: Any) -> np.ndarray:
    array = _array(which, value)
    if not np.issubdtype(array.dtype, np.integer):
        raise ConfigError(f"data.{which} has type {array.dtype}; labels must be integers, one class index per sample")
    return array.astype(np.int64, copy=False)


def _outputs(which: str, value: Any) -> np.ndarray:
    array = _array(which, value)
    if not np.issubdtype(array.dtype, np.floating):
        raise ConfigError(f"data.{which} has type {array.dtype}; targets of a regression must be of a float type")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    return array[:, None] if array.ndim == 1 else array
