"""Laws of partitions: disjoint, complete where promised, a function of the key, always ending, skewed as asked."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.data.partition import (
    Classes,
    Dirichlet,
    DirichletPrior,
    Iid,
    LogNormal,
    Mixed,
    Natural,
    PowerLaw,
    Quantity,
    Shards,
    apportion,
    histogram,
    manifest,
)
from fedray.data.partition.labels import _in_turns
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
    Classes(cut=Quantity(beta=0.5)),
    Classes(cut=LogNormal(sigma=2, min_size=5)),
    DirichletPrior(alpha=0.1),
    DirichletPrior(alpha=1, sizes=LogNormal(sigma=1)),
    Quantity(beta=0.3, min_size=10),
    LogNormal(sigma=1.5),
    PowerLaw(exponent=1),
    Mixed(labels=Dirichlet(alpha=0.3), sizes=Quantity(beta=0.5)),
    Mixed(labels=Classes(), sizes=LogNormal(sigma=1), min_size=5),
    Mixed(labels=Classes(samples=6), sizes=PowerLaw(exponent=1)),
    Natural(),
    Natural(take="largest"),
]
PARTIAL = [
    Classes(classes=3, samples=4),
    Mixed(labels=Classes(samples=6), sizes=PowerLaw(exponent=1)),
    Natural(take="largest"),
]
COMPLETE = [p for p in PARTITIONS if p not in PARTIAL]
BY_SIZE = [Quantity(beta=0.3, min_size=10), LogNormal(sigma=1.5), PowerLaw(exponent=1)]


def owners_of(labels):
    """Of each sample, one of so many that every fiftieth client of the tests finds some; sizes differ."""
    return np.random.default_rng(1).integers(0, 90, len(labels)) ** 2


def deal(partition, labels=LABELS, num_clients=50, num_classes=10, seed=0, owners=None):
    known = {}
    if getattr(partition, "needs_owners", False):
        known["owners"] = owners_of(labels) if owners is None else owners
    return partition(labels, num_clients=num_clients, num_classes=num_classes, key=Key.of(seed), **known)


def sizes_of(parts):
    return np.array([len(part) for part in parts])


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
    assert same(deal(partition), deal(partition, seed=1)) == (partition == Natural(take="largest"))  # nothing is drawn


@pytest.mark.parametrize(
    "partition",
    [
        Iid(),
        Dirichlet(alpha=0.3),
        DirichletPrior(alpha=1),
        Classes(),
        Classes(samples=4),
        Classes(cut=LogNormal(sigma=0.5)),
        Quantity(beta=5),
        Mixed(labels=Dirichlet(alpha=1), sizes=LogNormal(sigma=0.5)),
    ],
    ids=str,
)
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
    monkeypatch.setattr("fedray.data.partition.labels.top_up", lambda *_: pytest.fail("topped up"))
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


@settings(max_examples=60, deadline=None)
@given(
    alpha=st.floats(0.01, 100),
    spread=st.floats(0.01, 100),
    num_clients=st.integers(1, 300),
    class_sizes=st.lists(st.integers(0, 200), min_size=1, max_size=12),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_every_combination_ends_and_deals_out_all(alpha, spread, num_clients, class_sizes, seed, data):
    labels = np.repeat(np.arange(len(class_sizes)), class_sizes)
    num_clients = min(num_clients, len(labels))
    if num_clients == 0:
        return
    sizes = data.draw(
        st.sampled_from([Quantity(beta=spread), LogNormal(sigma=spread), PowerLaw(exponent=min(spread, 50)), Iid()])
    )
    partition = data.draw(
        st.sampled_from(
            [
                sizes,
                DirichletPrior(alpha=alpha, sizes=sizes),
                Mixed(labels=Dirichlet(alpha=alpha), sizes=sizes),
                Mixed(labels=DirichletPrior(alpha=alpha), sizes=sizes),
                Mixed(labels=Shards(per_client=1), sizes=sizes),
            ]
        )
    )
    parts = deal(partition, labels, num_clients, len(class_sizes), seed)
    assert sizes_of(parts).min() >= 1
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))


@pytest.mark.parametrize("alpha", [1e-300, 1e-6, 1e6])
@pytest.mark.parametrize("build", [lambda a: DirichletPrior(alpha=a), lambda a: Quantity(beta=a)])
def test_dirichlet_draws_end_at_extreme_concentrations(build, alpha):
    for num_clients in (1, 7, 2000):
        assert sizes_of(deal(build(alpha), num_clients=num_clients)).sum() == len(LABELS)


@pytest.mark.parametrize(
    "build", [lambda a: Quantity(beta=1 / a), lambda a: LogNormal(sigma=a), lambda a: PowerLaw(exponent=a)]
)
def test_quantity_skew_grows_with_its_parameter(build):
    spreads = []
    for strength in (0.01, 0.1, 0.5, 1, 2, 4):
        drawn = [sizes_of(deal(build(strength), num_clients=40, seed=seed)) for seed in range(5)]
        spreads.append(np.mean([sizes.max() for sizes in drawn]))
    assert spreads == sorted(spreads)
    assert spreads[0] < 1.5 * 50
    assert spreads[-1] > 6 * 50


@pytest.mark.parametrize("partition", BY_SIZE, ids=str)
def test_partitions_by_size_leave_the_labels_iid(partition):
    parts = deal(partition, num_clients=8)
    counts = histogram(LABELS, parts, 10)
    expected = sizes_of(parts)[:, None] / 10
    # Hypergeometric: the variance of each count is at most its expectation times the share of other classes.
    assert (abs(counts - expected) < 5 * np.sqrt(expected * 0.9) + 1).all()


def test_quantity_shares_have_the_spread_of_the_dirichlet_distribution():
    labels = np.zeros(20_000, np.int64)
    shares = np.array([sizes_of(deal(Quantity(beta=0.5), labels, 5, 1, seed)) for seed in range(400)]) / len(labels)
    assert np.var(shares) == pytest.approx((1 / 5) * (4 / 5) / (5 * 0.5 + 1), rel=0.1)


def test_quantity_gives_everyone_the_minimum_and_keeps_the_rest_in_proportion():
    loose, tight = (sizes_of(deal(Quantity(beta=0.02, min_size=least), num_clients=40)) for least in (1, 20))
    assert tight.min() == 20
    assert tight.sum() == loose.sum() == len(LABELS)
    assert len(set(np.sort(tight)[-3:])) == 3  # not levelled


def test_log_normal_sizes_are_log_normal():
    labels = np.zeros(2_000_000, np.int64)
    logs = np.log(sizes_of(deal(LogNormal(sigma=0.7), labels, 4000, 1)) - 1 + 1e-9)
    assert np.std(logs) == pytest.approx(0.7, rel=0.05)
    assert np.mean((logs - logs.mean()) ** 3) / np.std(logs) ** 3 == pytest.approx(0, abs=0.15)


def test_power_law_sizes_follow_the_rank():
    sizes = np.sort(sizes_of(deal(PowerLaw(exponent=1, min_size=3), num_clients=10)))[::-1] - 3
    ideal = (len(LABELS) - 30) / np.arange(1, 11) / (1 / np.arange(1, 11)).sum()
    assert (abs(sizes - ideal) <= 1).all()


def test_a_dirichlet_prior_gives_equal_sizes_or_those_asked_for():
    assert set(sizes_of(deal(DirichletPrior(alpha=0.1), num_clients=30))) == {66, 67}
    sizes = LogNormal(sigma=1)
    key = Key.of(0).fold("dirichlet_prior")
    wanted = sizes.sizes(len(LABELS), num_clients=30, key=key.fold("sizes"))
    for alpha in (0.01, 100):
        assert np.array_equal(sizes_of(deal(DirichletPrior(alpha=alpha, sizes=sizes), num_clients=30)), wanted)


def test_dirichlet_priors_have_the_moments_of_the_dirichlet_distribution():
    # Shares q of class 0 with prior p = 0.3: mean p, variance p (1 - p) / (alpha + 1). No class runs out soon.
    labels = np.repeat([0, 1], [30_000, 70_000])
    parts = deal(DirichletPrior(alpha=3.0), labels, 500, 2)
    shares = histogram(labels, parts, 2)[:, 0] / 200
    assert np.mean(shares) == pytest.approx(0.3)
    sampling = np.mean(shares * (1 - shares)) / 200
    assert np.var(shares) - sampling == pytest.approx(0.3 * 0.7 / 4, rel=0.15)


def test_drawing_in_turns_has_the_distribution_of_drawing_one_after_the_other():
    turns, supply = np.array([0, 1, 0, 2, 2, 1, 0, 1, 2, 2]), np.array([2, 5, 0, 3])
    priors = np.array([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [0.05, 0.05, 0.1, 0.8]])
    random = np.random.default_rng(0)

    def one_after_the_other():
        left, drawn = supply.copy(), []
        for client in turns:
            shares = priors[client] * (left > 0)
            drawn.append(random.choice(4, p=shares / shares.sum()))
            left[drawn[-1]] -= 1
        return drawn

    slow = np.array([one_after_the_other() for _ in range(4000)])
    fast = np.array([_in_turns(turns, np.log(priors), supply, random) for _ in range(4000)])
    assert (np.apply_along_axis(np.bincount, 1, fast, minlength=4) == supply).all()
    for label in range(4):
        there, here = (slow == label).mean(axis=0), (fast == label).mean(axis=0)
        assert (abs(there - here) < 5 * np.sqrt(0.25 * 2 / 4000)).all()
    # And jointly: how often the first and the last turn drew the same class.
    same_class = [(each[:, 0] == each[:, -1]).mean() for each in (slow, fast)]
    assert abs(same_class[0] - same_class[1]) < 5 * np.sqrt(0.25 * 2 / 4000)


def test_label_skew_of_priors_grows_as_alpha_falls():
    # In the mean of ten draws: as classes run out, the smallest alphas are close to each other.
    skews = [
        np.mean([mean_skew(deal(DirichletPrior(alpha=alpha), num_clients=20, seed=seed)) for seed in range(10)])
        for alpha in (100, 10, 1, 0.3, 0.1, 0.01)
    ]
    assert skews == sorted(skews)
    assert skews[0] < 0.2
    assert skews[-1] > 0.6


@pytest.mark.parametrize("cut", [Quantity(beta=0.2, min_size=3), LogNormal(sigma=2, min_size=3)], ids=str)
def test_a_cut_keeps_the_number_of_classes_and_skews_their_amounts(cut):
    counts = histogram(LABELS, deal(Classes(classes=3, cut=cut), num_clients=20), 10)
    assert ((counts > 0).sum(axis=1) == 3).all()
    assert counts[counts > 0].min() == 3
    assert counts.max(axis=0).mean() > 2 * 200 / 6  # of 200 samples of a class, a sixth is an equal cut
    equal = histogram(LABELS, deal(Classes(classes=3), num_clients=20), 10)
    assert np.array_equal(counts > 0, equal > 0)


def test_mixed_gives_the_sizes_asked_for_without_new_classes():
    labels = Dirichlet(alpha=1.0, min_size=10)
    sizes = LogNormal(sigma=1.0)
    parts = deal(Mixed(labels=labels, sizes=sizes), num_clients=20)
    key = Key.of(0).fold("mixed")
    given = histogram(LABELS, labels(LABELS, num_clients=20, num_classes=10, key=key.fold("labels")), 10)
    wanted = sizes.sizes(len(LABELS), num_clients=20, key=key.fold("sizes"))
    counts = histogram(LABELS, parts, 10)
    assert (counts[given == 0] == 0).all()
    assert (abs(counts.sum(axis=1) - wanted) <= 12).all()  # rounding once per class
    assert (abs(given.sum(axis=1) - wanted) > 30).any()


def test_mixed_goes_as_far_as_classes_allow():
    # Two classes, each with two clients of its own: the clients of a class cannot have more than its samples.
    labels = np.repeat([0, 1], 100)
    counts = histogram(labels, deal(Mixed(labels=Classes(classes=1), sizes=PowerLaw(exponent=3)), labels, 4, 2), 2)
    assert counts.sum(axis=0).tolist() == [100, 100]
    assert ((counts > 0).sum(axis=1) == 1).all()


def test_natural_clients_are_the_owners_in_their_order():
    owners = np.array([7, 3, 7, 30, 3, 7])
    parts = deal(Natural(), np.zeros(6, int), 3, 1, owners=owners)
    assert [part.tolist() for part in parts] == [[1, 4], [0, 2, 5], [3]]


def test_fewer_natural_clients_get_whole_owners_in_even_numbers():
    owners = owners_of(LABELS)
    parts = deal(Natural(), num_clients=40)
    held = [set(owners[part]) for part in parts]
    assert sum(len(each) for each in held) == len(set(owners)) == 90
    assert {len(each) for each in held} == {2, 3}


def test_the_largest_owners_are_chosen():
    owners = np.repeat([5, 1, 9, 4, 8], [3, 2, 8, 5, 3])
    parts = deal(Natural(take="largest"), np.zeros(21, int), 3, 1, owners=owners)
    assert [set(owners[part]) for part in parts] == [{4}, {5}, {9}]  # 8 has as many as 5, and the lower number goes in


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


ALPHAS = (0.01, 0.1, 1.0, 100.0)
CROWDS = [
    Iid(),
    Shards(),
    Classes(),
    Classes(cut=LogNormal(sigma=2)),
    PowerLaw(exponent=2),
    LogNormal(sigma=3),
    Natural(),
    *(Dirichlet(alpha=alpha) for alpha in ALPHAS),
    *(DirichletPrior(alpha=alpha) for alpha in ALPHAS),
    *(Quantity(beta=alpha) for alpha in ALPHAS),
    *(Classes(cut=Quantity(beta=alpha)) for alpha in ALPHAS),
    *(DirichletPrior(alpha=alpha, sizes=Quantity(beta=alpha)) for alpha in ALPHAS),
    *(Mixed(labels=Dirichlet(alpha=alpha), sizes=Quantity(beta=alpha)) for alpha in ALPHAS),
]


@pytest.mark.parametrize("partition", CROWDS, ids=str)
@pytest.mark.parametrize("num_clients", [1, 9, 10_000])
def test_one_client_and_ten_thousand_are_dealt_every_sample(partition, num_clients):
    labels = np.repeat(np.arange(10), 6000)
    if isinstance(partition, Classes) and num_clients == 1:
        partition = replace(partition, classes=10)  # one client's two classes are not all there are
    parts = deal(partition, labels, num_clients, owners=np.arange(60_000) % 11_000)
    assert sizes_of(parts).min() >= 1
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(60_000))


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
        (lambda: Quantity(beta=0), "partition.beta is 0; it must be above 0 and finite, such as 0.5 for strong skew"),
        (lambda: LogNormal(sigma=-1), "partition.sigma is -1; it must be at least 0 and finite, such as 0.3"),
        (lambda: PowerLaw(exponent=float("nan")), "partition.exponent is nan; it must be at least 0 and finite"),
        (
            lambda: DirichletPrior(alpha=1, sizes=Shards()),
            "partition.sizes is Shards(per_client=2); it must be a partition of sizes: Iid, Quantity, LogNormal",
        ),
        (
            lambda: Classes(samples=4, cut=Quantity(beta=1)),
            "partition.samples is 4; with partition.cut every sample of a class is dealt out, so set one of the two",
        ),
        (
            lambda: Mixed(labels=Natural(), sizes=Iid()),
            "partition.labels is Natural(take='even'); it must be a partition by label, such as Dirichlet or Classes",
        ),
        (
            lambda: deal(Mixed(labels=Dirichlet(alpha=0.05), sizes=Iid(), min_size=30)),
            "so lower it or raise partition.labels.min_size",
        ),
        (
            lambda: deal(Quantity(beta=1, min_size=41)),
            "partition.min_size is 41; 50 clients of that size need 2050 samples and there are 2000, so lower it",
        ),
        (lambda: Natural(take="some"), "partition.take is 'some'; choose even or largest"),
        (
            lambda: deal(Natural(), num_clients=91),
            "num_clients is 91; the training data have 90 owners and a client needs one, so lower it to at most 90",
        ),
        (
            lambda: Natural()(LABELS, num_clients=2, num_classes=10, key=Key.of(0)),
            "partition is Natural and the data do not say who made each sample; take data with owners",
        ),
        (
            lambda: deal(Natural(), owners=np.arange(5)),
            "owners have type int64 and shape (5,); give one integer for each of the 2000 samples",
        ),
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
