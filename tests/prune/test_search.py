import itertools
import math

import numpy as np
import pytest
import torch

from fedray.keys import Key
from fedray.prune.search import fastest, has_settled, noisy_counts, reconfigure, seconds_of
from fedray.tree import Layout, Mask, Tree

LAYOUT = Layout(("a", "bias", "b"), ((8,), (2,), (6,)))
NAMES = ("a", "b")


def tree(layout, *values):
    return Tree(layout, torch.tensor(values, dtype=torch.float32))


def mask(layout, *kept):
    return Mask(layout, torch.tensor([bool(bit) for bit in kept]))


@pytest.mark.parametrize("seed", range(20))
def test_greedy_is_the_best_of_all_subsets_of_ten_candidates(seed):
    """Acceptance test 4 of the methods reference, every one of the 1,024 subsets in float64."""
    random = np.random.default_rng(seed)
    importance = Tree(LAYOUT, torch.from_numpy(random.exponential(size=16) ** 2).float())
    kept = Mask.of(LAYOUT, {"a": torch.arange(8) < 2, "b": torch.arange(6) < 2})
    seconds = {"a": float(random.uniform(0.1, 1.0)), "b": float(random.uniform(0.1, 1.0))}
    constant_s = float(random.uniform(0.0, 3.0))
    gain, cost = importance.flat.double().numpy(), np.zeros(16)
    cost[:8], cost[10:] = seconds["a"], seconds["b"]

    def rate(flat):
        return gain[flat].sum() / (constant_s + cost[flat].sum())

    candidates = (~kept.flat).nonzero().flatten().tolist()
    assert len(candidates) == 10
    best = 0.0
    for bits in itertools.product((False, True), repeat=10):
        flat = kept.flat.numpy().copy()
        flat[candidates] = bits
        best = max(best, rate(flat))
    found = fastest(importance, kept, seconds, constant_s)
    assert rate(found.flat.numpy()) == pytest.approx(best, rel=1e-12)
    assert not (kept.flat & ~found.flat).any()
    assert bool(found["bias"].all())


def test_a_coordinate_is_worth_its_importance_by_its_seconds_by_hand():
    layout = Layout(("cheap", "dear"), ((3,), (3,)))
    importance = tree(layout, 4.0, 3.0, 1.0, 9.0, 8.0, 5.0)
    kept, seconds = mask(layout, 0, 0, 0, 0, 0, 0), {"cheap": 1.0, "dear": 2.0}
    # Per second 4, 3, 1 and 4.5, 4, 2.5. From 0 / 2: 9/4 = 2.25, 13/5 = 2.6 (the lower index first), 21/7 = 3, and a
    # rate of 3 is not above it. 24/8 would be the same.
    assert fastest(importance, kept, seconds, 2.0) == mask(layout, 1, 0, 0, 1, 1, 0)
    # Were seconds not read, 4 would lose to 5: 9, 8, 5 against 9, 8, 4.
    assert fastest(importance, kept, seconds, 2.0, most=2) == mask(layout, 1, 0, 0, 1, 0, 0)
    assert fastest(importance, kept, seconds, 100.0) == Mask.full(layout)
    assert fastest(importance, kept, seconds, 1e-9) == mask(layout, 0, 0, 0, 1, 0, 0)


def test_what_is_kept_and_what_is_never_pruned_raise_the_bar():
    layout = Layout(("w", "bias"), ((4,), (1,)))
    kept, seconds = mask(layout, 1, 0, 0, 0, 1), {"w": 1.0}
    assert fastest(tree(layout, 1.0, 1.0, 1.0, 1.0, 0.0), kept, seconds, 1.0) == Mask.full(layout)
    # 1 kept and 3 of the bias make 4 in 2 s: a rate of 1 is below.
    assert fastest(tree(layout, 1.0, 1.0, 1.0, 1.0, 3.0), kept, seconds, 1.0) == kept
    assert fastest(tree(layout, 4.0, 1.0, 1.0, 1.0, 0.0), kept, seconds, 1.0) == kept


def test_nothing_is_added_beyond_the_bound_and_what_is_kept_stays():
    layout = Layout(("w",), ((5,),))
    importance, kept = tree(layout, 1.0, 5.0, 6.0, 7.0, 8.0), mask(layout, 1, 1, 0, 0, 0)
    for most, flat in ((1, (1, 1, 0, 0, 0)), (2, (1, 1, 0, 0, 0)), (3, (1, 1, 0, 0, 1)), (4, (1, 1, 0, 1, 1))):
        assert fastest(importance, kept, {"w": 1.0}, 50.0, most=most) == mask(layout, *flat)


def test_a_reconfiguration_takes_out_the_smallest_and_may_put_them_back():
    layout = Layout(("w", "bias"), ((6,), (1,)))
    params = tree(layout, 4.0, -3.0, 0.1, 0.2, 0.0, 0.0, 0.0)
    before, importance = mask(layout, 1, 1, 1, 1, 0, 0, 1), tree(layout, 1.0, 1.0, 9.0, 0.1, 8.0, 0.1, 0.0)
    # floor(0.5 * 4) = 2 go: the third and fourth. In come 9 and 8: 2/4, 11/5, 19/6.
    after = reconfigure(params, importance, before, {"w": 1.0}, 2.0, removal=0.5)
    assert after == mask(layout, 1, 1, 1, 0, 1, 0, 1)
    assert reconfigure(params, importance, before, {"w": 1.0}, 2.0, removal=0.0) == mask(layout, 1, 1, 1, 1, 1, 0, 1)


def test_the_time_of_a_weight_is_its_transfer_and_its_share_of_its_layers_flops():
    layout = Layout(("conv", "fc", "table"), ((2, 5), (4, 5), (10,)))
    options = {"transfer_s": 0.5, "flops_per_second": 100.0}
    constant_s, seconds = seconds_of(
        layout, layout.names, {"conv": 1000, "fc": 40, "": 7}, 20.0, constant_s=3.0, computing_s=None, **options
    )
    # 3 * 1000 FLOPs * 20 examples / 100 per second / 10 weights, and 3 * 40 * 20 / 100 / 20.
    assert seconds == pytest.approx({"conv": 0.5 + 60.0, "fc": 0.5 + 1.2, "table": 0.5})
    assert constant_s == 3.0
    constant_s, seconds = seconds_of(
        layout, layout.names, {"conv": 1000}, 20.0, constant_s=None, computing_s={"fc": 2.0}, **options
    )
    assert seconds == {"conv": 0.5, "fc": 2.5, "table": 0.5}
    assert constant_s == pytest.approx(0.14 * (10 * 0.5 + 20 * 2.5 + 10 * 0.5))


def test_a_size_has_settled_when_it_moved_little_often_enough_on_end():
    for sizes, settled in (
        ([], False),
        ([100, 95, 90], False),
        ([100, 95, 90, 85], True),
        ([50, 100, 95, 90, 85], True),
        ([100, 95, 80, 85], False),
        ([100, 110, 121, 133], True),
        ([0, 0, 0, 0], True),
    ):
        assert has_settled(sizes, tolerance=0.1, patience=3) is settled, sizes


def test_noisy_counts_keep_the_sum_and_the_sizes_and_differ():
    layout = Layout(("a", "b", "c"), ((100,), (40, 5), (11,)))
    counts, seen = {"a": 30, "b": 80, "c": 10}, set()
    for at in range(50):
        noisy = noisy_counts(layout, counts, 0.5, Key.of(at))
        assert noisy == noisy_counts(layout, counts, 0.5, Key.of(at))
        assert sum(noisy.values()) == 120
        assert all(0 <= noisy[name] <= math.prod(layout.shape(name)) for name in layout.names)
        # Before the sum is made right, counts move by at most a half: afterwards by at most a factor of three.
        assert all(count / 3 - 1 <= noisy[name] <= 3 * count + 1 for name, count in counts.items())
        seen.add(tuple(noisy.values()))
    assert len(seen) > 40
    assert noisy_counts(layout, counts, 0.0, Key.of(0)) == counts
    assert noisy_counts(layout, dict.fromkeys(layout.names, 0), 0.5, Key.of(0)) == dict.fromkeys(layout.names, 0)
    whole = {"a": 100, "b": 200, "c": 11}
    assert noisy_counts(layout, whole, 0.9, Key.of(0)) == whole
