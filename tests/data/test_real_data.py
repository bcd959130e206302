"""Real data sets in the layouts in which they are shared; opt-in, for they are no part of the project."""

from __future__ import annotations

import numpy as np
import pytest

from fedray.data import hub, shakespeare

pytestmark = pytest.mark.data


def test_mnist_has_its_70000_digits_and_the_statistics_of_the_literature(data_folder):
    pytest.importorskip("pyarrow")
    data = hub(name="mnist", path=str(data_folder / "mnist"))
    assert (data.train_x.shape, data.test_x.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    assert np.bincount(data.train_y).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    measured = hub(name="mine", path=str(data_folder / "mnist"))
    assert np.allclose([measured.mean, measured.std], [data.mean, data.std], atol=5e-5)


def test_cifar10_has_its_60000_images_and_the_statistics_of_the_literature(data_folder):
    pytest.importorskip("pyarrow")
    columns = {"image": "img", "label": "label"}
    data = hub(name="cifar10", path=str(data_folder / "cifar10"))
    assert (data.train_x.shape, data.test_x.shape) == ((50000, 3, 32, 32), (10000, 3, 32, 32))
    assert np.bincount(data.train_y).tolist() == [5000] * 10
    assert np.bincount(data.test_y).tolist() == [1000] * 10
    measured = hub(name="mine", path=str(data_folder / "cifar10"), columns=columns)
    # The copy is JPEG, which smooths a little.
    assert np.allclose([measured.mean, measured.std], [data.mean, data.std], atol=3e-3)


def test_shakespeare_has_its_roles_and_its_65_characters(data_folder):
    data = shakespeare(path=str(data_folder / "shakespeare"), min_chars=2000)
    said = (data_folder / "shakespeare" / "input.txt").read_text()
    assert data.objective == "next_token"
    assert 60 <= data.vocabulary <= len(set(said)) == 65
    assert set(data.train_owner) == set(data.test_owner) == set(range(data.train_owner.max() + 1))
    assert 80 < data.train_owner.max() + 1 < 200
    # Samples of one role in order are its text: the targets of one go on as the inputs of the next.
    mine = data.train_x[data.train_owner == 0]
    assert np.array_equal(data.train_y[data.train_owner == 0][:-1, -1], mine[1:, 0])
