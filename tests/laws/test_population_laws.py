"""Laws of a population: every sample of a client has noise of its own, and only what is trained on is augmented."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedray.data.skew import Affine, Noise
from fedray.keys import Key
from fedray.sim.population import Population

CLIENTS, SIZE, HELD, LOCAL, WIDTH = 3, 6, 4, 5, 400
DEVICE = torch.device("cpu")


def shifted(x, generator):
    return x + 1.0


def blank(**changes):
    """Clients whose data are nothing but zeros, so that what is seen is what their circumstances add."""
    given = {"skew": Noise(std=1.0), "augment": shifted, "key": Key.of(0), **changes}
    return Population(
        train_x=np.zeros((CLIENTS * (SIZE + HELD), WIDTH), np.float32),
        train_y=np.zeros(CLIENTS * (SIZE + HELD), np.int64),
        test_x=np.zeros((LOCAL, WIDTH), np.float32),
        test_y=np.zeros(LOCAL, np.int64),
        rows=np.arange(CLIENTS * SIZE),
        starts=np.arange(CLIENTS + 1) * SIZE,
        local_rows=np.tile(np.arange(LOCAL), CLIENTS),
        local_starts=np.arange(CLIENTS + 1) * LOCAL,
        label_counts=np.full((CLIENTS, 1), SIZE),
        mean=np.zeros(1, np.float32),
        std=np.ones(1, np.float32),
        scale=1.0,
        held_rows=np.arange(CLIENTS * HELD) + CLIENTS * SIZE,
        held_starts=np.arange(CLIENTS + 1) * HELD,
        **given,
    )


def seen(samples):
    return samples.take(slice(None), DEVICE)[0].double()


KINDS = {"training": Population.train, "held-out": Population.held, "local test": Population.local_samples}


@pytest.mark.parametrize(("one", "two"), list(itertools.combinations(KINDS, 2)))
def test_two_kinds_of_samples_of_a_client_do_not_share_noise(one, two):
    people = blank()
    for client in range(CLIENTS):
        first, second = (seen(KINDS[kind](people, client)) for kind in (one, two))
        assert float(first.std()) > 0.2
        together = torch.corrcoef(torch.cat([first, second]))[: len(first), len(first) :]
        assert float(together.abs().max()) < 0.4


def test_no_two_samples_of_a_population_share_noise():
    people = blank()
    every = torch.cat([seen(kind(people, client)) for kind in KINDS.values() for client in range(CLIENTS)])
    assert len(every) == CLIENTS * (SIZE + HELD + LOCAL)
    apart = torch.corrcoef(every) - torch.eye(len(every))
    assert float(apart.abs().max()) < 0.4


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_sees_a_sample_the_same_whenever_it_looks(kind):
    for client in range(CLIENTS):
        first, again, other = (seen(KINDS[kind](p, client)) for p in (blank(), blank(), blank(key=Key.of(1))))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_the_global_test_set_is_nobodys_and_has_no_noise():
    assert not seen(blank().test(0, LOCAL)).any()


def test_only_training_samples_are_augmented():
    people = blank()
    for client in range(CLIENTS):
        assert people.train(client).augment is shifted
        assert people.held(client).augment is None
        assert people.local_samples(client).augment is None
    assert people.test(0, LOCAL).augment is None


def test_a_client_has_one_hand_for_all_its_samples():
    image = np.random.default_rng(0).normal(size=(1, 1, 9, 9)).astype(np.float32)
    counts = {"train_x": CLIENTS * (SIZE + HELD), "test_x": LOCAL}
    images = {name: np.repeat(image, count, axis=0) for name, count in counts.items()}
    people = replace(blank(skew=Affine(inversion=0.5), augment=None), **images)
    for client in range(CLIENTS):
        every = torch.cat([seen(kind(people, client)) for kind in KINDS.values()])
        assert torch.allclose(every, every[:1].expand_as(every), atol=1e-5)
