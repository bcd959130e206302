"""Laws of partitions where a minimum binds: which draw is mended, and which samples are set apart."""

from __future__ import annotations

import numpy as np
import pytest

from fedray.data.partition import Dirichlet, Mixed, PowerLaw, Quantity, histogram, sizes
from fedray.keys import Key


@pytest.mark.parametrize("seed", range(8))
def test_of_the_draws_of_sizes_the_one_that_lacks_least_is_mended(monkeypatch, seed):
    draws, cut = [], sizes.cut

    def noted(shares, total):
        draws.append(cut(shares, total))
        return draws[-1]

    monkeypatch.setattr(sizes, "cut", noted)
    least, total, clients = 40, 1000, 20
    found = Quantity(beta=0.5, min_size=least).sizes(total, num_clients=clients, key=Key.of(seed))
    lacks = [int(np.maximum(least - draw, 0).sum()) for draw in draws]
    assert len(draws) > 10
    assert min(lacks) > 0
    assert lacks[-1] > min(lacks)  # or this seed would say nothing
    excess = np.maximum(draws[int(np.argmin(lacks))] - least, 0)
    expected = least + excess * (total - least * clients) / excess.sum()
    assert found.sum() == total
    assert abs(found - expected).max() < 1


def test_the_draws_of_sizes_end_with_the_first_that_lacks_nothing(monkeypatch):
    draws, cut = [], sizes.cut
    monkeypatch.setattr(sizes, "cut", lambda *given: draws.append(cut(*given)) or draws[-1])
    found = Quantity(beta=0.5, min_size=10).sizes(1000, num_clients=8, key=Key.of(1))
    assert np.array_equal(found, draws[-1])
    assert [draw.min() >= 10 for draw in draws] == [False] * (len(draws) - 1) + [True]


@pytest.mark.parametrize("turned", [False, True], ids=["ascending", "descending"])
def test_the_smallest_of_mixed_clients_have_classes_as_they_were_given_whatever_the_order_of_rows(turned):
    labels = np.repeat(np.arange(10)[:: -1 if turned else 1], 300)
    mixed = Mixed(labels=Dirichlet(alpha=1000.0), sizes=PowerLaw(exponent=4), min_size=20)
    counts = histogram(labels, mixed(labels, num_clients=30, num_classes=10, key=Key.of(0)), 10)
    small = counts[np.argsort(counts.sum(axis=1))[:20]]
    assert small.sum(axis=1).min() >= 20
    assert small.sum(axis=1).max() < 40
    shares = small.sum(axis=0) / small.sum()
    assert abs(shares - 0.1).max() < 0.05
    # And which samples those are is drawn for each: clients are not alike.
    assert len({tuple(row) for row in small.tolist()}) == len(small)
