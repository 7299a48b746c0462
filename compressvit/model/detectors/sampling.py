"""Sampling a pyramid of feature maps at points that have a place and a size (AdaMixer §3.2).

A point is (x, y, z): a place in pixels of the image, and the logarithm of base 2 of the size at which to look. Every map is sampled at the
place, and the maps are mixed by how close the logarithm of their stride is to z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from compressvit.model.detectors.boxes import side_lengths

SOFTNESS = 2.0  # τ: what the squared distance of z to a level is divided by


def points_of(offsets: Tensor, xyzr: Tensor) -> Tensor:
    """Sampling points of queries.

    Args:
        offsets: (B, N, G, P, 3): x and y in widths and heights of the query's box, from its centre; z as a difference to its z.
        xyzr: (B, N, 4) boxes.

    Returns:
        (B, N, G, P, 3).
    """
    box = xyzr[:, :, None, None]
    place = box[..., :2] + offsets[..., :2] * side_lengths(box)
    return torch.cat([place, box[..., 2:3] + offsets[..., 2:]], dim=-1)


def level_weights(z: Tensor, strides: Sequence[int]) -> Tensor:
    """How much of each level a point of size z takes: softmax over levels of −(z − log2 stride)² / τ. (…) -> (…, levels)"""
    levels = z.new_tensor([math.log2(stride) for stride in strides])
    return (-((z[..., None] - levels) ** 2) / SOFTNESS).softmax(dim=-1)


def sample_pyramid(maps: Sequence[Tensor], strides: Sequence[int], points: Tensor) -> Tensor:
    """Bilinear samples of all maps, mixed by `level_weights`. Outside the image there are zeros.

    Args:
        maps: (B, C, H_l, W_l), pixel (i, j) of level l standing for the square of `strides[l]` image pixels there.
        points: (B, N, G, P, 3). Group g sees channels g·C/G to (g + 1)·C/G.

    Returns:
        (B, N, G, P, C / G).
    """
    batch, queries, groups, count, _ = points.shape
    weights = level_weights(points[..., 2], strides)
    grid_of = points[..., :2].transpose(1, 2).flatten(0, 1)  # (B·G, N, P, 2)
    total = None
    for level, (values, stride) in enumerate(zip(maps, strides, strict=True)):
        channels, height, width = values.shape[1:]
        grid = grid_of / grid_of.new_tensor([width * stride, height * stride]) * 2 - 1
        by_group = values.reshape(batch * groups, channels // groups, height, width)
        found = F.grid_sample(
            by_group, grid.to(values.dtype), mode="bilinear", padding_mode="zeros", align_corners=False
        )
        found = found.view(batch, groups, channels // groups, queries, count).permute(0, 3, 1, 4, 2)
        part = found * weights[..., level, None]
        total = part if total is None else total + part
    assert total is not None, "a pyramid has at least one level"
    return total
