import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.errors import ConfigError
from fedray.prune.allocate import ALLOCATIONS, er, erk, ranked, total_kept, uniform
from fedray.prune.score import magnitude
from fedray.prune.select import keep_top_global
from fedray.tree import Layout, Mask, Tree


def stages(stem, widths):
    """Weights of a residual network with two basic blocks per stage, and its 10-class head."""
    shapes = [stem, *[(stem[0], stem[0], 3, 3)] * 4]
    for before, after in itertools.pairwise(widths):
        shapes += [(after, before, 3, 3), (after, after, 3, 3), (after, before, 1, 1), *[(after, after, 3, 3)] * 2]
    return [*shapes, (10, widths[-1])]


# FedPruning's `resnet18` has three stages; its `resnet18_gn` is the true one, ImageNet stem, ten classes.
SMALL = (stages((16, 3, 3, 3), (16, 32, 64)), 1_130)
TRUE = (stages((64, 3, 7, 7), (64, 128, 256, 512)), 9_610)


def layout_of(shapes, never_pruned=0):
    names = tuple(f"w{at}" for at in range(len(shapes)))
    return Layout((*names, "rest"), (*map(tuple, shapes), (never_pruned,))), names


@pytest.mark.parametrize(
    ("model", "size", "sparsity", "kept", "whole"),
    [
        (SMALL, 175_258, 0.5, 86_500, 9),
        (SMALL, 175_258, 0.8, 33_908, 4),
        (SMALL, 175_258, 0.9, 16_378, 2),
        (SMALL, 175_258, 0.95, 7_613, 0),
        (TRUE, 11_181_642, 0.5, 5_581_214, 14),
        (TRUE, 11_181_642, 0.8, 2_226_706, 9),
        (TRUE, 11_181_642, 0.9, 1_108_540, 4),
    ],
)
def test_floored_erk_over_all_parameters_keeps_what_fedpruning_keeps(model, size, sparsity, kept, whole):
    layout, names = layout_of(*model)
    assert layout.size == size
    counts = erk(layout, names, sparsity, rounding="floor", budget="all_parameters")
    assert sum(counts.values()) == kept
    assert sum(counts[name] == math.prod(layout.shape(name)) for name in names) == whole


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95])
def test_nearest_over_all_parameters_keeps_exactly_the_fraction_of_everything(sparsity):
    layout, names = layout_of(*SMALL)
    counts = erk(layout, names, sparsity, budget="all_parameters")
    assert sum(counts.values()) + 1_130 == round((1 - sparsity) * 175_258)


shapes = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 30), st.integers(1, 30)),
        st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 3), st.integers(1, 3)),
        st.tuples(st.integers(1, 9)),
    ),
    min_size=1,
    max_size=6,
)


def exact_parts(total, sizes, shares):
    """The real-valued solution by brute force: which tensors are whole is found one at a time, in fractions."""
    whole = set()
    while True:
        rest = total - sum(sizes[i] for i in whole)
        among = sum(shares[i] for i in range(len(sizes)) if i not in whole)
        worst = max((i for i in range(len(sizes)) if i not in whole), key=lambda i: shares[i] / sizes[i], default=None)
        if worst is None or Fraction(rest * shares[worst], among) <= sizes[worst]:
            return [sizes[i] if i in whole else Fraction(rest * shares[i], among) for i in range(len(sizes))]
        whole.add(worst)


def share_of(rule, shape):
    out, inp, *kernel = (*shape, 1, 1)[:2] if len(shape) < 2 else shape
    size = math.prod(shape)
    if rule == "uniform":
        return size
    return (out + inp) * math.prod(kernel) if rule == "er" else out + inp + sum(kernel)


@settings(max_examples=60, deadline=None)
@given(shapes=shapes, sparsity=st.floats(0, 1), rule=st.sampled_from(sorted(ALLOCATIONS)))
def test_nearest_meets_the_budget_exactly_and_each_tensor_within_one_of_its_part(shapes, sparsity, rule):
    layout, names = layout_of(shapes, 7)
    counts = ALLOCATIONS[rule](layout, names, sparsity)
    sizes = [math.prod(shape) for shape in shapes]
    total = round((1 - sparsity) * sum(sizes))
    assert sum(counts.values()) == total
    parts = exact_parts(total, sizes, [share_of(rule, shape) for shape in shapes])
    for name, size, part in zip(names, sizes, parts, strict=True):
        assert 0 <= counts[name] <= size
        assert abs(counts[name] - part) < 1


@settings(max_examples=60, deadline=None)
@given(shapes=shapes, a=st.floats(0, 1), b=st.floats(0, 1), rule=st.sampled_from(sorted(ALLOCATIONS)))
def test_limits_are_kept_while_the_total_stays_exact(shapes, a, b, rule):
    low, high = sorted((a, b))
    layout, names = layout_of(shapes)
    before = ALLOCATIONS[rule](layout, names, low)
    after = ALLOCATIONS[rule](layout, names, high, limits=before)
    assert sum(after.values()) == total_kept(layout, names, high)
    assert all(after[name] <= before[name] for name in names)


def test_the_shares_of_er_and_erk_differ_where_there_is_a_kernel():
    layout, names = layout_of([(4, 4, 3, 3), (12, 12)])
    assert er(layout, names, 0.8) == {"w0": 44, "w1": 14}  # round(57.6) = 58 split 72 : 24, 43.5 and 14.5
    assert erk(layout, names, 0.8) == {"w0": 21, "w1": 37}  # 58 split 14 : 24, 21.4 and 36.6
    assert uniform(layout, names, 0.8) == {"w0": 29, "w1": 29}


def test_floor_rounds_every_tensor_down_and_is_not_fooled_by_float_error():
    layout, names = layout_of([(10, 10), (5, 3)])
    assert uniform(layout, names, 0.9, rounding="floor") == {"w0": 9, "w1": 1}
    assert total_kept(*layout_of([(10, 10)]), 0.9, rounding="floor") == 10


def test_ranked_counts_what_one_ranking_over_all_tensors_keeps():
    layout, names = layout_of([(4, 5), (3, 3)], 2)
    score = magnitude(Tree(layout, torch.randn(layout.size, generator=torch.Generator().manual_seed(1))))
    counts = ranked(score, names, 0.6)
    assert sum(counts.values()) == round(0.4 * 29)
    assert counts == keep_top_global(score, 12, names=names).counts(names)
    within = Mask(layout, torch.arange(layout.size) % 2 == 0)
    assert ranked(score, names, 0.6, within=within) != counts


def test_a_budget_below_what_is_never_pruned_is_refused():
    layout, names = layout_of([(3, 3)], 9)
    with pytest.raises(
        ConfigError, match=r"pruner\.sparsity is 0\.9; with budget all_parameters it must be at most 0\.5"
    ):
        uniform(layout, names, 0.9, budget="all_parameters")


def test_a_sparsity_that_is_no_fraction_is_refused():
    with pytest.raises(ConfigError, match=r"pruner\.sparsity is 90; it is the fraction removed, from 0 to 1"):
        erk(*layout_of([(3, 3)]), 90)


def test_a_falling_sparsity_under_limits_is_refused():
    layout, names = layout_of([(10, 10)])
    with pytest.raises(ConfigError, match=r"keeps 50 weights, but only 10 may still be kept"):
        uniform(layout, names, 0.5, limits={"w0": 10})
