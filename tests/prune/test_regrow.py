import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.errors import ConfigError
from fedray.prune.regrow import drop, grow, recut
from fedray.tree import Layout, Mask, Tree

LAYOUT = Layout(("a", "free", "b"), ((12,), (3,), (9,)))
NAMES = ("a", "b")


def tree_of(seed):
    return Tree(LAYOUT, torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(seed)))


def mask_of(seed, counts):
    kept = {}
    for at, (name, count) in enumerate(counts.items()):
        size = LAYOUT.spans[name].stop - LAYOUT.spans[name].start
        order = torch.randperm(size, generator=torch.Generator().manual_seed(100 * seed + at))
        kept[name] = torch.zeros(size, dtype=torch.bool).index_fill(0, order[:count], True)
    return Mask.of(LAYOUT, kept)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), a=st.integers(0, 12), b=st.integers(0, 9), swap=st.floats(0, 1), may=st.booleans())
def test_regrowth_keeps_counts_and_revives_only_what_is_dropped_at_the_pruned_point(seed, a, b, swap, may):
    counts = {"a": a, "b": b}
    mask, params, gradient = mask_of(seed, counts), tree_of(seed), tree_of(seed + 1)
    fewer = {name: round((1 - swap) * count) for name, count in counts.items()}
    pruned = drop(params, mask, fewer, names=NAMES)
    grown = grow(gradient, pruned, counts, names=NAMES, avoid=None if may else mask)
    assert pruned.counts(NAMES) == fewer
    assert grown.counts(NAMES) == counts
    assert bool((pruned.flat & ~mask.flat).sum() == 0)
    assert bool((pruned.flat & ~grown.flat).sum() == 0)
    assert bool(grown["free"].all())
    for name in NAMES:
        weights, slopes = params[name].abs(), gradient[name].abs()
        lost, stayed = mask[name] & ~pruned[name], pruned[name]
        assert not lost.any() or not stayed.any() or weights[lost].max() < weights[stayed].min()
        new = grown[name] & ~pruned[name]
        passed = ~pruned[name] & ~new
        if not may:  # among equals in standing only: what was just dropped comes last
            if (passed & ~mask[name]).any():
                assert not (new & mask[name]).any()
            new, passed = new & ~mask[name], passed & ~mask[name]
        assert not new.any() or not passed.any() or slopes[new].min() > slopes[passed].max()


def test_what_was_just_dropped_returns_unless_it_is_avoided():
    layout = Layout(("w",), ((4,),))
    mask = Mask(layout, torch.tensor([True, True, False, False]))
    pruned = drop(Tree(layout, torch.tensor([1.0, 0.1, 0.0, 0.0])), mask, {"w": 1}, names=("w",))
    gradient = Tree(layout, torch.tensor([9.0, 5.0, -3.0, 4.0]))
    assert pruned.flat.tolist() == [True, False, False, False]
    assert grow(gradient, pruned, {"w": 2}, names=("w",)).flat.tolist() == [True, True, False, False]
    assert grow(gradient, pruned, {"w": 2}, names=("w",), avoid=mask).flat.tolist() == [True, False, False, True]
    assert grow(gradient, pruned, {"w": 4}, names=("w",), avoid=mask).flat.tolist() == [True] * 4


def test_ties_in_the_gradient_grow_at_the_lower_index():
    layout = Layout(("w",), ((5,),))
    mask = Mask(layout, torch.tensor([False, False, True, False, False]))
    grown = grow(Tree.zeros(layout), mask, {"w": 3}, names=("w",))
    assert grown.flat.tolist() == [True, True, True, False, False]


def test_growing_to_fewer_than_are_kept_is_refused():
    with pytest.raises(ConfigError, match="it must be 0 to"):
        grow(tree_of(0), mask_of(0, {"a": 5, "b": 5}), {"a": 4, "b": 5}, names=NAMES)


def test_the_grown_set_is_the_top_of_the_dense_gradient_by_brute_force():
    """Acceptance test 3 of the methods reference: a two-layer net, one derivative at a time, in float64."""
    torch.manual_seed(0)
    layout = Layout(("fc.weight", "out.weight"), ((5, 4), (3, 5)))
    params = Tree(layout, torch.randn(layout.size) * 0.7)
    inputs, labels = torch.randn(16, 4).double(), torch.randint(0, 3, (16,))
    mask = Mask(layout, torch.rand(layout.size) < 0.5)

    def loss(flat):
        first, second = flat[:20].view(5, 4), flat[20:].view(3, 5)
        return torch.nn.functional.cross_entropy(torch.tanh(inputs @ first.T) @ second.T, labels)

    point = torch.where(mask.flat, params.flat, 0.0).double()
    gradient = torch.func.grad(loss)(point)
    step = 1e-6 * torch.eye(layout.size, dtype=torch.float64)
    slopes = torch.stack([(loss(point + row) - loss(point - row)) / 2e-6 for row in step])
    counts = {name: count + 2 for name, count in mask.counts().items()}
    grown = grow(Tree(layout, gradient.float()), mask, counts, names=layout.names)
    for name, span in layout.spans.items():
        dropped = [at for at in range(span.start, span.stop) if not mask.flat[at]]
        best = sorted(dropped, key=lambda at: -abs(float(slopes[at])))[:2]
        new = (grown.flat & ~mask.flat).nonzero().flatten().tolist()
        assert sorted(best) == [at for at in new if span.start <= at < span.stop], name


def test_recut_keeps_the_largest_of_the_union_at_the_old_counts():
    layout = Layout(("w", "free"), ((5,), (1,)))
    mask = Mask(layout, torch.tensor([True, True, False, False, False, True]))
    params = Tree(layout, torch.tensor([0.5, -2.0, 3.0, 0.1, 9.0, 0.0]))
    union = Mask(layout, torch.tensor([True, True, True, True, False, True]))
    assert recut(params, mask, union, names=("w",)).flat.tolist() == [False, True, True, False, False, True]


def test_recut_fills_a_union_that_is_too_small_from_the_old_mask_by_index():
    layout = Layout(("w",), ((6,),))
    mask = Mask(layout, torch.tensor([False, True, True, False, True, False]))
    params = Tree(layout, torch.tensor([0.0, 0.1, 0.2, 0.0, 9.0, 0.0]))
    union = Mask(layout, torch.tensor([False, False, False, True, False, False]))
    assert recut(params, mask, union, names=("w",)).flat.tolist() == [False, True, True, True, False, False]
