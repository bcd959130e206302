"""Tiny data sets of every kind, as sources for a configuration; they take the settings of digits and read none."""

import numpy as np

from fedray.data import Dataset


def images(*, size: int, channels: int = 3, **_: object) -> Dataset:
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (40, channels, size, size), dtype=np.uint8)
    y = np.arange(40) % 4
    return Dataset.of(name="images", train_x=x[:32], train_y=y[:32], test_x=x[32:], test_y=y[32:], scale=1 / 255)


def tokens(*, classes: bool, **_: object) -> Dataset:
    random = np.random.default_rng(0)
    text = random.integers(0, 11, (40, 13), dtype=np.uint8)
    x, following = text[:, :-1], text[:, 1:].astype(np.int64)
    y = np.arange(40) % 4 if classes else following
    return Dataset.of(
        name="tokens",
        train_x=x[:32],
        train_y=y[:32],
        test_x=x[32:],
        test_y=y[32:],
        objective="classification" if classes else "next_token",
        vocabulary=11,
    )


def numbers(**_: object) -> Dataset:
    random = np.random.default_rng(0)
    x = random.normal(size=(40, 6)).astype(np.float32)
    y = (x @ random.normal(size=(6, 2))).astype(np.float32)
    return Dataset.of(
        name="numbers", train_x=x[:32], train_y=y[:32], test_x=x[32:], test_y=y[32:], objective="regression"
    )
