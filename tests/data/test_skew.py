"""Laws of feature skew: a function of client, place and key; as strong as asked; exact where it can be."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from fedray.data.skew import Affine, Noise, Rotation, _splitmix
from fedray.errors import ConfigError
from fedray.keys import Key

IMAGES = torch.randn(30, 2, 9, 9, generator=torch.Generator().manual_seed(0))
KEY = Key.of(0)
SKEWS = [
    Noise(std=0.5),
    Rotation(),
    Rotation(degrees=100, groups=None),
    Affine(),
    Affine(inversion=1.0, shear_degrees=0, scale=0, contrast=0),
]


def seen(skew, x=IMAGES, positions=None, client=1, num_clients=4, key=KEY):
    positions = torch.arange(len(x)) if positions is None else positions
    return skew(x, positions=positions, size=len(IMAGES), client=client, num_clients=num_clients, key=key)


@pytest.mark.parametrize("skew", SKEWS, ids=str)
def test_a_sample_is_seen_the_same_in_any_batch_and_any_order(skew):
    whole, before = seen(skew), IMAGES.clone()
    for positions in (torch.randperm(30, generator=torch.Generator().manual_seed(1)), torch.tensor([17])):
        assert torch.equal(seen(skew, IMAGES[positions], positions), whole[positions])
    assert torch.equal(IMAGES, before)
    assert not torch.equal(whole, IMAGES)


@pytest.mark.parametrize("skew", SKEWS, ids=str)
def test_an_empty_batch_stays_empty(skew):
    assert seen(skew, IMAGES[:0]).shape == IMAGES[:0].shape


@pytest.mark.parametrize("skew", SKEWS[:4], ids=str)
def test_clients_see_differently(skew):
    assert not torch.equal(seen(skew, client=2), seen(skew, client=3))


@pytest.mark.parametrize("skew", [Noise(std=0.5), Affine()], ids=str)
def test_the_key_decides(skew):
    assert torch.equal(seen(skew), seen(skew, key=Key.of(0)))
    assert not torch.equal(seen(skew), seen(skew, key=Key.of(1)))


def noise_of(client, num_clients=4, std=0.5, size=400, shape=(1, 25, 21), key=KEY):
    x = torch.zeros(size, *shape)
    return seen(Noise(std=std), x, torch.arange(size), client, num_clients, key)


def test_noise_grows_with_the_number_of_the_client_up_to_std():
    assert [noise_of(client).std().item() for client in range(4)] == pytest.approx([0.125, 0.25, 0.375, 0.5], rel=0.01)


def test_noise_is_normal_and_without_correlation():
    z = noise_of(3, std=1.0).flatten(1).double()
    count = z.numel()
    assert z.mean().abs() < 5 / math.sqrt(count)
    assert z.var().item() == pytest.approx(1, abs=5 * math.sqrt(2 / count))
    assert (z**4).mean().item() == pytest.approx(3, abs=5 * math.sqrt(96 / count))
    # The Kolmogorov-Smirnov distance from the normal distribution; 1.95 is its quantile for one in a thousand.
    ranked = torch.special.ndtr(z.flatten().sort().values)
    assert (ranked - torch.arange(count) / count).abs().max() < 1.95 / math.sqrt(count)
    other = noise_of(3, std=1.0, key=Key.of(1)).flatten(1).double()
    for a, b in ((z[:, 1:], z[:, :-1]), (z[:, 4:], z[:, :-4]), (z[1:], z[:-1]), (z, other)):
        assert (a * b).mean().abs() < 5 / math.sqrt(a.numel())


def test_the_bits_of_noise_are_those_of_splitmix64():
    # The published first outputs for the seed 1234567.
    words = _splitmix(torch.arange(1, 4), 1234567)
    assert [int(word) % 2**64 for word in words] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_noise_is_in_samples_of_any_shape_and_of_odd_length():
    x = torch.zeros(3, 7)
    found = seen(Noise(std=1.0), x, torch.arange(3))
    assert found.shape == (3, 7)
    assert len(found.unique()) == 21


def test_no_noise_is_a_copy():
    found = seen(Noise(std=0))
    assert torch.equal(found, IMAGES)
    assert found.data_ptr() != IMAGES.data_ptr()


def test_four_groups_see_the_four_quarter_turns():
    for client in range(6):
        assert torch.equal(seen(Rotation(), client=client, num_clients=6), torch.rot90(IMAGES, client % 4, (2, 3)))


@pytest.mark.parametrize("skew", [Rotation(degrees=45, groups=None), Affine(contrast=0)], ids=str)
def test_what_comes_in_from_outside_repeats_the_border(skew):
    assert seen(skew, torch.full((2, 1, 9, 9), -0.4)) == pytest.approx(-0.4)


def test_without_groups_every_client_has_an_angle_of_its_own():
    rotation = Rotation(degrees=90, groups=None)
    assert [rotation.angle(client, 5) for client in range(5)] == [0, 18, 36, 54, 72]


def test_a_turn_is_a_turn_of_coordinates():
    # A bump at 3 pixels to the right of the centre comes to 30 degrees above that, counter-clockwise.
    line = torch.arange(33.0) - 16
    down, right = torch.meshgrid(line, line, indexing="ij")
    image = torch.exp(-((right - 9) ** 2 + down**2) / 8)[None, None]
    found = seen(Rotation(degrees=90, groups=3), image, torch.tensor([0]), client=1)
    at = torch.exp(-((right - 9 * math.cos(math.pi / 6)) ** 2 + (down + 9 * math.sin(math.pi / 6)) ** 2) / 8)
    assert (found[0, 0] - at).abs().max() < 0.06


def test_turning_back_restores_the_middle_of_a_smooth_image():
    line = torch.linspace(-1, 1, 40)
    image = torch.sin(3 * line)[:, None] + torch.cos(2 * line)[None, :]
    there = seen(Rotation(degrees=60, groups=2), image[None, None], torch.tensor([0]), client=1)
    back = seen(Rotation(degrees=-60, groups=2), there, torch.tensor([0]), client=1)
    assert (back[0, 0] - image)[12:28, 12:28].abs().max() < 0.01


def test_a_turn_of_an_oblong_image_keeps_distances():
    down, right = torch.meshgrid(torch.arange(21.0) - 10, torch.arange(41.0) - 20, indexing="ij")
    image = torch.exp(-((right - 6) ** 2 + down**2) / 6)[None, None]
    found = seen(Rotation(degrees=180, groups=2), image, torch.tensor([0]), client=1)  # a quarter turn
    at = torch.exp(-(right**2 + (down + 6) ** 2) / 6)
    assert (found[0, 0] - at).abs().max() < 0.01


def test_an_affine_hand_slants_and_magnifies_by_what_it_says():
    affine = Affine(shear_degrees=30, scale=0.5, contrast=0.7)
    slant, magnification, contrast, inverts = affine.hand(3, KEY)
    assert not inverts
    line = torch.arange(41.0) - 20
    down, right = torch.meshgrid(line, line, indexing="ij")
    image = torch.exp(-((right - 4) ** 2 + (down - 5) ** 2) / 12)[None, None]
    found = seen(affine, image, torch.tensor([0]), client=3)
    x = (right + math.tan(math.radians(slant)) * down) / magnification
    expected = contrast * torch.exp(-((x - 4) ** 2 + (down / magnification - 5) ** 2) / 12)
    assert (found[0, 0] - expected).abs().max() < 0.06


def test_hands_spread_over_their_range():
    affine = Affine(shear_degrees=20, scale=0.2, contrast=0.5, inversion=0.25)
    slants, sizes, contrasts, inverts = np.array([affine.hand(client, KEY) for client in range(2000)]).T
    for values, most in ((slants, 20), (np.log(sizes), 0.2), (np.log(contrasts), 0.5)):
        assert abs(values).max() <= most
        assert abs(values).max() > 0.98 * most
        assert abs(values.mean()) < 0.05 * most
    assert 0.2 < inverts.mean() < 0.3


def test_inversion_exchanges_light_and_dark_within_an_image():
    found = seen(Affine(shear_degrees=0, scale=0, contrast=0, inversion=1))
    expected = torch.stack([image.min() + image.max() - image for image in IMAGES])
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Noise(std=-0.1), "skew.std is -0.1; it must be at least 0 and finite, such as 0.1"),
        (lambda: Noise(std=float("nan")), "skew.std is nan; it must be at least 0"),
        (lambda: Rotation(degrees=361), "skew.degrees is 361; it must be from -360 to 360"),
        (lambda: Rotation(groups=0), "skew.groups is 0; it must be a whole number of at least 1, or null"),
        (lambda: Affine(shear_degrees=90), "skew.shear_degrees is 90; it must be from 0 to 89"),
        (lambda: Affine(inversion=2), "skew.inversion is 2; it must be from 0 to 1"),
        (lambda: Rotation().check((64,)), "skew is Rotation and samples have shape (64,); it needs images"),
        (lambda: Affine().check((1, 64)), "skew is Affine and samples have shape (1, 64); it needs images"),
    ],
)
def test_what_cannot_be_skewed_is_refused_with_a_remedy(build, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        build()
