import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedray.prune.schedule import KINDS, cosine, is_event, sparsity_at

GRADUAL = ("linear", "cubic", "iterative")


def at(number, kind, **changes):
    return sparsity_at(number, kind=kind, **{"sparsity": 0.9, "start": 2, "end": 10, "every": 2} | changes)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("one_shot", [0.9, 0.9, 0.9, 0.9, 0.9]),
        ("linear", [0.0, 0.225, 0.45, 0.675, 0.9]),
        ("cubic", [0.0, 0.9 * (1 - 0.75**3), 0.9 * (1 - 0.5**3), 0.9 * (1 - 0.25**3), 0.9]),
        ("iterative", [1 - 0.1 ** (i / 5) for i in (1, 2, 3, 4, 5)]),
    ],
)
def test_each_schedule_hits_its_formula_at_its_events_and_holds_between_them(kind, values):
    for event, value in enumerate(values):
        assert at(2 + 2 * event, kind) == pytest.approx(value, abs=1e-12)
        assert at(3 + 2 * event, kind) == at(2 + 2 * event, kind)
    assert at(1, kind) == 0.0
    assert at(10, kind) == at(99, kind) == 0.9


def test_the_iterative_schedule_removes_the_same_fraction_of_what_is_left_each_time():
    kept = [1 - at(number, "iterative") for number in (1, 2, 4, 6, 8, 10)]
    ratios = [b / a for a, b in itertools.pairwise(kept)]
    assert ratios == pytest.approx([0.1**0.2] * 5)


@pytest.mark.parametrize("kind", GRADUAL)
def test_the_last_event_is_the_end_even_where_every_does_not_hit_it(kind):
    events = [r for r in range(20) if is_event(r, kind=kind, start=1, end=9, every=3)]
    assert events == [1, 4, 7, 9]
    assert sparsity_at(9, kind=kind, sparsity=0.8, start=1, end=9, every=3) == 0.8


def test_one_shot_has_one_event():
    assert [r for r in range(20) if is_event(r, kind="one_shot", start=3, end=9, every=2)] == [3]


@pytest.mark.parametrize("kind", GRADUAL)
def test_a_schedule_starts_from_its_initial_sparsity(kind):
    assert at(1, kind, initial=0.4) == 0.4
    assert 0.4 <= at(2, kind, initial=0.4) < at(4, kind, initial=0.4) < at(10, kind, initial=0.4) == 0.9


@given(
    kind=st.sampled_from(KINDS),
    start=st.integers(0, 5),
    length=st.integers(1, 30),
    every=st.integers(1, 9),
    sparsity=st.floats(0, 0.99),
)
def test_sparsity_never_falls_and_changes_only_at_events(kind, start, length, every, sparsity):
    options = {"kind": kind, "start": start, "end": start + length, "every": every}
    values = [sparsity_at(r, sparsity=sparsity, **options) for r in range(start + length + 3)]
    assert values[-1] == sparsity
    for number, (before, after) in enumerate(itertools.pairwise(values), start=1):
        assert before <= after + 1e-12
        assert before == after or is_event(number, **options)


def test_the_cosine_falls_from_its_initial_value_to_zero_and_stays_there():
    assert [cosine(r, initial=0.4, end=100) for r in (0, 50, 100, 150)] == pytest.approx([0.4, 0.2, 0.0, 0.0])
    assert cosine(0, initial=0.4, end=0) == 0.0
