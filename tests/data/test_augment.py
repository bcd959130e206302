"""Laws of augmentation: equal to cropping, flipping and cutting sample by sample; drawn for each sample; keyed."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from fedray.data.augment import Augment, Crop, Cutout, Flip
from fedray.errors import ConfigError

IMAGES = torch.randn(40, 3, 9, 7, generator=torch.Generator().manual_seed(0))
STAGES = [Crop(padding=2, fill=-1.5), Flip(), Cutout(size=4), Augment((Crop(padding=1), Flip(), Cutout(size=3)))]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def cropped_one_by_one(crop, images, places):
    found = []
    for image, (down, right) in zip(images, places.tolist(), strict=True):
        channels, height, width = image.shape
        frame = torch.full((channels, height + 2 * crop.padding, width + 2 * crop.padding), crop.fill)
        frame[:, crop.padding : crop.padding + height, crop.padding : crop.padding + width] = image
        found.append(frame[:, down : down + height, right : right + width])
    return torch.stack(found)


def cut_one_by_one(cutout, images, centres):
    found = []
    for image, (row, column) in zip(images, centres.tolist(), strict=True):
        top, left = row - cutout.size // 2, column - cutout.size // 2
        image = image.clone()
        image[:, max(top, 0) : max(top + cutout.size, 0), max(left, 0) : max(left + cutout.size, 0)] = 0
        found.append(image)
    return torch.stack(found)


@pytest.mark.parametrize("fill", [0.0, -1.5])
@pytest.mark.parametrize("padding", [1, 4])
def test_cropping_a_batch_is_cropping_each_sample(padding, fill):
    crop = Crop(padding=padding, fill=fill)
    places = crop._places(len(IMAGES), generator())
    assert torch.equal(crop(IMAGES, generator()), cropped_one_by_one(crop, IMAGES, places))


def test_a_reflected_margin_is_that_of_numpy():
    crop = Crop(padding=3, reflect=True)
    padded = torch.from_numpy(np.pad(IMAGES.numpy(), ((0, 0), (0, 0), (3, 3), (3, 3)), "reflect"))
    places = crop._places(len(IMAGES), generator()).tolist()
    windows = [
        image[:, row : row + 9, column : column + 7] for image, (row, column) in zip(padded, places, strict=True)
    ]
    assert torch.equal(crop(IMAGES, generator()), torch.stack(windows))


@pytest.mark.parametrize("size", [1, 3, 4, 30])
def test_cutting_a_batch_is_cutting_each_sample(size):
    cutout = Cutout(size=size)
    centres = cutout._centres(len(IMAGES), 9, 7, generator())
    assert torch.equal(cutout(IMAGES, generator()), cut_one_by_one(cutout, IMAGES, centres))


def test_flipping_turns_some_images_whole_and_leaves_the_others():
    flipped = Flip()(IMAGES, generator())
    turned = torch.tensor([torch.equal(a, b.flip(2)) for a, b in zip(flipped, IMAGES, strict=True)])
    same = torch.tensor([torch.equal(a, b) for a, b in zip(flipped, IMAGES, strict=True)])
    assert (turned ^ same).all()
    assert 5 < turned.sum() < 35


def test_a_probability_of_zero_and_of_one_are_none_and_all():
    assert torch.equal(Flip(probability=0)(IMAGES, generator()), IMAGES)
    assert torch.equal(Flip(probability=1)(IMAGES, generator()), IMAGES.flip(3))


def test_every_place_of_a_crop_and_every_centre_of_a_cut_is_as_likely():
    places = Crop(padding=1)._places(9000, generator())
    counts = torch.bincount(places[:, 0] * 3 + places[:, 1], minlength=9)
    assert (abs(counts - 1000) < 150).all()
    centres = Cutout()._centres(9000, 3, 3, generator())
    counts = torch.bincount(centres[:, 0] * 3 + centres[:, 1], minlength=9)
    assert (abs(counts - 1000) < 150).all()


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_the_generator_decides_and_the_images_are_left_alone(stage):
    before = IMAGES.clone()
    assert torch.equal(stage(IMAGES, generator()), stage(IMAGES, generator()))
    assert not torch.equal(stage(IMAGES, generator()), stage(IMAGES, generator(1)))
    assert torch.equal(IMAGES, before)


@pytest.mark.parametrize("stage", STAGES, ids=str)
@pytest.mark.parametrize("count", [0, 1])
def test_a_batch_may_be_empty_or_of_one(stage, count):
    found = stage(IMAGES[:count], generator())
    assert found.shape == IMAGES[:count].shape
    assert found.dtype == torch.float32


def test_a_chain_is_its_stages_one_after_the_other_with_one_generator():
    crop, flip = Crop(padding=2), Flip()
    chain = Augment.of({"crop": crop, "cutout": None, "flip": flip})
    assert chain.stages == (crop, flip)
    draws = generator()
    assert torch.equal(chain(IMAGES, generator()), flip(crop(IMAGES, draws), draws))
    assert Augment.of({})(IMAGES, generator()) is IMAGES


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Crop(padding=0), "augment.crop.padding is 0; it must be a whole number from 1 to 127"),
        (lambda: Crop(fill=float("nan")), "augment.crop.fill is nan; it must be a finite number"),
        (lambda: Crop(reflect=1), "augment.crop.reflect is 1; it must be true or false"),
        (
            lambda: Augment((Crop(padding=7, reflect=True),)).check((3, 9, 7)),
            "augment.crop.padding is 7 and reflects images of 9x7; it must be below both",
        ),
        (lambda: Flip(probability=1.5), "augment.flip.probability is 1.5; it must lie from 0 to 1"),
        (lambda: Cutout(size=0), "augment.cutout.size is 0; it must be a whole number of at least 1"),
        (lambda: Augment.of({"crop": 4}), "augment.crop is 4; it must be a stage such as fedray.data.augment.Crop"),
        (lambda: Augment((Flip(),)).check((64,)), "samples have shape (64,); they need images"),
    ],
)
def test_what_cannot_be_augmented_is_refused_with_a_remedy(build, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        build()


def test_without_stages_any_sample_will_do():
    Augment().check((64,))
