"""Who takes part: functions of seed and round, fair where they promise it, never more than can be reached."""

import numpy as np
import pytest

from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.sim.sampling import Always, BySize, Fixed, Periodic, RandomDropout, Uniform

KEY = Key.of(3)
SIZES = np.array([1, 2, 3, 4, 10, 20, 30, 30])
EVERYONE = np.arange(8)


def draw(sampler, round, *, here=EVERYONE, cohort=3, key=KEY):
    return sampler(here, cohort=cohort, sizes=SIZES, round=round, key=key)


@pytest.mark.parametrize("sampler", [Uniform(), BySize(), Fixed(), Fixed(clients=(1, 4, 5))], ids=str)
def test_a_cohort_is_a_function_of_seed_and_round_and_names_nobody_twice(sampler):
    for round in range(1, 30):
        one, two = draw(sampler, round), draw(sampler, round)
        assert np.array_equal(one, two)
        assert len(set(one.tolist())) == len(one) == 3
    if not isinstance(sampler, Fixed):
        rounds = {tuple(sorted(draw(sampler, round).tolist())) for round in range(1, 30)}
        assert len(rounds) > 5


@pytest.mark.parametrize("sampler", [Uniform(), BySize(), Fixed(clients=(1, 4, 5))], ids=str)
def test_nobody_is_drawn_who_cannot_be_reached(sampler):
    here = np.array([0, 4, 5])
    for round in range(1, 20):
        assert set(draw(sampler, round, here=here).tolist()) <= set(here.tolist())
        assert draw(sampler, round, here=here[:0]).size == 0
    assert sorted(draw(sampler, 1, here=here).tolist()) == ([4, 5] if isinstance(sampler, Fixed) else [0, 4, 5])


def test_uniform_draws_each_client_alike_and_by_size_by_its_examples():
    rounds, sigmas = 4000, 5
    for sampler, shares in ((Uniform(), np.full(8, 1 / 8)), (BySize(), SIZES / SIZES.sum())):
        counts = np.zeros(8)
        for round in range(rounds):
            counts[draw(sampler, round, cohort=1)] += 1
        spread = np.sqrt(rounds * shares * (1 - shares))
        assert (np.abs(counts - rounds * shares) < sigmas * spread + 1).all()


def test_a_fixed_cohort_stays_and_one_from_the_seed_depends_on_it():
    assert {tuple(draw(Fixed(), round).tolist()) for round in range(1, 9)} == {tuple(draw(Fixed(), 1).tolist())}
    assert len({tuple(draw(Fixed(), 1, key=Key.of(seed)).tolist()) for seed in range(9)}) > 3
    for clients, rule in (((0, 8, 1), "from 0 to 7"), ((1, 1, 2), "each once"), ((1, 2), "set cohort=2")):
        with pytest.raises(ConfigError, match=rule):
            Fixed(clients=clients).check(num_clients=8, cohort=3)
    Fixed(clients=(0, 1, 7)).check(num_clients=8, cohort=3)


def test_a_period_comes_back_and_each_client_is_there_for_its_share_of_it():
    for groups in (None, 3):
        there = np.array(
            [Periodic(period=6, present=2, groups=groups)(round=r, num_clients=50, key=KEY) for r in range(1, 25)]
        )
        assert np.array_equal(there[:6], there[6:12])
        assert (there.sum(axis=0) == 8).all()
        assert not (there == there[:, :1]).all()
    grouped = Periodic(period=6, present=2, groups=3)(round=1, num_clients=9, key=KEY)
    assert grouped.tolist() == [True, False, False] * 3  # offsets 0, 2, 4: in round 1 only the first group is there
    assert Periodic(period=4, present=4)(round=3, num_clients=5, key=KEY).all()


def test_drop_out_takes_the_share_that_it_says_and_other_clients_each_round():
    there = np.array([RandomDropout(rate=0.3)(round=r, num_clients=200, key=KEY) for r in range(1, 101)])
    assert abs(there.mean() - 0.7) < 5 * np.sqrt(0.21 / there.size)
    assert not np.array_equal(there[0], there[1])
    assert RandomDropout(rate=0.0)(round=1, num_clients=9, key=KEY).all()
    assert Always()(round=1, num_clients=9, key=KEY).all()


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: RandomDropout(rate=1.0), "rate"),
        (lambda: RandomDropout(rate=float("nan")), "rate"),
        (lambda: Periodic(period=0, present=1), "period"),
        (lambda: Periodic(period=4, present=5), "present"),
        (lambda: Periodic(period=4, present=1, groups=0), "groups"),
    ],
)
def test_impossible_settings_are_refused_by_name(make, field):
    with pytest.raises(ConfigError, match=f"^{field} is"):
        make()
