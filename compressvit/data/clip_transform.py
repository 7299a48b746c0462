"""From the frames of a clip to the pixels of a model: every frame resized, cropped, flipped and coloured alike."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import str_to_pil_interp
from torchvision import transforms

from compressvit.data.bands import Bands
from compressvit.data.clips import COLOURS
from compressvit.data.image_transform import ToChannels, ToPixels, of_pictures, refuse_colours
from compressvit.data.input import InputConfig
from compressvit.data.levels import MODES
from compressvit.data.spec import Augment, Clip
from compressvit.errors import UserError


class ClipTransform:
    """From one or several clips (`compressvit.data.clips`) to uint8 (V · K · T · 3, H, W): of V clips in time, K crops.

    All frames of a clip go through a transform of pictures with the same random numbers, of which as many are drawn as for one picture.

    Args:
        config: the model's input, of T · 3 channels; of 1, 3 or 4 it takes images, which a frame is.
        augment: None in evaluation.
        clip: `crops` is K of evaluation.

    Raises:
        UserError: several views for a model of images, crops of frames that are not square, or augmentation that does not take the frames.
    """

    def __init__(self, config: InputConfig, augment: Augment | None, clip: Clip, *, exif: bool = False):
        self.frames = config.channels // COLOURS if config.channels not in MODES else 1
        frame = config
        if config.channels not in MODES:
            frame = replace(config, channels=COLOURS, mean=config.mean[:COLOURS], std=config.std[:COLOURS])
        elif augment is None and clip.views * clip.crops > 1:
            raise UserError(
                f"data.clip has {clip.views * clip.crops} views of each video, and the model takes images: it gets one frame, and does not "
                "average over views; leave views and crops out, or take a model of clips (video)"
            )
        if augment is not None:
            refuse_colours(augment, frame.channels)
            self.transforms = [of_pictures(frame, augment, exif)]
        elif clip.crops == 1:
            self.transforms = [of_pictures(frame, None, exif)]
        else:
            self.transforms = [_side_by_side(frame, place, exif) for place in range(clip.crops)]

    def __call__(self, picture: Image.Image | Bands) -> torch.Tensor:
        if not isinstance(picture, Bands):
            return torch.cat([transform(picture) for transform in self.transforms])
        parts = [picture.part(i, i + COLOURS) for i in range(0, picture.channels, COLOURS)]
        found = []
        for first in range(0, len(parts), self.frames):
            for transform in self.transforms:
                found += _alike(transform, parts[first : first + self.frames])
        return torch.cat(found)


def _alike(transform: ToPixels, frames: list[Image.Image]) -> list[torch.Tensor]:
    """Every frame through a transform with the same random numbers."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    found = []
    for frame in frames:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        found.append(transform(frame))
    return found


def _side_by_side(config: InputConfig, place: int, exif: bool) -> ToPixels:
    """One of three square crops along the longer side of a frame, whose shorter side is made that of the model; as in VideoMAE's test."""
    if config.height != config.width:
        raise UserError(
            f"data.clip.crops=3 are squares of the whole shorter side, and the model takes {config.height}×{config.width}; set crops=1"
        )
    how: Any = str_to_pil_interp(config.interpolation)
    size = config.height

    def crop(image: Image.Image) -> Image.Image:
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), how)
        left, top = (place * (side - size) // 2 for side in (width, height))
        return image.crop((left, top, left + size, top + size))

    steps: list[Callable[[Any], Any]] = [ToChannels(config.channels, exif), crop, transforms.PILToTensor()]
    return transforms.Compose(steps)
