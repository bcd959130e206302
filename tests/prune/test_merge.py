import itertools

import pytest
import torch

from fedray.errors import ConfigError
from fedray.prune.merge import hamming, merge, to_count
from fedray.prune.shrink import falling, shrink
from fedray.tree import Layout, Mask, Tree

LAYOUT = Layout(("w", "b"), ((6,), (2,)))


def mask_of(*kept):
    return Mask.of(LAYOUT, {"w": torch.tensor([bool(bit) for bit in kept])})


def tree_of(*values):
    return Tree(LAYOUT, torch.tensor([*values, 9.0, 9.0]))


HOLDERS = torch.tensor([3, 2, 1, 0, 2, 3, 3, 0], dtype=torch.int32)  # of 3; the last one is of a tensor never cut


@pytest.mark.parametrize(
    ("rule", "votes", "kept"),
    [
        ("or", 9, (1, 1, 1, 0, 1, 1)),
        ("and", 9, (1, 0, 0, 0, 0, 1)),
        ("vote", 1, (1, 1, 1, 0, 1, 1)),
        ("vote", 2, (1, 1, 0, 0, 1, 1)),
        ("vote", 3, (1, 0, 0, 0, 0, 1)),
        ("vote", 7, (1, 0, 0, 0, 0, 1)),  # more than there are: all of them
    ],
)
def test_a_coordinate_stays_that_enough_clients_hold(rule, votes, kept):
    assert merge(LAYOUT, HOLDERS, 3, rule, votes, names=("w",)) == mask_of(*kept)


def test_equal_masks_merge_to_themselves_by_every_rule():
    mask = mask_of(1, 0, 0, 1, 1, 0)
    for rule, votes in itertools.product(("or", "and", "vote"), (1, 2, 3, 4)):
        assert merge(LAYOUT, 3 * mask.flat.int(), 3, rule, votes, names=("w",)) == mask


def test_a_merged_mask_is_cut_by_magnitude_and_filled_by_magnitude_from_what_somebody_holds():
    params, held = tree_of(1.0, -5.0, 3.0, 8.0, 2.0, -4.0), mask_of(1, 1, 1, 0, 1, 1)
    assert to_count(params, held, held, {"w": 3}, names=("w",)) == mask_of(0, 1, 1, 0, 0, 1)
    narrow = mask_of(1, 0, 0, 0, 0, 0)
    # The 8.0 is nobody's, so that it comes last.
    assert to_count(params, narrow, held, {"w": 3}, names=("w",)) == mask_of(1, 1, 0, 0, 0, 1)
    assert to_count(params, narrow, held, {"w": 5}, names=("w",)) == held
    assert to_count(params, narrow, held, {"w": 6}, names=("w",)) == Mask.full(LAYOUT)
    with pytest.raises(ConfigError, match="2 coordinates of tensor"):
        to_count(params, narrow, held, {"w": 7}, names=("w",))


def test_hamming_is_the_mean_over_tensors_of_the_share_that_differs():
    a, b = mask_of(1, 1, 0, 0, 1, 1), mask_of(1, 0, 1, 0, 1, 1)
    assert hamming(a, a, names=("w", "b")) == 0.0
    assert hamming(a, b, names=("w",)) == pytest.approx(2 / 6)
    assert hamming(a, b, names=("w", "b")) == pytest.approx(1 / 6)
    assert hamming(a, b, names=()) == 0.0


@pytest.mark.parametrize("size", [*range(3, 30), 100, 3200, 12345])
def test_two_steps_of_a_fifth_leave_64_percent_within_one_weight_and_no_step_goes_beyond_the_target(size):
    once = shrink({"w": size}, 0.2, {"w": 0})
    assert abs(shrink(once, 0.2, {"w": 0})["w"] - 0.64 * size) <= 1.0
    least = round(0.1 * size)
    counts = [{"w": size}]
    while shrink(counts[-1], 0.2, {"w": least}) != counts[-1]:
        counts.append(shrink(counts[-1], 0.2, {"w": least}))
        assert least <= counts[-1]["w"] < counts[-2]["w"]
    assert counts[-1]["w"] == least


def test_counts_below_the_target_stay():
    assert shrink({"w": 3, "v": 10}, 0.2, {"w": 5, "v": 9}) == {"w": 3, "v": 9}


@pytest.mark.parametrize("allocation", ["uniform", "er", "erk"])
def test_falling_counts_meet_the_budget_within_what_is_left_and_stay_where_they_are_below(allocation):
    layout = Layout(("a", "b"), ((20, 5), (5, 4)))
    start = Mask.full(layout)
    mask = start
    for sparsity in (0.1, 0.3, 0.55, 0.8, 0.95):
        counts = falling(mask, ("a", "b"), sparsity, allocation=allocation)
        assert sum(counts.values()) == round((1 - sparsity) * 120)
        assert all(counts[name] <= held for name, held in mask.counts().items())
        mask = Mask.of(layout, {n: torch.arange(start[n].numel()) < counts[n] for n in counts})
    assert falling(mask, ("a", "b"), 0.5, allocation=allocation) == mask.counts()
