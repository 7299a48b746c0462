"""The backbone of a detector: a model of timm without its classifier, and what its images look like."""

from __future__ import annotations

from typing import Any, TypeVar

import timm
from torch import nn

from compressvit.errors import UserError
from compressvit.model.detectors.pyramid import levels_of
from compressvit.model.modules import as_timm
from compressvit.model.weights import build, require_known

D = TypeVar("D", bound=nn.Module)


def backbone_of(
    name: str, args: dict[str, Any] | None, img_size: tuple[int, int], in_chans: int
) -> tuple[nn.Module, tuple[list[int], list[int], list[float]]]:
    """`built_backbone`, and what `levels_of` says of it.

    Raises:
        UserError: as there, or the model gives no maps.
    """
    model = built_backbone(name, args, img_size, in_chans)
    return model, levels_of(model, name)


def built_backbone(name: str, args: dict[str, Any] | None, img_size: tuple[int, int], in_chans: int) -> nn.Module:
    """A backbone of that name in timm, without values of its own, for images of a size where its positions depend on it.

    Raises:
        UserError: timm does not know the name or an argument.
    """
    given = {"in_chans": in_chans, **(args or {})}
    if "num_classes" in given:
        raise UserError(f"backbone_args.num_classes={given['num_classes']}: a backbone has no classifier; leave it out")
    require_known(name)
    if timm.get_pretrained_cfg_value(name, "fixed_input_size"):
        given = {"img_size": img_size, **given}
    return build(name, given, num_classes=0)


def take_statistics(detector: D) -> D:
    """Give a detector the size of its images, and the mean and standard deviation of its backbone's."""
    known: Any = as_timm(detector)
    theirs = as_timm(known.backbone).pretrained_cfg
    images = {"input_size": (known.in_chans, *known.img_size), "mean": theirs["mean"], "std": theirs["std"]}
    known.pretrained_cfg = {**known.pretrained_cfg, **images}
    return detector
