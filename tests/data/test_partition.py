"""Laws of partitions: disjoint, complete where promised, a function of the key, always ending, skewed as asked."""

from __future__ import annotations

import json
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.data import Classes, Dirichlet, Iid, Shards, histogram, manifest
from fedray.data.partition import apportion
from fedray.errors import ConfigError
from fedray.keys import Key

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 200))
PARTITIONS = [
    Iid(),
    Dirichlet(alpha=0.1),
    Dirichlet(alpha=0.3, min_size=15),
    Shards(),
    Shards(per_client=3),
    Classes(),
    Classes(classes=3, samples=4),
]
COMPLETE = [p for p in PARTITIONS if getattr(p, "samples", None) is None]


def deal(partition, labels=LABELS, num_clients=50, num_classes=10, seed=0):
    return partition(labels, num_clients=num_clients, num_classes=num_classes, key=Key.of(seed))


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
def test_parts_are_disjoint_sorted_and_not_empty(partition):
    parts = deal(partition)
    assert len(parts) == 50
    assert all(part.dtype == np.int64 and len(part) and (np.diff(part) > 0).all() for part in parts)
    every = np.concatenate(parts)
    assert len(np.unique(every)) == len(every)


@pytest.mark.parametrize("partition", COMPLETE, ids=str)
def test_every_sample_is_dealt(partition):
    assert np.array_equal(np.sort(np.concatenate(deal(partition))), np.arange(len(LABELS)))


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
def test_the_same_key_deals_the_same_and_another_key_does_not(partition):
    assert same(deal(partition), deal(partition))
    assert not same(deal(partition), deal(partition, seed=1))


@pytest.mark.parametrize("partition", [Iid(), Dirichlet(alpha=0.3), Classes(), Classes(samples=4)], ids=str)
def test_which_samples_of_a_class_a_client_gets_is_drawn(partition):
    labels = np.sort(LABELS)  # so that a class handed out in order gives runs of indices
    parts = deal(partition, labels, num_clients=20)
    runs = [np.diff(part[labels[part] == label]).max(initial=1) == 1 for part in parts for label in range(10)]
    shared = [(labels[part] == label).sum() > 1 for part in parts for label in range(10)]
    assert np.mean(np.array(runs)[shared]) < 0.2


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
def test_the_labels_are_not_written_to(partition):
    labels = LABELS.copy()
    labels.flags.writeable = False
    deal(partition, labels)


@settings(max_examples=40, deadline=None)
@given(
    alpha=st.floats(0.01, 100),
    num_clients=st.integers(1, 2000),
    class_sizes=st.lists(st.integers(0, 400), min_size=1, max_size=12),
    min_size=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
def test_dirichlet_always_ends_with_min_size_for_everyone(alpha, num_clients, class_sizes, min_size, seed):
    labels = np.repeat(np.arange(len(class_sizes)), class_sizes)
    num_clients = min(num_clients, len(labels) // min_size)
    if num_clients == 0:
        return
    parts = deal(Dirichlet(alpha=alpha, min_size=min_size), labels, num_clients, len(class_sizes), seed)
    assert min(len(part) for part in parts) >= min_size
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))


@pytest.mark.parametrize("alpha", [1e-300, 1e-6, 0.01, 1e6])
@pytest.mark.parametrize("num_clients", [1, 7, 2000])
def test_dirichlet_ends_at_extreme_alphas(alpha, num_clients):
    parts = deal(Dirichlet(alpha=alpha), num_clients=num_clients)
    assert min(len(part) for part in parts) >= 1
    assert sum(len(part) for part in parts) == len(LABELS)


def test_topping_up_takes_from_the_largest_clients_only():
    parts = deal(Dirichlet(alpha=0.01, min_size=20), num_clients=90)
    loose = deal(Dirichlet(alpha=0.01), num_clients=90)
    sizes, loose_sizes = (np.array([len(part) for part in each]) for each in (parts, loose))
    assert sizes.min() == 20
    assert sizes.max() < loose_sizes.max()
    assert (sizes == sizes.max()).sum() > 1  # levelled


def test_no_sample_is_moved_where_drawing_anew_is_enough(monkeypatch):
    draws = []
    draw = Dirichlet._draw
    monkeypatch.setattr("fedray.data.partition._top_up", lambda *_: pytest.fail("topped up"))
    monkeypatch.setattr(Dirichlet, "_draw", lambda *arguments: draws.append(1) or draw(*arguments))
    for seed in range(10):
        deal(Dirichlet(alpha=0.1, min_size=10), num_clients=10, seed=seed)
    assert len(draws) > 10


def test_all_of_the_data_can_be_the_minimum():
    assert {len(part) for part in deal(Dirichlet(alpha=0.1, min_size=40))} == {40}


def mean_skew(parts):
    """Mean over clients of the largest label share: 0.1 without skew, 1 with one label each."""
    shares = histogram(LABELS, parts, 10) / np.array([[len(part)] for part in parts])
    return shares.max(axis=1).mean()


def test_skew_grows_as_alpha_falls():
    skews = [mean_skew(deal(Dirichlet(alpha=alpha), num_clients=20)) for alpha in (100, 10, 1, 0.3, 0.1, 0.01)]
    assert skews == sorted(skews)
    assert skews[0] < 0.2
    assert skews[-1] > 0.8


def test_clients_with_an_average_share_get_no_more_classes():
    parts = deal(Dirichlet(alpha=0.1), num_clients=20)
    counts = histogram(LABELS, parts, 10)
    before = np.cumsum(counts, axis=1) - counts
    assert (counts[before >= len(LABELS) / 20] == 0).all()


def test_moderate_shares_have_the_mean_and_spread_of_the_dirichlet_distribution():
    labels = np.zeros(200_000, np.int64)  # one class: no client is full before it is dealt
    shares = [len(part) / len(labels) for seed in range(60) for part in deal(Dirichlet(alpha=0.5), labels, 5, 1, seed)]
    assert np.mean(shares) == pytest.approx(1 / 5)
    assert np.var(shares) == pytest.approx((1 / 5) * (4 / 5) / (5 * 0.5 + 1), rel=0.2)


def test_iid_sizes_differ_by_one_at_most_and_are_600_in_the_usual_case():
    labels = np.zeros(60_000, np.int64)
    assert {len(part) for part in deal(Iid(), labels, 100, 1)} == {600}
    assert {len(part) for part in deal(Iid(), labels[:1007], 10, 1)} == {100, 101}


def test_iid_gives_everybody_about_every_class():
    assert (histogram(LABELS, deal(Iid(), num_clients=10), 10) > 0).all()


@pytest.mark.parametrize("per_client", [1, 2, 4])
def test_shards_have_equal_sizes_and_one_class_each(per_client):
    parts = deal(Shards(per_client=per_client))
    assert {len(part) for part in parts} == {40}
    classes = (histogram(LABELS, parts, 10) > 0).sum(axis=1)
    assert classes.max() == per_client  # 200 samples of a class are whole shards


def test_shards_across_a_class_border_add_one_class_each_at_most():
    parts = deal(Shards(per_client=2), num_clients=37)
    assert (histogram(LABELS, parts, 10) > 0).sum(axis=1).max() <= 4
    assert max(len(part) for part in parts) - min(len(part) for part in parts) <= 2


@settings(max_examples=40, deadline=None)
@given(classes=st.integers(1, 10), num_clients=st.integers(1, 60), seed=st.integers(0, 2**32))
def test_classes_gives_so_many_classes_and_leaves_none_out(classes, num_clients, seed):
    counts = histogram(LABELS, deal(Classes(classes=classes), num_clients=num_clients, seed=seed), 10)
    assert ((counts > 0).sum(axis=1) == classes).all()
    owners = (counts > 0).sum(axis=0)
    assert owners.max() - owners.min() <= 1
    assert (owners > 0).all() or num_clients * classes < 10
    for label in range(10):
        shares = counts[counts[:, label] > 0, label]
        assert shares.size == 0 or (shares.sum() == 200 and shares.max() - shares.min() <= 1)


def test_n_way_k_shot_gives_exactly_k_samples_of_n_classes():
    counts = histogram(LABELS, deal(Classes(classes=3, samples=4)), 10)
    assert (np.sort(counts, axis=1)[:, -3:] == 4).all()
    assert (counts.sum(axis=1) == 12).all()


def test_classes_without_samples_are_dealt_to_nobody():
    labels = np.array([1, 4, 4, 1, 7, 7])
    counts = histogram(labels, deal(Classes(classes=2), labels, 3), 10)
    assert ((counts > 0).sum(axis=1) == 2).all()


@pytest.mark.parametrize(
    "partition", [Iid(), Dirichlet(alpha=0.01), Dirichlet(alpha=0.3), Shards(), Classes()], ids=str
)
def test_ten_thousand_clients_are_dealt_in_seconds(partition):
    labels = np.repeat(np.arange(10), 6000)
    start = time.perf_counter()
    assert len(deal(partition, labels, 10_000)) == 10_000
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Dirichlet(alpha=-1), "partition.alpha is -1; it must be above 0"),
        (lambda: Dirichlet(alpha=0), "partition.alpha is 0; it must be above 0"),
        (lambda: Dirichlet(alpha=float("nan")), "partition.alpha is nan; it must be above 0"),
        (lambda: Dirichlet(alpha=float("inf")), "partition.alpha is inf; it must be above 0"),
        (lambda: Dirichlet(alpha="0.3"), "partition.alpha is '0.3'; it must be above 0"),
        (lambda: Dirichlet(alpha=1, min_size=0), "partition.min_size is 0; it must be a whole number of at least 1"),
        (lambda: Shards(per_client=0), "partition.per_client is 0; it must be a whole number of at least 1"),
        (lambda: Classes(classes=1.5), "partition.classes is 1.5; it must be a whole number of at least 1"),
        (lambda: Classes(samples=0), "partition.samples is 0; it must be a whole number of at least 1"),
        (lambda: deal(Iid(), num_clients=2001), "num_clients is 2001; there are only 2000 training samples"),
        (lambda: deal(Iid(), num_clients=0), "num_clients is 0; it must be a whole number of at least 1"),
        (lambda: deal(Iid(), num_classes=9), "labels lie from 0 to 9; with num_classes 9 they must lie from 0 to 8"),
        (lambda: deal(Iid(), LABELS - 1), "labels lie from -1 to 8"),
        (lambda: deal(Iid(), LABELS / 2), "labels have type float64 and shape (2000,); give integers"),
        (
            lambda: deal(Dirichlet(alpha=1, min_size=41)),
            "partition.min_size is 41; 50 clients of that size need 2050 samples and there are 2000, so lower it",
        ),
        (
            lambda: deal(Shards(per_client=50)),
            "partition.per_client is 50; 50 clients need 2500 shards and there are 2000 samples, so lower it",
        ),
        (
            lambda: deal(Classes(classes=11)),
            "partition.classes is 11; the training labels have only 10 classes, so lower it",
        ),
        (
            lambda: deal(Classes(classes=2, samples=21)),
            "partition.samples is 21; the 10 owners of class 0 need 210 samples and it has 200, so lower",
        ),
        (
            lambda: deal(Classes(classes=2), num_clients=1500),
            "partition.classes is 2; the 300 owners of class 0 need 300 samples and it has 200, so lower",
        ),
    ],
)
def test_what_cannot_be_dealt_is_refused_with_a_remedy(build, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        build()


def test_the_histogram_counts_samples_by_client_and_class():
    labels = np.array([0, 2, 2, 1])
    counts = histogram(labels, [np.array([1, 2]), np.array([0, 3])], 4)
    assert counts.tolist() == [[0, 0, 2, 0], [1, 1, 0, 0]]
    assert counts.dtype == np.int64


def test_the_manifest_is_json_and_tells_partitions_apart():
    parts = deal(Iid())
    first = manifest(LABELS, parts, 10)
    assert json.loads(json.dumps(first)) == first
    assert first == manifest(LABELS, deal(Iid()), 10)
    assert first["num_samples"] == len(LABELS)
    assert first["num_clients"] == 50
    assert np.array_equal(first["histogram"], histogram(LABELS, parts, 10))
    assert first["hash"] != manifest(LABELS, deal(Iid(), seed=1), 10)["hash"]
    moved = [np.concatenate([parts[0], parts[1][:1]]), parts[1][1:], *parts[2:]]
    assert first["hash"] != manifest(LABELS, moved, 10)["hash"]


def test_apportioning_meets_the_total_and_is_within_one_of_the_quota():
    weights = np.random.default_rng(1).integers(0, 50, (200, 7)) + np.eye(200, 7, dtype=np.int64)
    totals = np.random.default_rng(2).integers(0, 90, 200)
    shares = apportion(weights, totals)
    assert np.array_equal(shares.sum(axis=1), totals)
    quota = weights * totals[:, None] / weights.sum(axis=1, keepdims=True)
    assert (abs(shares - quota) < 1).all()
    assert apportion(np.array([[5, 3, 2]]), np.array([3])).tolist() == [[1, 1, 1]]
