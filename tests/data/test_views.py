"""Laws of local tests: they follow a client's training labels, have its share of the test set, and are its own."""

from __future__ import annotations

import time

import numpy as np
import pytest

from fedray.data import Dirichlet, histogram, local_tests
from fedray.errors import ConfigError
from fedray.keys import Key

TRAIN = np.repeat(np.arange(10), 600)
TEST = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 100))
PARTS = Dirichlet(alpha=0.3)(TRAIN, num_clients=40, num_classes=10, key=Key.of(0))


def view(parts=PARTS, train_labels=TRAIN, test_labels=TEST, seed=0):
    return local_tests(
        train_labels=train_labels, parts=parts, test_labels=test_labels, num_classes=10, key=Key.of(seed)
    )


def test_local_tests_follow_label_proportions_to_within_one_sample():
    tests = view()
    have, train = histogram(TEST, tests, 10), histogram(TRAIN, PARTS, 10)
    sizes = have.sum(axis=1, keepdims=True)
    quota = train * sizes / train.sum(axis=1, keepdims=True)
    assert (abs(have - quota) < 1).all()
    assert (have[train == 0] == 0).all()


def test_local_tests_have_the_clients_share_of_the_test_set():
    assert [len(t) for t in view()] == [max(1, round(len(part) / 6)) for part in PARTS]


def test_a_client_with_one_sample_is_tested_on_one_of_its_label():
    (test,) = view([np.array([1300])])
    assert TEST[test].tolist() == [2]


def test_no_test_sample_occurs_twice_at_a_client():
    assert all((np.diff(test) > 0).all() and test.dtype == np.int64 for test in view())


def test_a_clients_test_depends_on_its_place_and_data_and_the_key_alone():
    tests, again, other = view(), view(), view(seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(tests, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(tests, other, strict=True))
    changed = view([PARTS[0], PARTS[5], *PARTS[2:]])
    assert all(np.array_equal(tests[client], changed[client]) for client in range(40) if client != 1)
    twins = view([PARTS[0], PARTS[0]])
    assert not np.array_equal(*twins)


def test_one_client_with_everything_is_tested_on_everything():
    skewed = np.concatenate([TEST[:500], np.full(20, 3)])  # not the label proportions of training
    assert np.array_equal(view([np.arange(6000)], test_labels=skewed)[0], np.arange(520))


def test_other_labels_of_a_client_make_up_for_a_scarce_one():
    scarce = np.concatenate([np.zeros(5, int), np.ones(995, int)])
    (test,) = view([np.arange(1200)], test_labels=scarce)  # 600 of label 0 and of label 1, so 200 test samples
    assert np.bincount(scarce[test]).tolist() == [5, 195]


def test_a_client_whose_labels_the_test_set_lacks_is_refused():
    with pytest.raises(ConfigError, match=r"client 1 trains on labels \[9\] alone and the test set has none of them"):
        view([np.arange(10), np.arange(5990, 6000)], test_labels=TEST[TEST != 9])


def test_a_thousand_clients_are_viewed_within_a_second():
    train, test = np.repeat(np.arange(10), 6000), np.repeat(np.arange(10), 1000)
    parts = Dirichlet(alpha=0.3)(train, num_clients=1000, num_classes=10, key=Key.of(0))
    start = time.perf_counter()
    view(parts, train, test)
    assert time.perf_counter() - start < 1
