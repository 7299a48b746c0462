"""What an artifact in a run folder was made for: the input that it expects, and the images of its run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from compressvit.data.input import InputConfig, input_config
from compressvit.data.loaders import eval_loader
from compressvit.data.opening import Datasets, open_data
from compressvit.data.samples import Samples
from compressvit.data.sets.base import evenly
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.recipe.recipe import load_recipe
from compressvit.runs.folder import RESOLVED


def own_recipe_data(folder: Path) -> Data | None:
    """The `data` section of the run that contains the artifact in `folder`; None if it is in no run. Nothing of it is downloaded."""
    resolved = folder.parent / RESOLVED
    return load_recipe(resolved).data.model_copy(update={"download": False}) if resolved.is_file() else None


def own_input(folder: Path, model: nn.Module) -> InputConfig:
    """What the model of the artifact in `folder` takes: as in its run or, where it is in none, as it says itself."""
    data = own_recipe_data(folder)
    if data is None:
        return input_config(model, Data(name="images"))
    return input_config(model, data, trained=True, own_crop=True)


def own_images(
    folder: Path, config: InputConfig, count: int, datasets: Datasets | None = None, data: Data | None = None
) -> torch.Tensor | None:
    """Held-out images of the run that contains the artifact in `folder`: up to `count`, from all over the set (of a streaming one the
    first), normalised (B, C, H, W). None if it is in no run, or the data is no longer there.

    Args:
        datasets: the data, if it is already open.
        data: instead of that of the run.
    """
    data = data or own_recipe_data(folder)
    if data is None:
        return None
    try:
        datasets = datasets or open_data(data)
        held_out = datasets.validation
        if isinstance(held_out, Samples):
            datasets = replace(datasets, validation=held_out.part(evenly(len(held_out), count)))
        batches, found = eval_loader(datasets, data, config, torch.device("cpu")), 0
        images = []
        for batch, _ in batches:
            images.append(batch[:, : config.channels])  # of several clips of a video the first
            found += len(batch)
            if found >= count:
                break
    except UserError:  # the data is no longer available
        return None
    return torch.cat(images)[:count] if images else None
