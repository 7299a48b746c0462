"""The transform from a PIL image to the pixels that a model takes: resizing, cropping, and augmentation of single images, as in timm."""

from __future__ import annotations

from typing import Any

from PIL import Image
from timm.data import auto_augment, create_transform
from torchvision import transforms

from compressvit.data import pictures
from compressvit.data.input import InputConfig
from compressvit.data.spec import Augment
from compressvit.errors import UserError


class _ToChannels:
    """Converts a PIL image of any mode to the 8 bits and channels of a model."""

    def __init__(self, channels: int, exif: bool):
        self.channels, self.exif = channels, exif

    def __call__(self, image: Any) -> Any:
        return pictures.to_channels(pictures.standard(image, exif=self.exif)[0], self.channels)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's posterize, also for 0 bits, which gives black: RandAugment's random magnitudes ask for it, and Pillow 13 refuses it."""
    return auto_augment.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def _allow_no_bits(policy: Any) -> None:
    """Give the posterize steps of a timm policy an operation that takes 0 bits."""
    steps = [*getattr(policy, "ops", ()), *(step for chain in getattr(policy, "policy", ()) for step in chain)]
    for step in steps:
        if getattr(step, "aug_fn", None) is auto_augment.posterize:
            step.aug_fn = _posterize


def image_transform(config: InputConfig, augment: Augment | None, *, exif: bool = False) -> transforms.Compose:
    """The transform from a PIL image of any size to a uint8 tensor (C, H, W).

    Raises:
        UserError: `auto_augment` is set for a model of 4 channels; its operations do not support alpha.
    """
    if augment is not None and augment.auto_augment is not None and config.channels == 4:
        raise UserError(
            f"data.augment.auto_augment={augment.auto_augment}: its operations do not take images with alpha, and the model has "
            "4 channels; set it to null"
        )
    common: dict[str, Any] = {
        "input_size": (config.channels, config.height, config.width),
        "mean": config.mean,
        "std": config.std,
        "use_prefetcher": True,  # normalising and erasing come later, per batch
    }
    to_channels = _ToChannels(config.channels, exif)
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
