"""Bands are resized, cropped and augmented as pictures are: to the bit, and each band as the others."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from helpers.bands import bands, npy
from helpers.images import CPU, epoch, seed_all
from PIL import Image

from compressvit.data import image_transform as module
from compressvit.data.bands import Bands
from compressvit.data.image_transform import image_transform
from compressvit.data.input import InputConfig
from compressvit.data.levels import BrokenPicture
from compressvit.data.loaders import train_loader
from compressvit.data.opening import open_data
from compressvit.data.placed_transform import PlacedTransform
from compressvit.data.spec import Augment, Data
from compressvit.errors import UserError

STATISTICS = (0.2, 0.5, 0.7, 0.9, 0.1, 0.3, 0.4)
AUGMENTS = {
    "evaluation": None,
    "crop": Augment(scale=(0.3, 1.0), hflip=0.5, vflip=0.5, translate=3),
    "shift": Augment(hflip=0.5, translate=3, interpolation="random"),
    "random": Augment(scale=(0.3, 1.0), interpolation="random"),
}


def config(channels: int, **changes) -> InputConfig:
    of_channels = STATISTICS[:channels]
    return dataclasses.replace(InputConfig(channels, 24, 24, of_channels, of_channels, "bicubic", 0.9), **changes)


def through(transform, image, seed: int) -> tuple[torch.Tensor, tuple]:
    """The pixels, and what the generators give next."""
    seed_all(seed)
    pixels = transform(image)
    return pixels, (random.random(), float(np.random.rand()), float(torch.rand(())))


@pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(41, 60), (60, 41), (20, 20)], ids=str)
def test_three_bands_are_the_bits_of_a_picture(augment, crop_mode, size):
    """Not within a tolerance: Pillow computes every channel by itself, and in evaluation and training the same numbers are drawn."""
    values = bands(3, size)
    for changes in ({}, {"interpolation": "bilinear", "height": 32}):
        of = config(3, crop_mode=crop_mode, **changes)
        for seed in range(3):
            expected = through(image_transform(of, augment), Image.fromarray(values), seed)
            found = through(module._OfBands(of, augment), Bands(values), seed)
            assert torch.equal(found[0], expected[0])
            assert found[1] == expected[1]
    assert expected[0].float().std() > 20, "the test needs an image"


@pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS)
@pytest.mark.parametrize("crop_mode", ["center", "border"])
@pytest.mark.parametrize("channels", [2, 4, 5, 7])
def test_every_band_is_the_bits_of_a_gray_picture(augment, crop_mode, channels):
    values = bands(channels, (41, 30))
    of = config(channels, crop_mode=crop_mode)
    found, after = through(image_transform(of, augment), Bands(values), 1)
    assert found.shape == (channels, 24, 24)
    assert found.dtype == torch.uint8
    for i in range(channels):
        gray = dataclasses.replace(of, channels=1, mean=of.mean[i : i + 1], std=of.std[i : i + 1])
        expected, drawn = through(image_transform(gray, augment), Image.fromarray(values[:, :, i]), 1)
        assert torch.equal(found[i], expected[0])
        assert after == drawn


def test_four_bands_are_no_colours_with_alpha():
    """Pillow weighs colours by alpha when it resizes them."""
    values = bands(4, (40, 40))
    values[:20, :, 3] = 0
    of = config(4)
    found = image_transform(of, None)(Bands(values))
    with_alpha = image_transform(of, None)(Image.fromarray(values))
    assert torch.equal(found[3], with_alpha[3])
    assert not torch.equal(found[:3], with_alpha[:3])
    assert torch.equal(found[:3], image_transform(config(3), None)(Image.fromarray(values[:, :, :3])))
    colours = image_transform(of, None)(values[:, :, :3].copy())  # an array of three channels is a picture
    assert torch.equal(colours, image_transform(of, None)(Image.fromarray(values[:, :, :3])))


@pytest.mark.parametrize(
    ("augment", "words"),
    [
        ({"color_jitter": 0.4}, "data.augment.color_jitter=0.4: its operations do not take bands that are no colours"),
        ({"auto_augment": "rand-m9"}, "data.augment.auto_augment=rand-m9: its operations do not take bands"),
    ],
)
def test_what_needs_colours_is_refused(augment, words):
    with pytest.raises(UserError, match=f"{words}.* the model has 5 channels; set it to null"):
        image_transform(config(5), Augment(**augment))
    image_transform(config(3), Augment(**augment))


def test_jitter_of_four_bands_is_refused_when_they_come(tmp_path):
    """A model of four channels may be given pictures, whose colours it jitters."""
    jitter = Augment(color_jitter=0.4)
    transform = image_transform(config(4), jitter)
    assert transform(Image.fromarray(bands(4))).shape == (4, 24, 24)
    with pytest.raises(BrokenPicture, match=r"4 bands, of which data.augment.color_jitter knows no colours"):
        transform(Bands(bands(4)))
    for i in range(4):
        (tmp_path / f"{i}.npy").write_bytes(npy(bands(4, seed=i)))
    for workers in (0, 1):
        data = Data(name="images", root=str(tmp_path), augment=jitter, num_workers=workers, batch_size=2)
        with pytest.raises(UserError, match=r"data.name=images: an image cannot be used: it has 4 bands[^\n]*null$"):
            epoch(train_loader(open_data(data), data, config(4), CPU))


def test_detectors_take_pictures():
    with pytest.raises(UserError, match="the model takes 5 channels; boxes and masks are learned on pictures of 1"):
        PlacedTransform(config(5, crop_mode="squash", crop_pct=1.0), None)
