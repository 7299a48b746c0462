"""The backbone of a detector: a model of timm without its classifier, and what its images look like."""

from __future__ import annotations

from typing import Any, TypeVar

import timm
from torch import nn

from compressvit.model.detectors.pyramid import levels_of
from compressvit.model.modules import as_timm

D = TypeVar("D", bound=nn.Module)


def backbone_of(
    name: str, args: dict[str, Any] | None, img_size: tuple[int, int], in_chans: int
) -> tuple[nn.Module, tuple[list[int], list[int], list[float]]]:
    """Build a backbone of that name in timm, for images of a size where its positions depend on it.

    Returns:
        The model, and what `levels_of` says of it.
    """
    given = {"in_chans": in_chans, **(args or {})}
    if timm.get_pretrained_cfg_value(name, "fixed_input_size"):
        given = {"img_size": img_size, **given}
    model = timm.create_model(name, pretrained=False, num_classes=0, **given)
    return model, levels_of(model, name)


def take_statistics(detector: D) -> D:
    """Give a detector the size of its images, and the mean and standard deviation of its backbone's."""
    known: Any = as_timm(detector)
    theirs = as_timm(known.backbone).pretrained_cfg
    images = {"input_size": (known.in_chans, *known.img_size), "mean": theirs["mean"], "std": theirs["std"]}
    known.pretrained_cfg = {**known.pretrained_cfg, **images}
    return detector
