"""The sum of contributions is a commutative monoid, exactly: any order, grouping or packing gives the same bits."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws_support import fingerprint

from fedray.errors import NumericError
from fedray.keys import Key
from fedray.round import Message, Part
from fedray.sums import Sums
from fedray.tree import Layout, Mask, Tree, equal, restrict

LAYOUT = Layout(("a", "b"), ((3, 4), (8,)))
RANDOM = Key.of(3).numpy()


def tree(values, layout=LAYOUT):
    return Tree(layout, torch.tensor(np.asarray(values, np.float32)))


def mask(*where):
    flat = torch.zeros(LAYOUT.size, dtype=torch.bool)
    flat[list(where)] = True
    return Mask(LAYOUT, flat)


def message(values, weight=1.0, support=None, layout=LAYOUT):
    value = tree(values, layout)
    return Message(parts={"x": Part(value=restrict(value, support), weight=weight, support=support)})


def normal():
    return RANDOM.normal(size=LAYOUT.size)


def total(messages):
    sums = Sums()
    for one in messages:
        sums.add(one)
    return sums


def bits(sums, otherwise=0.0):
    return sums.mean("x", otherwise=otherwise).flat.numpy().tobytes(), sums.support("x").digest, sums.count("x")


def exact_mean(messages, otherwise=0.0):
    """By rational numbers, coordinate by coordinate."""
    parts = [m.parts["x"] for m in messages]
    found = []
    for at in range(parts[0].value.layout.size):
        mine = [p for p in parts if p.support is None or bool(p.support.flat[at])]
        weight = sum((Fraction(p.weight) for p in mine), Fraction(0))
        value = sum((Fraction(p.weight) * Fraction(float(p.value.flat[at])) for p in mine), Fraction(0))
        found.append(float(value / weight) if mine else otherwise)
    return np.array(found).astype(np.float32)


@pytest.fixture(scope="module")
def hard():
    """10,000 contributions of small positive values under several weights: two planes would not carry them."""
    layout, random = Layout(("x",), ((24,),)), Key.of(1).numpy()
    values = (10.0 ** random.uniform(-12, -6, (10_000, 24))).astype(np.float32)
    weights = random.choice([1.0, 3.0, 37.0, 600.0, 0.1, 1 / 3], 10_000)  # the last two fill all 53 bits
    return values, weights, [message(v, float(w), layout=layout) for v, w in zip(values, weights, strict=True)]


def test_ten_thousand_small_values_have_the_same_bits_in_any_order_and_grouping(hard):
    values, weights, messages = hard
    forward = total(messages)
    order = Key.of(2).permutation(len(messages)).tolist()
    cuts = sorted(Key.of(4).numpy().choice(range(1, len(messages)), 99, replace=False).tolist())
    groups = [total(messages[i] for i in order[a:b]) for a, b in itertools.pairwise([0, *cuts, len(order)])]
    regrouped = Sums()
    for at in Key.of(5).permutation(len(groups)).tolist():
        regrouped.merge(groups[at])
    assert bits(regrouped) == bits(forward)
    # Not only after rounding to float32, which would hide most of what goes wrong: the running sums are the same bits.
    assert fingerprint(regrouped) == fingerprint(forward)
    # A running sum in float64 does depend on the order: the law is not empty.
    products = values.astype(np.float64) * weights[:, None]
    assert np.count_nonzero(np.cumsum(products, axis=0)[-1] != np.cumsum(products[order], axis=0)[-1]) > 12


def test_the_mean_of_ten_thousand_is_the_exact_mean_rounded_once(hard):
    values, weights, messages = hard
    products = values.astype(np.float64) * weights[:, None]
    expected = [math.fsum(column) / math.fsum(weights) for column in products.T]
    assert np.array_equal(total(messages).mean("x", otherwise=0.0).flat.numpy(), np.array(expected).astype(np.float32))


def test_the_smallest_values_are_not_rounded():
    layout, random = Layout(("x",), ((50,),)), Key.of(9).numpy()
    tiny = [random.uniform(1e-12, 9e-12, 50) for _ in range(3)]
    for count in (1, 2, 3):
        messages = [message(v, w, layout=layout) for v, w in zip(tiny[:count], (1.0, 0.5, 7.0), strict=False)]
        assert np.array_equal(total(messages).mean("x", otherwise=0.0).flat.numpy(), exact_mean(messages))


def test_large_and_small_values_in_one_coordinate_lose_nothing_in_any_order():
    layout, random = Layout(("x",), ((16,),)), Key.of(7).numpy()
    large = random.choice([2.0**30, -(2.0**30), 2.0**29, -3.0 * 2.0**28], (3, 16))
    tiny = (10.0 ** random.uniform(-12, -2, (300, 16))).astype(np.float32)
    # The large ones cancel exactly, so the mean is that of the tiny ones and nothing may have been rounded away.
    messages = [message(v, 1.25, layout=layout) for v in (*large, *-large, *tiny)]
    order = Key.of(8).permutation(306).tolist()
    halves = total(messages[i] for i in order[:100]) + total(messages[i] for i in order[100:])
    assert bits(halves) == bits(total(messages))
    assert np.array_equal(halves.mean("x", otherwise=0.0).flat.numpy(), exact_mean(messages))


numbers = st.floats(2.0**-40, 2.0**20, width=32) | st.floats(-(2.0**20), -(2.0**-40), width=32) | st.just(0.0)
contribution = st.tuples(
    st.lists(numbers, min_size=6, max_size=6),
    st.integers(1, 1000) | st.sampled_from([0.5, 0.25, 1.75]),
    st.none() | st.lists(st.booleans(), min_size=6, max_size=6),
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(contribution, min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_the_weighted_mean_per_coordinate_is_that_of_rational_numbers_whoever_vouches_for_what(drawn, random):
    layout = Layout(("x",), ((6,),))
    supports = [None if s is None else Mask(layout, torch.tensor(s)) for _, _, s in drawn]
    messages = [message(v, float(w), s, layout) for (v, w, _), s in zip(drawn, supports, strict=True)]
    expected = exact_mean(messages, otherwise=-7.0)
    assert np.array_equal(total(messages).mean("x", otherwise=-7.0).flat.numpy(), expected)
    shuffled = messages[:]
    random.shuffle(shuffled)
    cut = random.randrange(len(messages) + 1)
    assert bits(total(shuffled[:cut]) + total(shuffled[cut:]), -7.0) == bits(total(messages), -7.0)


@pytest.mark.parametrize("kinds", [("all", "all"), ("same", "same"), ("all", "same"), ("same", "own"), ("own", "all")])
def test_merging_partial_sums_is_adding_one_by_one_also_with_mixed_supports(kinds):
    shared, random = mask(0, 1, 5, 19), Key.of(6).numpy()
    supports = {
        "all": lambda: None,
        "same": lambda: shared,
        "own": lambda: Mask(LAYOUT, torch.from_numpy(random.random(20) < 0.5)),
    }
    halves = [[message(normal(), float(i + 1), supports[kind]()) for i in range(3)] for kind in kinds]
    one_by_one = total(halves[0] + halves[1])
    left, right = total(halves[0]), total(halves[1])
    before = bits(left), bits(right)
    assert bits(left + right) == bits(right + left) == bits(one_by_one)
    assert (bits(left), bits(right)) == before
    assert bits(left.merge(right)) == bits(one_by_one)
    assert bits(Sums().merge(one_by_one)) == bits(one_by_one)
    assert bits(right) == before[1]


def test_where_nobody_vouches_the_other_value_stays():
    messages = [message(normal(), 2.0, mask(0, 1, 2)), message(normal(), 3.0, mask(2, 3))]
    instead = tree(normal())
    mean, support = total(messages).mean("x", otherwise=instead), total(messages).support("x")
    assert support == mask(0, 1, 2, 3)
    assert torch.equal(mean.flat[4:], instead.flat[4:])
    assert not torch.equal(mean.flat[:4], instead.flat[:4])
    assert torch.equal(total(messages[:1]).mean("x", otherwise=instead).flat[3:], instead.flat[3:])
    assert float(total(messages).mean("x", otherwise=5.0).flat[10]) == 5.0


def test_a_value_counts_on_its_support_alone_and_with_its_weight():
    one, two = message([8.0] * 20, 1.0, mask(0, 1)), message([2.0] * 20, 3.0, mask(1, 2))
    assert total([one, two]).mean("x", otherwise=0.0).flat[:4].tolist() == [8.0, 3.5, 2.0, 0.0]


# -- identities of reference/methods.md 6.4, and acceptance test 17 --------------------------------------------------


def test_under_full_masks_and_equal_weights_the_mean_is_the_plain_mean():
    values = [normal().astype(np.float32) for _ in range(4)]
    plain = np.mean(np.array(values, np.float64), axis=0).astype(np.float32)
    full = Mask.full(LAYOUT)
    for weights, support in ((1.0, None), (17.0, None), (1.0, full)):
        mean = total(message(v, weights, support) for v in values).mean("x", otherwise=9.0)
        assert np.array_equal(mean.flat.numpy(), plain)


def test_one_client_gives_back_its_tensor_on_its_mask_and_the_old_value_elsewhere():
    mine, old, kept = normal(), tree(normal()), mask(1, 4, 7)
    mean = total([message(mine, 13.0, kept)]).mean("x", otherwise=old)
    assert equal(mean, Tree(LAYOUT, torch.where(kept.flat, tree(mine).flat, old.flat)))


def test_under_a_common_mask_the_mean_per_coordinate_is_the_mean_of_the_restricted_values():
    kept, values = mask(0, 3, 9, 15), [normal() for _ in range(5)]
    weights = (1.0, 2.0, 3.0, 4.0, 5.0)
    masked = total(message(v, w, kept) for v, w in zip(values, weights, strict=True))
    dense = total(message(v * kept.flat.numpy(), w) for v, w in zip(values, weights, strict=True))
    assert equal(masked.mean("x", otherwise=0.0), dense.mean("x", otherwise=0.0))


def test_the_union_of_independent_random_masks_has_the_expected_size():
    layout = Layout(("x",), ((20_000,),))
    masks = [Mask(layout, torch.from_numpy(Key.of(i).numpy().random(20_000) < 0.3)) for i in range(4)]
    union = total(message(np.zeros(20_000), 1.0, m, layout) for m in masks).support("x")
    assert 1 - union.sparsity() == pytest.approx(1 - 0.7**4, abs=0.015)


def test_parts_are_summed_each_under_its_own_name_and_layout():
    other = Layout(("s",), ((2,),))
    both = Message(parts={"x": Part(value=tree(normal())), "y": Part(value=tree([1.0, 3.0], other), weight=2.0)})
    sums = Sums().add(both).add(Message(parts={"y": Part(value=tree([4.0, 6.0], other))}))
    assert sums.mean("y", otherwise=0.0).flat.tolist() == [2.0, 4.0]
    assert (sums.count("x"), sums.count("y"), sums.count("z")) == (1, 2, 0)
    assert "z" not in sums


# -- what cannot be summed is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**31, -(2.0**40)])
def test_what_is_not_finite_or_too_large_is_refused_with_client_part_and_tensor(bad):
    values = normal()
    values[14] = bad
    with pytest.raises(NumericError) as caught:
        Sums().add(message(values), who="client 5 in round 2")
    text = str(caught.value)
    assert "client 5 in round 2" in text
    assert "'x'" in text
    assert "'b'" in text
    assert "\n" not in text


def test_it_is_the_product_with_the_weight_that_must_not_be_too_large():
    Sums().add(message([2.0**21] * 20, 1.0))
    with pytest.raises(NumericError, match="weight 1024"):
        Sums().add(message([2.0**21] * 20, 1024.0))


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf, 2.0**31])
def test_a_weight_that_is_not_above_zero_and_finite_is_refused_with_client_and_part(weight):
    with pytest.raises(NumericError, match=r"client 5.*'x'.*weight"):
        Sums().add(message(normal(), weight), who="client 5")


def test_a_sum_that_may_have_left_the_exact_range_is_refused_with_part_and_tensor_in_any_order():
    below = [message([2.0**30] * 20) for _ in range(7)]
    assert float(total(below).mean("x", otherwise=0.0).flat[0]) == 2.0**30
    with pytest.raises(NumericError, match=r"'x'.*'a'"):
        total(message([2.0**30] * 20) for _ in range(9)).mean("x", otherwise=0.0)
    # Five up and five down end at zero, and alternating they never leave the range; but another order does.
    up, down, small = (message([value] * 20) for value in (2.0**30.9, -(2.0**30.9), 2.0**-20))
    for order in ([up, down] * 5, [up] * 5 + [down] * 5):
        for sums in (total([small, *order]), total(order[:4]) + total([small, *order[4:]])):
            with pytest.raises(NumericError, match=r"'x'.*2\^33"):
                sums.mean("x", otherwise=0.0)
