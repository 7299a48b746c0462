"""The transform from an image to the pixels that a model takes: resizing, cropping, and augmentation of single images, as in timm.

Pictures of 1, 3 or 4 channels are Pillow's. Of bands, three at a time are a picture of Pillow's, so that resizing gives the same bits; all
are moved alike.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from torchvision import transforms

from compressvit.data import pictures
from compressvit.data.bands import Bands
from compressvit.data.input import InputConfig
from compressvit.data.levels import BrokenPicture
from compressvit.data.spec import Augment
from compressvit.errors import UserError

ToPixels = Callable[[Any], torch.Tensor]


class ToChannels:
    """Converts a PIL image of any mode to the 8 bits and channels of a model."""

    def __init__(self, channels: int, exif: bool):
        self.channels, self.exif = channels, exif

    def __call__(self, image: Any) -> Any:
        return pictures.to_channels(pictures.standard(image, exif=self.exif)[0], self.channels)


class _OfBands:
    """From bands to pixels: each part of one, two or three through a transform of pictures, all with the same random numbers, of which as
    many are drawn as for one picture."""

    def __init__(self, config: InputConfig, augment: Augment | None):
        self.channels = config.channels
        self.parts: list[tuple[int, int, ToPixels]] = []
        for first in range(0, config.channels, 3):
            end = min(first + 3, config.channels)
            width = 1 if end - first == 1 else 3
            mean, std = (((*values[first:end], 0.5)[:width]) for values in (config.mean, config.std))
            part = dataclasses.replace(config, channels=width, mean=mean, std=std)
            self.parts.append((first, end, of_pictures(part, augment, False)))

    def __call__(self, image: Any) -> torch.Tensor:
        bands, _ = pictures.standard(image)
        pictures.require_channels(bands, self.channels)
        assert isinstance(bands, Bands), "pictures fit no model of bands"
        states = random.getstate(), torch.get_rng_state()
        found = []
        for first, end, transform in self.parts:
            random.setstate(states[0])
            torch.set_rng_state(states[1])
            found.append(transform(bands.part(first, end))[: end - first])
        return torch.cat(found)


class _OfFour:
    """For a model of 4 channels, which takes pictures with alpha and bands alike."""

    def __init__(self, config: InputConfig, augment: Augment | None, exif: bool):
        self.of_pictures = of_pictures(config, augment, exif)
        self.of_bands = None if augment is not None and augment.color_jitter else _OfBands(config, augment)

    def __call__(self, image: Any) -> torch.Tensor:
        if isinstance(image, np.ndarray):
            image, _ = pictures.standard(image)
        if not isinstance(image, Bands):
            return self.of_pictures(image)
        if self.of_bands is None:
            raise BrokenPicture("it has 4 bands, of which data.augment.color_jitter knows no colours; set that to null")
        return self.of_bands(image)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's posterize, also for 0 bits, which gives black: RandAugment's random magnitudes ask for it, and Pillow 13 refuses it."""
    return auto_augment.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def _allow_no_bits(policy: Any) -> None:
    """Give the posterize steps of a timm policy an operation that takes 0 bits."""
    steps = [*getattr(policy, "ops", ()), *(step for chain in getattr(policy, "policy", ()) for step in chain)]
    for step in steps:
        if getattr(step, "aug_fn", None) is auto_augment.posterize:
            step.aug_fn = _posterize


def image_transform(config: InputConfig, augment: Augment | None, *, exif: bool = False) -> ToPixels:
    """The transform from an image of any size to a uint8 tensor (C, H, W).

    Raises:
        UserError: augmentation of colours is set for a model of bands, or `auto_augment` for one of 4 channels; its operations do not
            support alpha.
    """
    if augment is not None:
        refuse_colours(augment, config.channels)
    if config.channels == 4:
        return _OfFour(config, augment, exif)
    return of_pictures(config, augment, exif) if config.channels in pictures.MODES else _OfBands(config, augment)


def refuse_colours(augment: Augment, channels: int) -> None:
    """Raise a `UserError` where an augmentation needs colours, and a model takes other channels."""
    for name in ("auto_augment", "color_jitter"):
        value = getattr(augment, name)
        if not value or channels in (1, 3) or (channels == 4 and name == "color_jitter"):
            continue
        why = "images with alpha" if channels == 4 else "bands that are no colours"
        raise UserError(
            f"data.augment.{name}={value}: its operations do not take {why}, and the model has {channels} channels; set it to null"
        )


def of_pictures(config: InputConfig, augment: Augment | None, exif: bool) -> transforms.Compose:
    """The transform of PIL images."""
    common: dict[str, Any] = {
        "input_size": (config.channels, config.height, config.width),
        "mean": config.mean,
        "std": config.std,
        "use_prefetcher": True,  # normalising and erasing come later, per batch
    }
    to_channels = ToChannels(config.channels, exif)
    *resize, to_tensor = create_transform(
        **common, interpolation=config.interpolation, crop_pct=config.crop_pct, crop_mode=config.crop_mode
    ).transforms
    if augment is None:
        return transforms.Compose([to_channels, *resize, to_tensor])
    crop_and_flips, colours, _ = create_transform(
        **common,
        is_training=True,
        separate=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter,  # type: ignore[arg-type]
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation,
    )
    for policy in colours.transforms:
        _allow_no_bits(policy)
    random_crop, *flips = crop_and_flips.transforms
    # timm's own training transform without random crops would distort the image; evaluation keeps its aspect ratio
    crop = resize if augment.scale is None else [random_crop]
    shift = []
    if augment.translate:
        shift = [transforms.RandomCrop((config.height, config.width), padding=augment.translate)]
    return transforms.Compose([to_channels, *crop, *flips, *shift, *colours.transforms, to_tensor])
