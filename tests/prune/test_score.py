import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.prune.score import lamp, magnitude, sensitivity
from fedray.prune.select import keep_top_global
from fedray.tree import Layout, Tree

LAYOUT = Layout(("a", "free", "b"), ((3,), (2,), (4,)))


def tree(*values, layout=LAYOUT):
    return Tree(layout, torch.tensor(values))


def test_a_lamp_score_is_the_square_over_the_squares_that_are_not_smaller_by_hand():
    score = lamp(tree(1.0, -2.0, 3.0, 9.0, 9.0, 0.0, 4.0, 0.0, -3.0), names=("a", "b"))
    expected = [1 / 14, 4 / 13, 9 / 9, 0.0, 0.0, 0.0, 16 / 16, 0.0, 9 / 25]
    assert torch.allclose(score.flat, torch.tensor(expected, dtype=torch.float64), rtol=1e-15)


def brute_force(values):
    """Quadratic, with the rank that ties have by their place."""
    squares = [float(value) ** 2 for value in values]
    order = sorted(range(len(squares)), key=lambda at: (-squares[at], at))
    found = [0.0] * len(squares)
    for rank, at in enumerate(order):
        total = sum(squares[other] for other in order[: rank + 1])
        found[at] = squares[at] / total if total else 0.0
    return found


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.sampled_from([0.0, -0.0, 0.25, -0.25, 1.0, 1.5, -3.0, 1e-3]), min_size=1, max_size=25))
def test_a_lamp_score_is_that_of_brute_force_also_with_ties(values):
    layout = Layout(("w",), ((len(values),),))
    score = lamp(tree(*values, layout=layout), names=("w",)).flat
    assert torch.allclose(score, torch.tensor(brute_force(values), dtype=torch.float64), rtol=1e-12)
    if any(values):
        assert int((score == 1.0).sum()) == 1
    # Of equal magnitudes the lower index is the larger, so the ranking is that of magnitudes within a tensor.
    kept = keep_top_global(Tree(layout, score), len(values) // 2, names=("w",))
    assert kept == keep_top_global(magnitude(tree(*values, layout=layout)), len(values) // 2, names=("w",))


def test_lamp_keeps_one_weight_of_every_tensor_where_a_plain_ranking_empties_one():
    params = tree(1e-3, 2e-3, -3e-3, 0.0, 0.0, 5.0, 4.0, 3.0, 2.0)
    by_lamp = keep_top_global(lamp(params, names=("a", "b")), 2, names=("a", "b"))
    assert by_lamp.counts() == {"a": 1, "free": 2, "b": 1}
    assert keep_top_global(magnitude(params), 2, names=("a", "b")).counts() == {"a": 0, "free": 2, "b": 2}


def test_sensitivity_keeps_its_sign():
    found = sensitivity(tree(1.0, -2.0, 3.0, 0.0, 1.0, 1.0, 1.0, 1.0, 2.0), tree(*[2.0] * 4, *[-1.0] * 5))
    assert found.flat.tolist() == [2.0, -4.0, 6.0, 0.0, -1.0, -1.0, -1.0, -1.0, -2.0]
