import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import prune

from fedray.errors import ConfigError, NumericError
from fedray.keys import Key
from fedray.prune.score import magnitude
from fedray.prune.select import keep_top, keep_top_global, random_mask
from fedray.tree import Layout, Mask, Tree

LAYOUT = Layout(("a.weight", "a.bias", "b.weight"), ((6, 5), (6,), (4, 6)))
NAMES = ("a.weight", "b.weight")


def random_tree(seed, layout=LAYOUT):
    return Tree(layout, torch.randn(layout.size, generator=torch.Generator().manual_seed(seed)))


def brute_force(values, count, allowed):
    """The first `count` places of a stable sort by falling score."""
    places = [at for at in range(len(values)) if allowed[at]]
    chosen = sorted(places, key=lambda at: (-values[at], at))[:count]
    return [at in set(chosen) for at in range(len(values))]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_keep_top_keeps_exact_counts_and_the_lower_index_on_a_tie(data):
    size = data.draw(st.integers(1, 40))
    # Few distinct values, so that most examples have ties at the threshold.
    values = data.draw(
        st.lists(st.sampled_from([-1.0, 0.0, -0.0, 1.0, 2.0, float("inf")]), min_size=size, max_size=size)
    )
    allowed = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    count = data.draw(st.integers(0, sum(allowed)))
    layout = Layout(("free", "w"), ((2,), (size,)))
    score = Tree(layout, torch.tensor([float("-inf"), 5.0, *values]))
    within = Mask(layout, torch.tensor([True, True, *allowed]))
    mask = keep_top(score, {"w": count}, names=("w",), within=within)
    assert mask["w"].tolist() == brute_force(values, count, allowed)
    assert bool(mask["free"].all())
    assert keep_top_global(score, count, names=("w",), within=within) == mask


@pytest.mark.parametrize("count", [0, 1, 7, 29, 30])
def test_a_local_mask_is_that_of_torch_l1_unstructured(count):
    params = random_tree(3)
    module = torch.nn.Linear(5, 6)
    module.weight.data = params["a.weight"].clone()
    prune.l1_unstructured(module, "weight", amount=30 - count)
    mask = keep_top(magnitude(params), {"a.weight": count, "b.weight": 24}, names=NAMES)
    assert torch.equal(mask["a.weight"], module.weight_mask.bool())
    assert bool(mask["b.weight"].all())


@pytest.mark.parametrize("count", [1, 20, 53])
def test_a_global_mask_is_that_of_torch_global_unstructured(count):
    params = random_tree(4)
    modules = {name: torch.nn.Linear(*reversed(LAYOUT.shape(name))) for name in NAMES}
    for name, module in modules.items():
        module.weight.data = params[name].clone()
    prune.global_unstructured([(m, "weight") for m in modules.values()], prune.L1Unstructured, amount=54 - count)
    mask = keep_top_global(magnitude(params), count, names=NAMES)
    for name, module in modules.items():
        assert torch.equal(mask[name], module.weight_mask.bool())
    assert bool(mask["a.bias"].all())


def test_a_global_ranking_does_not_depend_on_the_order_of_the_names():
    score = Tree(LAYOUT, torch.ones(LAYOUT.size))
    assert keep_top_global(score, 7, names=NAMES) == keep_top_global(score, 7, names=NAMES[::-1])


def test_inputs_are_not_written_to():
    score, within = random_tree(5), Mask(LAYOUT, torch.rand(LAYOUT.size) < 0.7)
    before = score.flat.clone(), within.flat.clone()
    keep_top(score, {"a.weight": 3, "b.weight": 2}, names=NAMES, within=within)
    keep_top_global(score, 5, names=NAMES, within=within)
    assert torch.equal(score.flat, before[0])
    assert torch.equal(within.flat, before[1])


def test_a_score_that_is_nan_is_refused_by_the_name_of_its_tensor():
    score = random_tree(6)
    score["b.weight"][1, 1] = float("nan")
    with pytest.raises(NumericError, match=r"a score in tensor 'b\.weight' is NaN"):
        keep_top(score, {"a.weight": 3, "b.weight": 2}, names=NAMES)
    with pytest.raises(NumericError, match=r"a score in tensor 'b\.weight' is NaN"):
        keep_top_global(score, 3, names=NAMES)


@pytest.mark.parametrize("count", [-1, 31])
def test_a_count_that_cannot_be_kept_is_refused(count):
    with pytest.raises(ConfigError, match=r"coordinates of tensor 'a\.weight' were to be kept; it must be 0 to 30"):
        keep_top(random_tree(7), {"a.weight": count, "b.weight": 2}, names=NAMES)
    with pytest.raises(ConfigError, match=r"it must be 0 to 30"):
        random_mask(LAYOUT, NAMES, {"a.weight": count, "b.weight": 2}, Key.of(0))


def test_a_random_mask_is_drawn_again_from_its_seed():
    counts = {"a.weight": 11, "b.weight": 5}
    mask = random_mask(LAYOUT, NAMES, counts, Key.of(1).fold("mask"))
    assert mask.counts() == {**counts, "a.bias": 6}
    digest, kept, names = mask.seed
    assert random_mask(LAYOUT, names, dict(zip(names, kept, strict=True)), Key(digest)) == mask
    assert random_mask(LAYOUT, NAMES, counts, Key.of(2).fold("mask")) != mask


def test_a_random_mask_keeps_every_coordinate_equally_often():
    layout = Layout(("w",), ((10,),))
    kept = sum(random_mask(layout, ("w",), {"w": 3}, Key.of(seed)).flat.int() for seed in range(2000))
    assert np.abs(kept.numpy() - 600).max() < 5 * np.sqrt(2000 * 0.3 * 0.7)


def test_selecting_among_1_663_370_takes_less_than_60_ms():
    layout = Layout(("w",), ((1_663_370,),))
    score = random_tree(8, layout)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        keep_top(score, {"w": 166_337}, names=("w",))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.06
