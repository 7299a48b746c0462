"""A segmenter: a timm backbone, and a head that gives every pixel a class. timm knows it as `segmenter`.

    timm.create_model("segmenter", backbone="vit_base_patch16_384", head="pup", num_classes=150)
    timm.create_model("segmenter", backbone="swin_tiny_patch4_window7_224", head="linear", img_size=224, num_classes=21)

Paper of the heads: SETR, CVPR 2021, https://arxiv.org/abs/2012.15840
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from compressvit.errors import UserError
from compressvit.model.detectors.backbone import built_backbone, take_statistics
from compressvit.model.detectors.pyramid import feature_maps, require_divisible
from compressvit.model.segmenters.heads import head_of

default_cfgs = {
    "segmenter": {
        "url": "",
        "num_classes": 150,
        "input_size": (3, 512, 512),
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "",
        "classifier": "head.classifier",
    }
}


class Segmenter(nn.Module):
    """Classes of pixels from the backbone's last map.

    Args:
        backbone: timm's name of it. Its own classifier is left out.
        head: linear, naive or pup (`compressvit.model.segmenters.heads`).
        backbone_args: further arguments of `timm.create_model` for it.
        img_size: height and width of images in pixels, or one number for both.
        num_classes: of pixels; what is ignored is none of them.
        channels: of the inner layers of `naive` and `pup`.

    Raises:
        UserError: the backbone gives no map, its stride does not divide the image, or there is no such head.
    """

    def __init__(
        self,
        backbone: str = "vit_base_patch16_384",
        head: str = "linear",
        backbone_args: dict[str, Any] | None = None,
        img_size: int | tuple[int, int] = 512,
        num_classes: int = 150,
        in_chans: int = 3,
        channels: int = 256,
    ):
        super().__init__()
        self.task = "segmentation"
        self.num_classes, self.in_chans = num_classes, in_chans
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size = (height, width)
        self.backbone = built_backbone(backbone, backbone_args, self.img_size, in_chans)
        self._index, features, stride = _last_map(self.backbone, backbone)
        require_divisible(height, width, [stride])
        self.maps = nn.Identity()  # its outputs, a list of one map, are what `feature` distils
        self.head = head_of(head, features, num_classes, channels)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes, H, W) for images (B, C, H, W), which are normalised as the backbone's."""
        (features,) = self.maps(feature_maps(self.backbone, images, [self._index]))
        logits = self.head(features)
        if logits.shape[-2:] == images.shape[-2:]:
            return logits
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass, as timm does."""
        cast(Any, self.backbone).set_grad_checkpointing(enable)

    def get_classifier(self) -> nn.Module:
        """All of the head: what is new on a trained backbone, so that what freezes the backbone trains it."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Give the head a new layer for that many classes."""
        if num_classes < 1:
            raise UserError("a segmenter has at least one class of pixels")
        self.num_classes = num_classes
        self.head.reset_classifier(num_classes)


def _last_map(backbone: nn.Module, name: str) -> tuple[int, int, float]:
    """The index of a backbone's last map for timm's `forward_intermediates`, its width, and its stride."""
    info: list[dict[str, Any]] = [dict(entry) for entry in getattr(backbone, "feature_info", [])]
    if not info or not hasattr(backbone, "forward_intermediates"):
        raise UserError(
            f"{name} gives no feature maps (timm's forward_intermediates), which a segmenter needs; try a ViT, Swin, ConvNeXt or ResNet"
        )
    return len(info) - 1, info[-1]["num_chs"], float(info[-1]["reduction"])


@register_model
def segmenter(pretrained: bool = False, **kwargs: Any) -> Segmenter:
    """A segmenter on a timm backbone."""
    return take_statistics(build_model_with_cfg(Segmenter, "segmenter", pretrained, **kwargs))
