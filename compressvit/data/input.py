"""The input that a model expects, and the conversion of a batch from one model's input to another's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from compressvit.data.data_set import find_set
from compressvit.data.notes import counted
from compressvit.data.pictures import MODES
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.model.backbone import input_size

STATISTICS = (
    "mean",
    "std",
    "interpolation",
    "crop_pct",
    "crop_mode",
)  # options of the data that say what a model's images look like
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow converts to mode L


def class_mismatch(classes: int | None, model_classes: int, *, new_head: bool) -> str | None:
    """What to tell when a set of `classes` is used with a teacher whose head tells more apart; None when they fit. (Fewer are refused.)

    Args:
        new_head: the head is made for this data.
    """
    if not classes or model_classes <= classes:
        return None
    text = f"the data has {counted(classes, 'class')} and the teacher's head {model_classes}: "
    if new_head:
        return f"{text}the others are never right; leave teacher.num_classes out, and it has as many as the data"
    return (
        f"{text}accuracy is meaningless unless class 0, 1, … are the same; agreement with the teacher is not. "
        "For your own classes give the teacher a new head: teacher.finetune={}"
    )


@dataclass(frozen=True)
class InputConfig:
    """The size and statistics of a model's input, and how an image is resized to it.

    Attributes:
        channels, height, width: 1 (gray), 3 (colour), 4 (colour and alpha, or bands) or another number (bands), and pixels.
        mean, std: one number per channel, of pixel values in 0..1.
        interpolation, crop_pct, crop_mode: timm's words for resizing and cropping in evaluation.
        masks: whether the model also learns the masks of objects, so that its targets have them.
        frames: of a clip, whose channels follow one another in `channels`; None where the model takes images.
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str = "center"
    masks: bool = False
    frames: int | None = None

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.channels, self.height, self.width

    def at(self, size: Sequence[int]) -> InputConfig:
        """The same for images of another size (C, H, W)."""
        mean, std = (per_channel(values, size[0]) for values in (self.mean, self.std))
        return replace(self, channels=size[0], height=size[1], width=size[2], mean=mean, std=std)

    def beside(self, count: int) -> InputConfig:
        """That of so many clips whose channels follow one another."""
        return replace(self, channels=self.channels * count, mean=self.mean * count, std=self.std * count)

    def as_dict(self) -> dict[str, Any]:
        """What an artifact records of it, under timm's names."""
        return {
            "input_size": [self.channels, self.height, self.width],
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
        }


def per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """A model's own statistics for so many channels: where they are of another number, their mean for each."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def asked_statistics(data: Data, channels: int, frames: int | None = None) -> dict[str, tuple[float, ...]]:
    """`data.mean` and `data.std`, where they are given, for every channel; one number is that of each, and those of one frame are those of
    all `frames`.

    Raises:
        UserError: they are of another number of channels.
    """
    found = {}
    for name in ("mean", "std"):
        values = getattr(data, name)
        if values is None:
            continue
        if frames is not None and len(values) * frames == channels:
            values = values * frames
        if len(values) not in (1, channels):
            raise UserError(
                f"data.{name}={list(values)} is of {len(values)} channels, and the model takes {channels}; give a number for each of "
                "these, or one for all"
            )
        found[name] = tuple(values) if len(values) == channels else tuple(values) * channels
    return found


def input_config(model: nn.Module, data: Data, *, trained: bool = False, own_crop: bool = False) -> InputConfig:
    """What `model` takes at its present size, with the statistics and the crop that `data` overrides.

    Args:
        trained: its values were learned with its own statistics, interpolation and crop, and `data` changes none of them.
        own_crop: its crop was recorded when it was trained, so it also applies to images that fill their frame (`DataSet.full_frame`).

    Raises:
        UserError: `data` has statistics of another number of channels than the model takes.
    """
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = first.in_channels if first is not None else config["input_size"][0]
    frames: int | None = getattr(model, "frames", None)
    if frames is not None:  # a transform may have added a convolution
        channels = input_size(model)[0]
    # the pretrained size stays in the config when a model is built for another one
    height, width = input_size(model)[1:]

    asked = data.model_copy(update=dict.fromkeys(STATISTICS)) if trained else data
    statistics = asked_statistics(asked, channels, frames)
    crop_pct = 1.0 if find_set(data.name).full_frame and not own_crop else config["crop_pct"]
    return InputConfig(
        channels,
        int(height),
        int(width),
        statistics.get("mean") or per_channel(config["mean"], channels),
        statistics.get("std") or per_channel(config["std"], channels),
        asked.interpolation or config["interpolation"],
        asked.crop_pct or crop_pct,
        asked.crop_mode or config["crop_mode"],
        masks=getattr(model, "masks", False) is True,
        frames=frames,
    )


def stand_ins(model: nn.Module, config: InputConfig) -> str | None:
    """What to tell of a model of bands that has no statistics of so many channels; None where it has, or `config` has others."""
    from timm.data import resolve_model_data_config

    own = resolve_model_data_config(model)
    guessed = [
        f"{name} {value[0]:.4g}"
        for name in ("mean", "std")
        if len(own[name]) not in (1, config.channels)
        and (value := getattr(config, name)) == per_channel(own[name], config.channels)
    ]
    if config.channels in MODES or not guessed:
        return None
    return (
        f"the model has no statistics of its {config.channels} channels: each has the mean of those of {len(own['mean'])}, "
        f"{' and '.join(guessed)}; data.mean and data.std give its own"
    )


def refuse_other_channels(source: InputConfig, target: InputConfig) -> None:
    """Raise a `UserError` where images of one model cannot be made into those of another."""
    if source.channels != target.channels and not {source.channels, target.channels} <= {*MODES}:
        raise UserError(
            f"one model takes images of {source.channels} channels and the other of {target.channels}; 1, 3 and 4 are converted into one "
            "another, and others are not: give two models of as many channels"
        )


def renormalise(images: torch.Tensor, source: InputConfig, target: InputConfig) -> torch.Tensor:
    """Convert a batch that is normalised for one model to the input of another.

    Args:
        images: (B, C, H, W) with the channels and statistics of `source`.

    Returns:
        (B, C', H', W') for `target`; `images` itself when nothing differs. Several clips beside one another stay
        so. A centre crop is not repeated: the whole of
        `images` is resized. Channels go 3 to 1 by luma, 1 to 3 by repetition; alpha is left out, or 1. Other numbers of channels
        stay as they are.

    Raises:
        UserError: their numbers of channels differ, and are not of these.
    """
    refuse_other_channels(source, target)
    same_size = images.shape[-2:] == (target.height, target.width)
    same_statistics = (source.channels, source.mean, source.std) == (target.channels, target.mean, target.std)
    if same_size and same_statistics:
        return images

    views = images.shape[1] // source.channels

    def column(values: tuple[float, ...]) -> torch.Tensor:
        return images.new_tensor(values * views).view(1, -1, 1, 1)

    whole = images * column(source.std) + column(source.mean)
    pixels = whole[:, :3] if source.channels in MODES else whole
    if pixels.shape[1] == 3 and target.channels == 1:
        pixels = (pixels * column(_LUMA)).sum(1, keepdim=True)
    if target.channels == 4:
        alpha = whole[:, 3:] if source.channels == 4 else torch.ones_like(pixels[:, :1])
        pixels = torch.cat([pixels.expand(-1, 3, -1, -1), alpha], dim=1)
    if not same_size:
        mode = "bilinear" if target.interpolation == "bilinear" else "bicubic"
        pixels = F.interpolate(pixels, (target.height, target.width), mode=mode, antialias=True)
    return (pixels - column(target.mean)) / column(target.std)


@dataclass(frozen=True)
class Side:
    """A model and the configuration of its input.

    Teacher and student may take images of different sizes, channels and statistics: batches are loaded for one of them, and
    `converter` turns them into the other's.
    """

    model: nn.Module
    input: InputConfig

    @classmethod
    def of(cls, model: nn.Module, data: Data, *, trained: bool = False, own_crop: bool = False) -> Side:
        """A model with what `input_config` says of it, which also says what the arguments are and what is raised."""
        return cls(model, input_config(model, data, trained=trained, own_crop=own_crop))

    def converter(self, source: InputConfig) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function that converts batches (B, C, H, W), normalised as `source` describes, to this model's input. Raises as
        `renormalise`."""
        refuse_other_channels(source, self.input)
        return _unchanged if source == self.input else partial(renormalise, source=source, target=self.input)


def _unchanged(images: torch.Tensor) -> torch.Tensor:
    return images
