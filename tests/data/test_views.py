"""Laws of local tests: they follow a client's training labels, have its share of the test set, and are its own."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fedray.data import Dirichlet, histogram, local_tests
from fedray.data.partition import Natural
from fedray.data.views import carve_validation
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


TRAIN_OWNER = np.arange(6000) * 7 % 13
TEST_OWNER = np.arange(1000) * 5 % 17


@pytest.mark.parametrize("num_clients", [13, 4])
def test_where_clients_are_owners_they_are_tested_on_what_their_owners_made(num_clients):
    natural = Natural()
    parts = natural(TRAIN, num_clients=num_clients, num_classes=10, key=Key.of(0), owners=TRAIN_OWNER)
    tests = owned(parts, TEST_OWNER)
    for part, test in zip(parts, tests, strict=True):
        assert test.dtype == np.int64
        assert np.array_equal(test, np.flatnonzero(np.isin(TEST_OWNER, TRAIN_OWNER[part])))
    # The owners 13 to 16 made test samples alone: nobody is tested on them.
    assert np.array_equal(np.sort(np.concatenate(tests)), np.flatnonzero(TEST_OWNER < 13))


def owned(parts, test_owner, train_owner=TRAIN_OWNER):
    return local_tests(
        train_labels=TRAIN,
        parts=parts,
        test_labels=TEST,
        num_classes=10,
        key=Key.of(0),
        train_owner=train_owner,
        test_owner=test_owner,
    )


def test_a_client_whose_owners_the_test_set_lacks_is_refused():
    parts = [np.flatnonzero(TRAIN_OWNER == owner) for owner in range(13)]
    with pytest.raises(ConfigError, match=re.escape("2 of 13 clients, client 11 among them, have no owner in the")):
        owned(parts, TEST_OWNER % 11)


def test_where_owners_are_divided_or_unknown_labels_decide():
    for tests in (owned(PARTS, TEST_OWNER), owned(PARTS, None), owned(PARTS, TEST_OWNER, train_owner=None)):
        assert all(np.array_equal(a, b) for a, b in zip(tests, view(), strict=True))


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.99])
def test_validation_is_carved_out_of_training_with_its_label_proportions(fraction):
    training, validation = carve_validation(PARTS, TRAIN, 10, fraction, Key.of(0))
    for part, kept, held in zip(PARTS, training, validation, strict=True):
        assert np.array_equal(np.sort(np.concatenate([kept, held])), part)
        assert (np.diff(kept) > 0).all()
        assert (np.diff(held) > 0).all()
        assert len(kept) >= 1
        assert len(held) == min(max(1, round(len(part) * fraction)), len(part) - 1)
    have, whole = histogram(TRAIN, validation, 10), histogram(TRAIN, PARTS, 10)
    quota = whole * have.sum(axis=1, keepdims=True) / whole.sum(axis=1, keepdims=True)
    assert (abs(have - quota) < 1).all()


def test_no_fraction_holds_nothing_back():
    training, validation = carve_validation(PARTS, TRAIN, 10, 0, Key.of(0))
    assert all(np.array_equal(a, b) for a, b in zip(training, PARTS, strict=True))
    assert all(part.shape == (0,) and part.dtype == np.int64 for part in validation)


def test_a_client_with_one_sample_trains_on_it_and_one_with_two_gives_one():
    training, validation = carve_validation([np.array([7]), np.array([3, 4000])], TRAIN, 10, 0.9, Key.of(0))
    assert [len(part) for part in training] == [1, 1]
    assert [len(part) for part in validation] == [0, 1]


def test_what_a_client_holds_back_depends_on_its_rows_its_place_and_the_key_alone():
    held = carve_validation(PARTS, TRAIN, 10, 0.3, Key.of(0))[1]
    again = carve_validation([PARTS[0], PARTS[5], *PARTS[2:]], TRAIN, 10, 0.3, Key.of(0))[1]
    assert all(np.array_equal(held[client], again[client]) for client in range(40) if client != 1)
    other = carve_validation(PARTS, TRAIN, 10, 0.3, Key.of(1))[1]
    assert not any(np.array_equal(a, b) for a, b in zip(held, other, strict=True) if len(a) > 5)
    twins = carve_validation([PARTS[0], PARTS[0]], TRAIN, 10, 0.3, Key.of(0))[1]
    assert not np.array_equal(*twins)


def test_what_is_held_back_of_a_label_is_drawn():
    (held,) = carve_validation([np.arange(600)], TRAIN, 10, 0.5, Key.of(0))[1]
    assert 100 < (held < 300).sum() < 200


@pytest.mark.parametrize("fraction", [1, -0.1, float("nan")])
def test_a_fraction_that_leaves_no_training_is_refused(fraction):
    with pytest.raises(ConfigError, match=f"the validation fraction is {fraction}; it must be at least 0 and below 1"):
        carve_validation(PARTS, TRAIN, 10, fraction, Key.of(0))
