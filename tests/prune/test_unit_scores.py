"""Scores against torch-pruning and brute force, and which units are chosen, by hand."""

from functools import partial

import numpy as np
import pytest
import torch

from fedray.errors import ConfigError
from fedray.models import MLP, BatchNormCNN, ResNet
from fedray.models.structure import find_structure
from fedray.models.task import layouts
from fedray.prune.structure import Group, Member, Structure
from fedray.prune.unit_scores import (
    UNIT_SCORES,
    alive,
    check_units,
    choose_units,
    cut_most,
    kept_units,
    unit_counts,
    unit_scores,
    units,
)
from fedray.tree import Layout, Mask, Tree

LAYOUT = Layout(("a.weight", "a.bias", "norm.weight", "norm.bias", "b.weight"), ((3, 2), (3,), (3,), (3,), (1, 6)))


def own(tensor, size, *, width=1, dim=0, output=True):
    return Member(tensor, dim, np.arange(size * width).reshape(size, width), output)


UNITS = Group(
    "a",
    "neuron",
    3,
    (
        own("a.weight", 3),
        own("a.bias", 3),
        own("norm.weight", 3),
        own("norm.bias", 3),
        own("b.weight", 3, width=2, dim=1, output=False),
    ),
)
ONE = Structure(LAYOUT, (UNITS,))
PARAMS = Tree.of(
    {
        "a.weight": torch.tensor([[1.0, -2.0], [0.0, 3.0], [4.0, 4.0]]),
        "a.bias": torch.tensor([90.0, 91.0, 92.0]),
        "norm.weight": torch.tensor([-2.0, 1.0, 0.0]),
        "norm.bias": torch.tensor([93.0, 94.0, 95.0]),
        "b.weight": torch.tensor([[1.0, 1.0, 0.0, 2.0, -3.0, 0.0]]),
    }
)
ALL = Mask.full(units(ONE, ("neuron",)))


@pytest.mark.parametrize(
    ("score", "by_hand"),
    [
        ("l1", [3, 3, 8]),
        ("l2", [5**0.5, 3, 32**0.5]),
        ("norm_scale", [2, 1, 0]),
        # The means over a.weight, norm.weight and b.weight of the sums of squares.
        ("group", [(5 + 4 + 2) / 3, (9 + 1 + 4) / 3, (32 + 0 + 9) / 3]),
        # Distances of (1, -2), (0, 3) and (4, 4): 26, 45 and 17 squared.
        ("fpgm", [26**0.5 + 45**0.5, 26**0.5 + 17**0.5, 45**0.5 + 17**0.5]),
    ],
)
def test_scores_by_hand(score, by_hand):
    found = unit_scores(ONE, PARAMS, score, among=ALL)
    assert torch.allclose(found.flat, torch.tensor(by_hand, dtype=torch.float32))


def test_a_geometric_median_is_that_of_the_units_that_are_left():
    left = Mask(ALL.layout, torch.tensor([True, True, False]))
    found = unit_scores(ONE, PARAMS, "fpgm", among=left)
    assert torch.allclose(found.flat[:2], torch.tensor([26**0.5, 26**0.5]))


MODELS = {
    "mlp": (partial(MLP, hidden=(7, 6)), (12,)),
    "batchnorm_cnn": (partial(BatchNormCNN, width=5), (1, 8, 8)),
    "resnet8": (partial(ResNet, blocks=(1, 1, 1), norm="batch"), (3, 8, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_torch_pruning(name):
    torch_pruning = pytest.importorskip("torch_pruning")
    build, shape = MODELS[name]
    torch.manual_seed(0)
    module, sample = build(shape=shape, num_classes=3).eval(), torch.randn(1, *shape)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    structure = find_structure(module, sample)
    params = Tree.of({key: value.detach() for key, value in module.named_parameters()})
    assert params.layout == layouts(module)[0]
    graph = torch_pruning.DependencyGraph().build_dependency(module, sample)
    importance = torch_pruning.importance
    oracles = {
        "group": importance.GroupMagnitudeImportance(normalizer=None),
        "l1": importance.MagnitudeImportance(p=1, normalizer=None, group_reduction="first"),
    }
    if name != "mlp":
        oracles["norm_scale"] = importance.BNScaleImportance(normalizer=None)
    layout = units(structure, ("filter", "neuron"))
    assert len(layout.names) >= 2
    for score, oracle in oracles.items():
        found = unit_scores(structure, params, score, among=Mask.full(layout))
        for group in structure.groups:
            if group.kind == "block":
                continue
            layer = module.get_submodule(group.name)
            pruner = graph.get_pruner_of_module(layer)
            theirs = oracle(graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(group.size))))
            computed = [m.tensor for m in group.members if m.output and m.tensor in params.layout.spans]
            if score == "l1" and sum(len(params.layout.shape(tensor)) > 1 for tensor in computed) > 1:
                continue  # theirs reads the first of the coupled layers alone
            assert torch.allclose(found[group.name], theirs, rtol=1e-5), (score, group.name)


@pytest.mark.parametrize(("score", "kind"), [("fpgm", "block"), ("norm_scale", "neuron")])
def test_a_score_that_says_nothing_about_a_group_is_refused(score, kind):
    bare = Group("a", kind, 3, (own("a.weight", 3), own("a.bias", 3)))
    structure = Structure(LAYOUT, (bare,))
    with pytest.raises(ConfigError) as caught:
        unit_scores(structure, PARAMS, score, among=Mask.full(units(structure, (kind,))))
    assert str(caught.value) == (
        f"pruner's score of units is {score}; it says nothing about {kind} group a: choose another score, or leave "
        "that kind out of pruner.units"
    )


def test_kinds_that_a_model_has_not_are_refused():
    with pytest.raises(ConfigError) as caught:
        units(ONE, ("filter", "head"))
    assert str(caught.value) == (
        "pruner.units is ['filter', 'head']; this model has none of them, it has neuron: choose those"
    )


# -- blocks ----------------------------------------------------------------------------------------------------------

BLOCKS = Layout(("x.weight", "x.bias", "y.weight", "y.norm.weight"), ((2, 2), (2,), (1, 2), (1,)))
BLOCK_GROUPS = (
    Group("x", "block", 1, tuple(Member(f"x.{w}", 0, np.arange(2)[None], True) for w in ("weight", "bias")), 0),
    Group("y", "block", 1, tuple(Member(f"y.{w}", 0, np.arange(1)[None], True) for w in ("weight", "norm.weight")), 0),
)
BLOCK_PARAMS = Tree(BLOCKS, torch.tensor([1.0, -1.0, 3.0, 3.0, 50.0, 50.0, 2.0, -3.0, 1.0]))


@pytest.mark.parametrize(
    ("score", "by_hand"), [("l1", [8 / 4, 5 / 2]), ("l2", [5**0.5, 6.5**0.5]), ("group", [20 / 4, 14 / 3])]
)
def test_blocks_are_ranked_against_each_other_by_means_over_their_parameters(score, by_hand):
    structure = Structure(BLOCKS, BLOCK_GROUPS)
    layout = units(structure, ("block",))
    assert (layout.names, layout.sizes) == (("blocks",), (2,))
    found = unit_scores(structure, BLOCK_PARAMS, score, among=Mask.full(layout))
    assert torch.allclose(found.flat, torch.tensor(by_hand, dtype=torch.float32))
    how = {"within": Mask.full(layout), "score": score, "most": 1.0}
    for ranking in ("local", "global"):
        kept = kept_units(structure, choose_units(structure, BLOCK_PARAMS, 0.5, ranking=ranking, **how))
        weakest = min((0, 1), key=lambda at: by_hand[at])
        assert [bool(kept[name]) for name in "xy"] == [at != weakest for at in (0, 1)]
    mask = structure.mask({"x": torch.tensor([False]), "y": torch.tensor([True])})
    assert mask.counts() == {"x.weight": 0, "x.bias": 0, "y.weight": 2, "y.norm.weight": 1}
    assert alive(structure, ("block",), mask).flat.tolist() == [False, True]


# -- choosing --------------------------------------------------------------------------------------------------------

PAIR = Layout(("a.weight", "b.weight"), ((4, 1), (10, 1)))
PAIRS = Structure(
    PAIR, (Group("a", "neuron", 4, (own("a.weight", 4),)), Group("b", "filter", 10, (own("b.weight", 10),)))
)
VALUES = Tree(PAIR, torch.tensor([4.0, 1.0, 3.0, 8.0, *[0.1 * at for at in (5, 1, 5, 3, 9, 9, 2, 8, 7, 1)]]))
BOTH = units(PAIRS, ("neuron", "filter"))


def chosen(sparsity, ranking="local", most=1.0, within=None):
    how = {"score": "l1", "ranking": ranking, "most": most}
    found = choose_units(PAIRS, VALUES, sparsity, within=Mask.full(BOTH) if within is None else within, **how)
    return [found[name].nonzero().flatten().tolist() for name in BOTH.names]


def test_counts_are_ceilings_without_rounding_error_and_one_unit_stays():
    assert unit_counts(BOTH, 0.5) == {"a": 2, "b": 5}
    assert unit_counts(BOTH, 0.7) == {"a": 2, "b": 3}
    assert unit_counts(BOTH, 0.9) == {"a": 1, "b": 1}
    assert unit_counts(BOTH, 0.999) == {"a": 1, "b": 1}
    assert unit_counts(BOTH, 0.0) == {"a": 4, "b": 10}


def test_a_local_ranking_keeps_the_highest_of_each_group_and_the_earlier_of_equals():
    assert chosen(0.5) == [[0, 3], [0, 4, 5, 7, 8]]
    assert chosen(0.4) == [[0, 2, 3], [0, 2, 4, 5, 7, 8]]
    assert chosen(0.9) == [[3], [4]]


def test_a_global_ranking_compares_scores_over_the_mean_of_their_group():
    # Over the mean: 1, 0.25, 0.75, 2 and 1, 0.2, 1, 0.6, 1.8, 1.8, 0.4, 1.6, 1.4, 0.2; ceil(0.5 * 14) = 7 stay.
    assert chosen(0.5, "global") == [[0, 3], [0, 4, 5, 7, 8]]
    # ceil(0.3 * 14) = 5.
    assert chosen(0.7, "global") == [[3], [4, 5, 7, 8]]


def test_under_a_global_ranking_no_group_loses_more_than_the_cap_and_each_keeps_a_unit():
    # At most 2 of 4 and 5 of 10 may go, so 7 stay though 5 were asked for.
    assert chosen(0.7, "global", most=0.5) == [[0, 3], [0, 4, 5, 7, 8]]
    # At most 3 of 4: a keeps 1, b keeps 3 in any case; one more goes to the best of the rest.
    assert chosen(0.7, "global", most=0.75) == [[3], [4, 5, 7, 8]]
    tiny = Tree(PAIR, VALUES.flat.clone())
    tiny.flat[:3] = 0.0
    found = choose_units(PAIRS, tiny, 0.9, within=Mask.full(BOTH), score="l1", ranking="global", most=1.0)
    assert found.counts() == {"a": 1, "b": 1}


def test_only_units_that_are_left_are_chosen():
    within = Mask.full(BOTH)
    within = Mask(BOTH, within.flat.index_fill(0, torch.tensor([3, 8, 9]), False))
    assert chosen(0.5, within=within) == [[0, 2], [0, 2, 3, 7, 8]]
    assert chosen(0.0, within=within)[0] == [0, 1, 2]
    assert sum(map(len, chosen(0.2, "global", within=within))) == 11


def test_the_largest_sparsity_of_units_that_fits_is_found_as_by_trying_all():
    how = {"within": Mask.full(BOTH), "score": "l1"}
    # Every count of 4 or 10 units is met at some multiple of 1 / 20.
    local = {"ranking": "local", "most": 1.0}
    tried = [PAIRS.mask(kept_units(PAIRS, choose_units(PAIRS, VALUES, at / 20, **how, **local))) for at in range(20)]
    for limit in range(2, 15):
        smallest = min((mask for mask in tried if kept(mask) >= limit), key=kept)
        assert cut_most(PAIRS, VALUES, lambda mask, limit=limit: kept(mask) >= limit, **how) == smallest
    assert cut_most(PAIRS, VALUES, lambda _: False, **how) == Mask.full(PAIR)


def kept(mask):
    return sum(mask.counts().values())


def test_what_is_gone_is_what_has_nothing_left_of_it_and_cutting_it_changes_no_mask():
    flat = torch.ones(LAYOUT.size, dtype=torch.bool)
    mask = Mask(LAYOUT, flat)
    mask["a.weight"][:2] = False
    mask["a.bias"][:2] = False
    mask["norm.weight"][:2] = False
    mask["norm.bias"][:2] = False
    mask["b.weight"][0, :2] = False  # what reads the first unit, and not the second
    left = alive(ONE, ("neuron",), mask)
    assert left.flat.tolist() == [False, True, True]
    assert ONE.mask(kept_units(ONE, left)) & mask == mask
    assert alive(ONE, ("neuron",), None).flat.tolist() == [True] * 3


def test_every_score_has_a_test_by_hand():
    assert set(UNIT_SCORES) == {"l1", "l2", "group", "norm_scale", "fpgm"}


@pytest.mark.parametrize("score", UNIT_SCORES)
def test_what_cannot_be_scored_is_known_without_weights(score):
    module = ResNet(shape=(1, 8, 8), num_classes=3, blocks=(1,), widths=(4,), norm="none")
    structure = find_structure(module, torch.zeros(1, 1, 8, 8))
    params = Tree.of({name: tensor.detach() for name, tensor in module.named_parameters()})
    for kinds in (("filter",), ("block",), ("head",), ("filter", "block")):

        def scored(kinds=kinds):
            unit_scores(structure, params, score, among=alive(structure, kinds, None))

        def checked(kinds=kinds):
            check_units(structure, kinds, score)

        said = []
        for call in (scored, checked):
            try:
                call()
                said.append(None)
            except ConfigError as error:
                said.append(str(error))
        assert said[0] == said[1]
        says = kinds != ("head",) and score != "norm_scale" and not (score == "fpgm" and "block" in kinds)
        assert (said[0] is None) == says
