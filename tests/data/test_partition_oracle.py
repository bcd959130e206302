"""Partitions agree with those of flwr-datasets where the definitions are the same.

Not in the test environment, as it holds back other packages: pip install flwr-datasets.
"""

from __future__ import annotations

import numpy as np
import pytest

from fedray.data.partition import Classes, Dirichlet, DirichletPrior, Iid, LogNormal, Natural, Shards, histogram
from fedray.keys import Key

pytest.importorskip("flwr_datasets")

from datasets import Dataset
from flwr_datasets import partitioner as flower

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 300))


def dealt_there(partitioner, labels=LABELS, num_clients=20, **columns):
    """What a partitioner of Flower's gives: the rows of each client."""
    table = Dataset.from_dict({"label": labels.tolist(), "row": list(range(len(labels))), **columns})
    partitioner.dataset = table
    return [np.sort(np.array(partitioner.load_partition(client)["row"])) for client in range(num_clients)]


def dealt_here(partition, labels=LABELS, num_clients=20, seed=0, **known):
    num_classes = int(labels.max()) + 1
    return partition(labels, num_clients=num_clients, num_classes=num_classes, key=Key.of(seed), **known)


def counts_of(parts, labels=LABELS):
    return histogram(labels, parts, int(labels.max()) + 1)


@pytest.mark.parametrize("num_clients", [7, 20, 30])
def test_iid_sizes_are_the_same(num_clients):
    there = dealt_there(flower.IidPartitioner(num_clients), num_clients=num_clients)
    here = dealt_here(Iid(), num_clients=num_clients)
    assert [len(part) for part in here] == [len(part) for part in there]


@pytest.mark.parametrize("per_client", [1, 2, 3])
def test_shards_have_the_same_sizes_and_numbers_of_classes(per_client):
    partitioner = flower.ShardPartitioner(20, "label", num_shards_per_partition=per_client, seed=1)
    there, here = counts_of(dealt_there(partitioner)), counts_of(dealt_here(Shards(per_client=per_client)))
    assert here.sum(axis=1).tolist() == there.sum(axis=1).tolist()
    assert (here > 0).sum(axis=1).max() == (there > 0).sum(axis=1).max() == per_client
    # With whole shards of one class, the amounts in which classes come are multiples of the same shard.
    assert set(np.unique(here % (150 // per_client))) == set(np.unique(there % (150 // per_client))) == {0}


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_so_many_classes_are_cut_in_the_same_amounts(classes):
    partitioner = flower.PathologicalPartitioner(20, "label", classes, class_assignment_mode="deterministic")
    there, here = counts_of(dealt_there(partitioner)), counts_of(dealt_here(Classes(classes=classes)))
    for counts in (there, here):
        assert ((counts > 0).sum(axis=1) == classes).all()
        assert counts.sum() == len(LABELS)
    # Both have equally many owners of each class here, so that amounts are the same whoever gets them.
    assert np.sort(here, axis=None).tolist() == np.sort(there, axis=None).tolist()


def skews(counts):
    """Mean size, deviation of sizes, mean share of the most frequent class, mean number of classes."""
    sizes = counts.sum(axis=1)
    return np.array([sizes.mean(), sizes.std(), (counts.max(axis=1) / sizes).mean(), (counts > 0).sum(axis=1).mean()])


@pytest.mark.parametrize("alpha", [0.3, 1.0, 10.0])
def test_dirichlet_over_labels_has_the_same_moments(alpha):
    there, here = [], []
    for seed in range(12):
        partitioner = flower.DirichletPartitioner(
            20, "label", alpha, min_partition_size=1, self_balancing=True, seed=seed
        )
        there.append(skews(counts_of(dealt_there(partitioner))))
        here.append(skews(counts_of(dealt_here(Dirichlet(alpha=alpha), seed=seed))))
    there, here = np.array(there), np.array(here)
    error = np.sqrt((there.var(axis=0) + here.var(axis=0)) / 12)
    assert (abs(there.mean(axis=0) - here.mean(axis=0)) <= 4 * error + 0.03 * here.mean(axis=0)).all()


@pytest.mark.parametrize("alpha", [0.3, 1.0, 10.0])
def test_dirichlet_priors_of_clients_have_the_same_moments(alpha):
    # There alpha is the concentration of each of ten classes, here the sum of them.
    there, here = [], []
    for seed in range(12):
        partitioner = flower.InnerDirichletPartitioner([150] * 20, "label", alpha, seed=seed)
        there.append(skews(counts_of(dealt_there(partitioner))))
        here.append(skews(counts_of(dealt_here(DirichletPrior(alpha=10 * alpha), seed=seed))))
    there, here = np.array(there), np.array(here)
    assert (there[:, :2] == here[:, :2]).all()
    error = np.sqrt((there.var(axis=0) + here.var(axis=0)) / 12)
    assert (abs(there.mean(axis=0) - here.mean(axis=0)) <= 4 * error + 0.03 * here.mean(axis=0)).all()


def test_the_recipe_of_fedprox_has_the_same_amounts_for_the_same_draws():
    # Each class has four owners. Both give 5 samples to each and cut the rest in log-normal proportions.
    scheme, key = LogNormal(sigma=2.0, min_size=5), Key.of(0)
    normal = key.fold("sizes").numpy().standard_normal(4)
    partitioner = flower.DistributionPartitioner(
        np.tile(np.exp(2.0 * normal), (10, 1)), 20, 2, "label", preassigned_num_samples_per_label=5
    )
    there = counts_of(dealt_there(partitioner))
    here = np.sort(scheme.sizes(300, num_clients=4, key=key))
    for label in range(10):
        amounts = np.sort(there[there[:, label] > 0, label])
        assert (abs(amounts - here) <= 3).all()  # rounding, and there its remainder at random
    counts = counts_of(dealt_here(Classes(cut=scheme)))
    assert ((counts > 0).sum(axis=1) == (there > 0).sum(axis=1)).all()
    assert min(counts[counts > 0].min(), there[there > 0].min()) >= 5


def test_natural_clients_are_the_same():
    owners = np.random.default_rng(1).integers(0, 20, len(LABELS)) * 3
    there = dealt_there(flower.NaturalIdPartitioner("owner"), owner=owners.tolist())
    here = dealt_here(Natural(), owners=owners)
    assert all(np.array_equal(a, b) for a, b in zip(here, there, strict=True))
