"""Laws of `Dataset`: what cannot be trained on is refused by name, and the digest tells contents apart."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from fedray.data import Dataset
from fedray.errors import ConfigError


def arrays(**changes):
    """Arguments of `Dataset.of` for six training and three test samples of shape (2, 2), with changes."""
    base = {
        "name": "tiny",
        "train_x": np.arange(24, dtype=np.float32).reshape(6, 2, 2),
        "train_y": np.array([0, 1, 2, 0, 1, 2]),
        "test_x": np.ones((3, 2, 2), np.float32),
        "test_y": np.array([0, 1, 2]),
    }
    return {**base, **changes}


def with_value(value, at):
    x = arrays()["train_x"].copy()
    x[at, 1, 1] = value
    return x


def test_arrays_and_tensors_of_the_same_values_are_equal_data_sets():
    values = arrays()
    tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in values.items()}
    wide = {**values, "train_x": values["train_x"].astype(np.float64), "train_y": values["train_y"].astype(np.int32)}
    first = Dataset.of(**values)
    assert first == Dataset.of(**tensors) == Dataset.of(**wide)
    assert first.train_x.dtype == np.float32
    assert first.train_y.dtype == np.int64
    assert first.shape == (2, 2)
    assert first.num_classes == 3
    assert pickle.loads(pickle.dumps(first)) == first


def test_classes_that_only_the_test_set_has_are_counted():
    assert Dataset.of(**arrays(test_y=np.array([0, 1, 7]))).num_classes == 8


@pytest.mark.parametrize(
    "change",
    [
        {"train_x": with_value(0.5, 3)},
        {"train_y": np.array([0, 1, 2, 0, 2, 1])},
        {"test_x": np.zeros((3, 2, 2), np.float32)},
        {"test_y": np.array([0, 2, 1])},
        {"mean": (0.5,)},
        {"std": (0.5,)},
        {"scale": 0.5},
        {"num_classes": 4},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_change_of_what_a_model_sees_changes_the_digest(change):
    assert Dataset.of(**arrays(**change)).digest != Dataset.of(**arrays()).digest


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"train_x": with_value(np.nan, 4)}, "data.train_x holds NaN or infinity, first at sample 4; every value must"),
        ({"train_x": with_value(-np.inf, 2)}, "data.train_x holds NaN or infinity, first at sample 2; every value"),
        ({"train_x": np.full((6, 2, 2), 1e300)}, "data.train_x holds NaN or infinity, first at sample 0; every value"),
        ({"test_x": np.full((3, 2, 2), np.nan)}, "data.test_x holds NaN or infinity, first at sample 0; every value"),
        ({"train_y": np.array([0, 1, -1, 0, 1, 2])}, "data.train_y is -1 at sample 2; labels must lie from 0 to 2"),
        ({"num_classes": 2}, "data.train_y is 2 at sample 2; labels must lie from 0 to 1"),
        ({"test_y": np.array([0, 9, 2]), "num_classes": 3}, "data.test_y is 9 at sample 1; labels must lie from 0 to"),
        ({"train_y": np.array([0, 1])}, "data.train_x has 6 samples and data.train_y has 2 labels; give one label"),
        ({"train_y": np.zeros((6, 2), int)}, "data.train_y has type int64 and shape (6, 2); it must be int64 of shape"),
        ({"train_y": np.zeros(6)}, "data.train_y has type float64; labels must be integers"),
        ({"train_x": np.zeros((6, 2, 2), int)}, "data.train_x has type int64; it must be uint8 or a float type"),
        ({"train_x": [[1.0], [1.0, 2.0]]}, "data.train_x is not an array"),
        (
            {"train_x": np.zeros((0, 2, 2)), "train_y": np.zeros(0, int)},
            "data.train_x has no samples; a data set needs",
        ),
        ({"test_x": np.zeros((0, 2, 2)), "test_y": np.zeros(0, int)}, "data.test_x has no samples; a data set needs"),
        ({"test_x": np.ones((3, 2, 3))}, "data.test_x has samples of shape (2, 3) and type float32, data.train_x of"),
        (
            {"test_x": np.ones((3, 2, 2), np.uint8)},
            "data.test_x has samples of shape (2, 2) and type uint8, data.train_x",
        ),
        (
            {"mean": (0.0,) * 3},
            "data.mean has 3 values for samples of shape (2, 2); give one, or one for each of the 2",
        ),
        ({"std": (0.0,)}, "data.std is (0.0,); it must be finite and above 0"),
        ({"mean": (float("nan"),)}, "data.mean is (nan,); it must be finite"),
        ({"scale": 0.0}, "data.scale is 0.0; it must be above 0 and finite"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_by_name(change, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        Dataset.of(**arrays(**change))


def test_check_refuses_a_type_that_of_would_have_converted():
    dataset = Dataset.of(**arrays())
    double = Dataset(**{**vars(dataset), "train_x": dataset.train_x.astype(np.float64)})
    with pytest.raises(ConfigError, match=r"data\.train_x has type float64; it must be uint8 or float32"):
        double.check()


def test_a_bad_sample_is_found_beyond_the_first_chunk():
    x = np.zeros((5000, 1), np.float32)
    x[4500] = np.nan
    with pytest.raises(ConfigError, match="first at sample 4500"):
        Dataset.of(**arrays(train_x=x, train_y=np.zeros(5000, int), test_x=np.zeros((3, 1))))


def test_importing_the_package_imports_no_reader_and_no_torch():
    code = (
        "import sys, fedray; before = set(sys.modules); import fedray.data\n"
        "print({'torch', 'sklearn', 'pyarrow', 'PIL'} & (set(sys.modules) - before))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def tokens(**changes):
    base = {
        "name": "words",
        "train_x": np.array([[0, 1, 2], [1, 2, 3]], np.uint8),
        "train_y": np.array([[1, 2, 3], [2, 3, 0]]),
        "test_x": np.array([[3, 2, 1]], np.uint8),
        "test_y": np.array([[2, 1, 0]]),
        "objective": "next_token",
        "vocabulary": 4,
    }
    return {**base, **changes}


def test_tokens_owners_and_targets_change_the_digest_too():
    plain = Dataset.of(**tokens())
    assert plain.num_classes == 4
    assert Dataset.of(**tokens(vocabulary=5)).digest != plain.digest
    assert Dataset.of(**tokens(train_owner=[0, 1], test_owner=[1])).digest != plain.digest
    text = {"train_y": np.array([0, 1]), "test_y": np.array([0]), "num_classes": 4}
    classes = Dataset.of(**tokens(objective="classification", **text))
    assert classes.digest != Dataset.of(**tokens(objective="classification", vocabulary=5, **text)).digest


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"objective": "guess"}, "data.objective is 'guess'; choose classification, regression, next_token"),
        ({"num_classes": 5}, "data.num_classes is 5 and data.vocabulary is 4; the classes of next_token are the"),
        ({"train_x": np.array([[0, 1, 4], [1, 2, 3]])}, "data.train_x holds the token 4; tokens lie from 0 to 3"),
        ({"train_y": np.array([[1, 2, 3], [2, 3, 4]])}, "data.train_y is 4 at sample 1; labels must lie from 0 to 3"),
        (
            {"train_y": np.array([1, 2])},
            "data.train_y has type int64 and shape (2,); it must be int64 of shape (n, len",
        ),
        ({"train_x": np.array([[0.5, 1, 2]] * 2)}, "data.train_x has type float64; tokens must be integers from 0 on"),
        ({"train_owner": [0]}, "data.train_owner has type int64 and shape (1,); it must be int64 of shape (2,)"),
        ({"train_owner": [0, -1]}, "data.train_owner has type int64 and shape (2,); it must be int64 of shape (2,)"),
    ],
)
def test_wrong_tokens_and_owners_are_refused_by_name(change, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        Dataset.of(**tokens(**change))


def test_targets_of_a_regression_are_float32_of_two_dimensions_and_finite():
    settings = arrays(objective="regression", train_y=np.arange(6.0), test_y=np.arange(3.0))
    data = Dataset.of(**settings)
    assert (data.num_classes, data.train_y.shape, data.train_y.dtype) == (1, (6, 1), np.float32)
    labels, count = data.labels("train")
    assert (sorted(labels) == labels).all()
    assert (labels.min(), labels.max(), count) == (0, 9, 10)
    with pytest.raises(ConfigError, match=r"data\.train_y holds NaN or infinity, first at sample 2"):
        Dataset.of(**{**settings, "train_y": np.array([0, 1, np.nan, 3, 4, 5])})
    with pytest.raises(ConfigError, match=r"data\.test_y has type float32 and shape \(3, 2\); targets of a regression"):
        Dataset.of(**{**settings, "test_y": np.zeros((3, 2))})
