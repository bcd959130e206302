import itertools

import numpy as np
import pytest
import torch

from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.prune.structure import Group, Member, Structure
from fedray.prune.widths import assigned, held_buffers, owned_outputs, warnings_of, width, window
from fedray.tree import Layout, Tree

LAYOUT = Layout(("conv.weight", "fc.weight", "fc.bias"), ((5, 2), (3, 10), (3,)))
STATS = Layout(("norm.running_mean", "norm.running_var"), ((5,), (5,)))
OWN = np.arange(5)[:, None]
FILTERS = Group(
    "conv",
    "filter",
    5,
    (
        Member("conv.weight", 0, OWN, True),
        Member("norm.running_mean", 0, OWN, True),
        Member("norm.running_var", 0, OWN, True),
        Member("fc.weight", 1, np.arange(10).reshape(5, 2), False),
    ),
)
BLOCK = Group("block", "block", 1, (Member("conv.weight", 0, np.arange(5)[None], True),), 0)
STRUCTURE = Structure(LAYOUT, (FILTERS, BLOCK))


@pytest.mark.parametrize(
    ("rate", "size", "held"),
    [(0.5, 5, 3), (0.5, 4, 2), (0.0625, 4, 1), (0.2, 5, 1), (0.14, 50, 7), (0.7, 10, 7), (1.0, 7, 7), (0.3, 10, 3)],
)
def test_a_width_is_the_ceiling_of_the_product_and_no_rounding_error_adds_a_unit(rate, size, held):
    assert width(rate, size) == held


def test_prefixes_are_nested_and_leave_residual_blocks_whole():
    widths = [window(STRUCTURE, rate) for rate in (0.2, 0.4, 0.6, 0.8, 1.0)]
    assert [kept["conv"].tolist() for kept in widths] == [[at < n for at in range(5)] for n in (1, 2, 3, 4, 5)]
    assert all(set(kept) == {"conv"} for kept in widths)
    for small, large in itertools.pairwise(widths):
        assert not (small["conv"] & ~large["conv"]).any()


@pytest.mark.parametrize("rate", [1.0, 0.5, 0.25, 0.125, 0.0625])
def test_after_as_many_rounds_as_units_a_rolling_window_has_held_each_unit_equally_often(rate):
    for first in (0, 3):
        counts = sum(window(STRUCTURE, rate, first + round)["conv"].int() for round in range(5))
        assert counts.tolist() == [width(rate, 5)] * 5


def test_a_window_goes_on_at_the_first_unit_past_the_last():
    assert window(STRUCTURE, 0.6, 3)["conv"].tolist() == [True, False, False, True, True]
    assert window(STRUCTURE, 0.6, 13)["conv"].tolist() == [True, False, False, True, True]


def test_clients_are_dealt_to_rates_in_exact_counts_by_the_key_alone():
    dealt = assigned(Key.of(0), 100, (6, 10, 11, 18, 55))
    assert [dealt.count(level) for level in range(5)] == [6, 10, 11, 18, 55]
    assert dealt == assigned(Key.of(0), 100, (6, 10, 11, 18, 55))
    assert dealt != assigned(Key.of(1), 100, (6, 10, 11, 18, 55))
    assert list(dealt) != sorted(dealt)
    # 7 * (0.5, 0.25, 0.25) is 3.5, 1.75 and 1.75: the two largest remainders get the two that are left over.
    assert sorted(assigned(Key.of(0), 7, (2, 1, 1))) == [0, 0, 0, 1, 1, 2, 2]
    assert assigned(Key.of(0), 3, (0.0, 0.1)) == (1, 1, 1)


def test_every_client_has_each_rate_in_some_deal():
    deals = [assigned(Key.of(0).fold(number), 4, (1, 1)) for number in range(30)]
    assert all(len({deal[client] for deal in deals}) == 2 for client in range(4))


def test_buffers_of_units_that_are_not_held_are_those_that_were_received():
    received = Tree(STATS, torch.arange(10.0))
    trained = Tree(STATS, torch.arange(10.0) + 100)
    found = held_buffers(STRUCTURE, window(STRUCTURE, 0.4, 4), trained, received)
    assert found["norm.running_mean"].tolist() == [100, 1, 2, 3, 104]
    assert found["norm.running_var"].tolist() == [105, 6, 7, 8, 109]
    assert trained.flat.tolist() == (torch.arange(10.0) + 100).tolist()


def test_outputs_that_are_not_owned_are_rows_of_the_last_layer():
    mask = owned_outputs(STRUCTURE, torch.tensor([True, False, True]))
    assert mask["fc.weight"].all(1).tolist() == [True, False, True]
    assert not mask["fc.weight"][1].any()
    assert mask["fc.bias"].tolist() == [True, False, True]
    assert bool(mask["conv.weight"].all())


def test_a_last_layer_without_a_row_for_each_class_is_refused():
    with pytest.raises(ConfigError, match=r"own_labels is True; the last layer, fc\.weight, has 3 outputs for 4 cl"):
        owned_outputs(STRUCTURE, torch.ones(4, dtype=torch.bool))


def test_a_deal_warns_of_units_that_nobody_trains_and_of_rates_that_nobody_has():
    rates = (1.0, 0.5, 0.25)
    assert warnings_of(rates, (1, 1, 1), 3) == warnings_of(rates, (1, 0, 1), 2) == ()
    (narrow,) = warnings_of(rates, (0, 1, 1), 4)
    assert narrow.startswith("of 4 clients none has rate 1: units past the widest (0.5) are trained by nobody, and ")
    assert warnings_of(rates, (0, 1, 1), 4, rolls=True) == ()
    # Of the paper's real-world mix over five clients, counts are 0, 1, 0, 1 and 3: 0.3, 0.5, 0.55, 0.9 and 2.75.
    levels, mix = (1.0, 0.5, 0.25, 0.125, 0.0625), (6, 10, 11, 18, 55)
    dealt = assigned(Key.of(0), 5, mix)
    missing = [f"{rate:g}" for at, rate in enumerate(levels) if at not in dealt]
    both = warnings_of(levels, mix, 5)
    assert [text.partition(":")[0] for text in both] == [
        "of 5 clients none has rate 1",
        f"5 clients are too few for these shares, and nobody has rate {' and '.join(missing)}",
    ]
    assert warnings_of(levels, mix, 5, rolls=True) == both[1:]
