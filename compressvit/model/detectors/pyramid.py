"""Feature maps of several strides from a backbone of timm.

A backbone with stages (ResNet, ConvNeXt, Swin) gives a map of each of its last four stages; after those of one with three (CvT) comes a
coarser one, by a convolution of stride 2 on the last, as in RetinaNet (https://arxiv.org/abs/1708.02002, §4). A plain ViT gives one map,
that of its last block, and the pyramid is made of it by (de)convolutions, as in ViTDet: Exploring Plain Vision Transformer Backbones for
Object Detection, ECCV 2022, https://arxiv.org/abs/2203.16527, §3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from compressvit.errors import UserError

LEVELS = 4
FEWEST = 3  # maps of different strides that a pyramid can be made of


class Pyramid(nn.Module):
    """From the maps of a backbone to `LEVELS` maps (B, C, H_l, W_l) of equal width, normalised over groups of channels.

    Args:
        sources: width of each map that `levels_of` chose, from the largest map to the smallest; one for a plain ViT.
        channels: C.

    Attributes:
        strides: of each level, in pixels of the image.
    """

    def __init__(self, sources: list[int], strides: list[float], channels: int):
        super().__init__()
        if len(sources) == 1:
            (width,), (stride,) = sources, strides
            strides = [stride / 4, stride / 2, stride, stride * 2]
            self.levels = nn.ModuleList(_resampled(width, channels, octaves) for octaves in (2, 1, 0, -1))
        else:
            self.levels = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in sources)
            for _ in range(LEVELS - len(sources)):
                self.levels.append(nn.Conv2d(sources[-1], channels, 3, 2, 1))
                strides = [*strides, strides[-1] * 2]
        self.strides = tuple(strides)
        self.norm = nn.GroupNorm(channels // 8 if channels % 8 == 0 else 1, channels)  # 32 groups of 256, as usual
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = maps + maps[-1:] * (len(self.levels) - len(maps))
        return [self.norm(level(found)) for level, found in zip(self.levels, maps, strict=True)]


def _resampled(width: int, channels: int, octaves: int) -> nn.Module:
    """From a ViT's map to one of 2^octaves times its height and width."""
    if octaves == 2:
        return nn.Sequential(
            nn.ConvTranspose2d(width, width // 2, 2, 2),
            nn.GroupNorm(1, width // 2),
            nn.GELU(),
            nn.ConvTranspose2d(width // 2, channels, 2, 2),
        )
    if octaves == 1:
        return nn.ConvTranspose2d(width, channels, 2, 2)
    if octaves == 0:
        return nn.Conv2d(width, channels, 1)
    return nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(width, channels, 1))


def levels_of(backbone: nn.Module, name: str) -> tuple[list[int], list[int], list[float]]:
    """Which maps of a backbone a pyramid is made of: their indices for timm's `forward_intermediates`, widths, and strides.

    Raises:
        UserError: the backbone gives no maps, or too few.
    """
    info: list[dict[str, Any]] = [dict(entry) for entry in getattr(backbone, "feature_info", [])]
    if not info or not hasattr(backbone, "forward_intermediates"):
        raise UserError(
            f"{name} gives no feature maps (timm's forward_intermediates), which a detector needs; try a ViT, Swin, ConvNeXt or ResNet"
        )
    strides = [float(entry["reduction"]) for entry in info]
    if len(set(strides)) == 1:
        return [len(info) - 1], [info[-1]["num_chs"]], strides[-1:]
    if len(info) < FEWEST:
        raise UserError(
            f"{name} gives {len(info)} feature maps, of strides {strides}; a pyramid takes at least {FEWEST}"
        )
    chosen = list(range(len(info)))[-LEVELS:]
    return chosen, [info[i]["num_chs"] for i in chosen], [strides[i] for i in chosen]


def feature_maps(backbone: nn.Module, images: Tensor, indices: list[int]) -> list[Tensor]:
    """The maps (B, C, H, W) at `indices` for images (B, 3, H, W)."""
    forward: Any = backbone.forward_intermediates
    found = forward(images, indices=indices, norm=len(indices) == 1, output_fmt="NCHW", intermediates_only=True)
    return list(found)


def require_divisible(height: int, width: int, strides: Sequence[float]) -> None:
    """Raise a `UserError` where a map would not cover an image exactly; it offers the nearest sizes that do."""
    largest = max(strides)
    counts = [side / largest for side in (height, width)]
    if all(math.isclose(count, round(count)) and count >= 1 for count in counts):
        return
    nearest = {tuple(round(largest * max(1, to(count))) for count in counts) for to in (math.floor, math.ceil)}
    offers = " or ".join(f"{h}" if h == w else f"[{h}, {w}]" for h, w in sorted(nearest))
    raise UserError(
        f"images of {height}×{width} do not divide by the largest stride of the maps, {largest:g}; the nearest sizes: img_size={offers}"
    )
