"""AdaMixer: a query-based detector of a timm backbone, a pyramid, and `Decoder`. timm knows it as `adamixer`.

Paper: AdaMixer: A Fast-Converging Query-Based Object Detector, CVPR 2022, https://arxiv.org/abs/2203.16507

    timm.create_model("adamixer", backbone="resnet50", num_classes=80)      # the paper's, with 4 groups of 32 points
    timm.create_model("adamixer", backbone="resnet50", groups=2, points_in=64)   # as LORS has it
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from compressvit.errors import UserError
from compressvit.model.detectors.backbone import backbone_of, take_statistics
from compressvit.model.detectors.boxes import corners, whole_image
from compressvit.model.detectors.decoder import PRIOR, Decoder
from compressvit.model.detectors.prediction import Detections, SetPrediction
from compressvit.model.detectors.pyramid import Pyramid, feature_maps, require_divisible

default_cfgs = {
    "adamixer": {
        "url": "",
        "num_classes": 80,
        "input_size": (3, 800, 800),
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "",
        "classifier": "decoder",
    }
}


class AdaMixer(nn.Module):
    """A detector without anchors and without suppression: every query ends as one box with its classes.

    Args:
        backbone: timm's name of it. Its own classifier is left out.
        backbone_args: further arguments of `timm.create_model` for it.
        img_size: height and width of images in pixels, or one number for both.
        num_classes: of objects.
        queries: N, the most boxes that an image can get.
        stages: of the decoder.
        dim: D, width of a query.
        channels: C, width of the pyramid.
        heads, hidden, groups, points_in, points_out: see `DecoderStage`.

    Raises:
        UserError: the backbone gives no maps, or numbers do not divide.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        backbone_args: dict[str, Any] | None = None,
        img_size: int | tuple[int, int] = 800,
        num_classes: int = 80,
        in_chans: int = 3,
        queries: int = 100,
        stages: int = 6,
        dim: int = 256,
        channels: int = 256,
        heads: int = 8,
        hidden: int = 2048,
        groups: int = 4,
        points_in: int = 32,
        points_out: int = 128,
    ):
        super().__init__()
        self.task = "detection"
        self.num_classes, self.in_chans = num_classes, in_chans
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size = (height, width)
        for name, number, by in (("dim", dim, 8), ("dim", dim, heads), ("channels", channels, groups)):
            if number % by:
                raise UserError(f"adamixer: {name}={number} does not divide by {by}")
        self.backbone, levels = backbone_of(backbone, backbone_args, self.img_size, in_chans)
        self._indices, widths, strides = levels
        self.pyramid = Pyramid(widths, strides, channels)
        require_divisible(height, width, self.pyramid.strides)
        self.query = nn.Parameter(torch.empty(queries, dim))
        self.decoder = Decoder(
            stages,
            dim=dim,
            channels=channels,
            classes=num_classes,
            heads=heads,
            hidden=hidden,
            groups=groups,
            points_in=points_in,
            points_out=points_out,
        )
        nn.init.normal_(self.query)

    def maps(self, images: Tensor) -> list[Tensor]:
        """The pyramid of images (B, C, H, W): one map (B, channels, H_l, W_l) per level."""
        return self.pyramid(feature_maps(self.backbone, images, self._indices))

    def forward(self, images: Tensor) -> SetPrediction:
        """Predictions of every stage for images (B, C, H, W), which are normalised as the backbone's."""
        batch, _, height, width = images.shape
        query = F.layer_norm(self.query, self.query.shape[-1:]).expand(batch, -1, -1)
        xyzr = torch.tensor(whole_image(height, width), device=images.device).expand(batch, self.query.shape[0], 4)
        found = self.decoder(self.maps(images), self.pyramid.strides, query, xyzr)
        boxes = corners(torch.stack([stage.xyzr for stage in found]))
        size = torch.tensor([width, height, width, height], device=boxes.device, dtype=boxes.dtype)
        return SetPrediction(torch.stack([stage.logits for stage in found]), boxes / size)

    def answer(self, images: Tensor, limit: int = 100) -> Detections:
        """`forward(images).detections(limit)` in tensors (B, limit, …); an image has so many where queries × classes suffice."""
        return self(images).answer(limit)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass, as timm does."""
        cast(Any, self.backbone).set_grad_checkpointing(enable)

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """The layers that give classes, one per stage."""
        return tuple(stage.classifier.head for stage in self.decoder.each())

    def reset_classifier(self, num_classes: int) -> None:
        """Give every stage a new layer for that many classes."""
        if num_classes < 1:
            raise UserError("a detector has at least one class of objects")
        self.num_classes = num_classes
        for stage in self.decoder.each():
            old = stage.classifier.head
            new = nn.Linear(old.in_features, num_classes, device=old.weight.device, dtype=old.weight.dtype)
            nn.init.xavier_uniform_(new.weight)
            nn.init.constant_(new.bias, -math.log((1 - PRIOR) / PRIOR))
            stage.classifier.head = new


@register_model
def adamixer(pretrained: bool = False, **kwargs: Any) -> AdaMixer:
    """AdaMixer on a timm backbone."""
    return take_statistics(build_model_with_cfg(AdaMixer, "adamixer", pretrained, **kwargs))
