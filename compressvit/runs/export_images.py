"""The images of `compressvit export`: those on which a file is compared, and those on which ranges are measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from compressvit.artifacts.export import STATIC
from compressvit.artifacts.formats.base import Source
from compressvit.artifacts.merge import photograph_like
from compressvit.data.input import STATISTICS, InputConfig
from compressvit.data.loaders import calibration_batches
from compressvit.data.opening import open_data
from compressvit.data.samples import Samples
from compressvit.data.spec import Data
from compressvit.errors import UserError, option
from compressvit.runs.evaluate import data_recipe
from compressvit.runs.own_data import own_images, own_recipe_data

_PIXELS = 64 * 224 * 224  # of the images that are compared, in all
_FEWEST, _MOST = 4, 64  # of these images
CALIBRATION, _LEAST = 256, 16  # images that ranges are measured on, by default and at least


def require_count(images: int | None, precision: str) -> None:
    """Raise a `UserError` where a number of images to measure ranges on is no use, or too small."""
    if images is None:
        return
    if precision != STATIC:
        raise UserError(
            f"{option('images', images)}: ranges are measured on images for {option('precision', STATIC)} alone; leave it out"
        )
    if images < _LEAST:
        raise UserError(
            f"{option('images', images)}: ranges are measured on at least {_LEAST} images, better {CALIBRATION}"
        )


def data_of(folder: Path, overrides: Sequence[str], precision: str) -> Data | None:
    """The data of the run or that of the overrides; None where there is neither, which static int8 refuses."""
    if changed := next((o for o in overrides if o.startswith(tuple(f"data.{name}=" for name in STATISTICS))), None):
        raise UserError(f"{changed}: the student is exported for images as it was trained on; leave it out")
    if overrides:
        return data_recipe(folder, list(overrides), "export").data
    data = own_recipe_data(folder)
    if data is None and precision == STATIC:
        raise UserError(
            f"{option('precision', STATIC)} measures ranges on images of the run, and {folder} is in no run folder; add "
            "data.name=images data.root=FOLDER, or another data set"
        )
    return data


def compared(folder: Path, config: InputConfig, given: Data | None) -> tuple[Tensor, str]:
    """Images to compare on, of the data given or of the run if there are any, and what they are."""
    datasets = None if given is None else open_data(given)  # raises what `own_images` passes over
    images = own_images(folder, config, _count(config), datasets, given)
    if images is not None:
        return images, f"{len(images)} held-out images of {_whose(given is None)}"
    images = photograph_like(_count(config), config)
    return images, f"{len(images)} made-up images"


def _whose(own: bool) -> str:
    return "the run" if own else "the data given"


def calibrated(source: Source, data: Data | None, images: int | None, own: bool) -> tuple[Source, str | None]:
    """A source with training images to measure ranges on, as many as asked for or there are, and what these are; as it is, and None, where
    its precision needs none.

    Args:
        own: the data is that of the run.

    Raises:
        UserError: there are too few, or the data is not there.
    """
    if source.precision != STATIC or data is None:
        return source, None
    datasets = open_data(data)
    drawn = calibration_batches(datasets, data, source.input, torch.device("cpu"), images=images or CALIBRATION, seed=0)
    batches = [batch.images for batch in drawn]
    found, whose = sum(map(len, batches)), _whose(own)
    if found < _LEAST:
        raise UserError(
            f"{option('precision', STATIC)}: ranges are measured on at least {_LEAST} images, and of {whose} {found} training images can "
            "be read; give other data, as data.name=images data.root=FOLDER"
        )
    of = f" of {len(datasets.train):,}" if isinstance(datasets.train, Samples) else ""
    return replace(source, calibration=batches), f"{found:,}{of} training images of {whose}"


def _count(config: InputConfig) -> int:
    """How many images are compared: the fewer, the larger they are."""
    return max(_FEWEST, min(_MOST, _PIXELS // (config.height * config.width)))
