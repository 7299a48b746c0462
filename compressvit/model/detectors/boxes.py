"""Boxes as AdaMixer's queries hold them, and as everything else does.

Paper: AdaMixer: A Fast-Converging Query-Based Object Detector, CVPR 2022, https://arxiv.org/abs/2203.16507, §3.1

A query's box is (x, y, z, r): its centre in pixels, the logarithm of its size and of its shape, both of base 2. It is 2^(z − r/2) pixels
wide and 2^(z + r/2) high, so z is comparable with the logarithm of a feature map's stride. Elsewhere boxes are (x0, y0, x1, y1) in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY_OVERLAP = 1e-7  # keeps the logarithm of no overlap finite
PIXELS = 1000.0  # centres are divided by this before they are embedded


def side_lengths(xyzr: Tensor) -> Tensor:
    """Width and height, (…, 2), of boxes (…, 4)."""
    z, r = xyzr[..., 2:3], xyzr[..., 3:4]
    return torch.exp2(torch.cat([z - r / 2, z + r / 2], dim=-1))


def corners(xyzr: Tensor) -> Tensor:
    """(x0, y0, x1, y1) of boxes (x, y, z, r); both (…, 4)."""
    half = side_lengths(xyzr) / 2
    centre = xyzr[..., :2]
    return torch.cat([centre - half, centre + half], dim=-1)


def whole_image(height: int, width: int) -> list[float]:
    """(x, y, z, r) of the box that covers an image."""
    import math

    return [width / 2, height / 2, math.log2(height * width) / 2, math.log2(height / width)]


def refined(xyzr: Tensor, change: Tensor) -> Tensor:
    """The boxes (…, 4) after a decoder stage's `change` (…, 4): the centre moves by fractions of the box's size 2^z."""
    z = xyzr[..., 2:3]
    return torch.cat([xyzr[..., :2] + change[..., :2] * torch.exp2(z), xyzr[..., 2:] + change[..., 2:]], dim=-1)


def log_overlap(xyzr: Tensor) -> Tensor:
    """log IoF of every pair of an image's boxes: the share of box i that lies within box j (intersection over foreground).

    Args:
        xyzr: (B, N, 4).

    Returns:
        (B, N, N).
    """
    boxes = corners(xyzr)
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    own = side_lengths(xyzr).prod(-1)[:, :, None]
    return (shared / own.clamp(min=1e-6) + TINY_OVERLAP).log()


def position_embedding(xyzr: Tensor, width: int) -> Tensor:
    """Sines and cosines of the four numbers of a box.

    Args:
        xyzr: (…, 4).
        width: of the embedding; divisible by 8.

    Returns:
        (…, width), with width / 4 values for each number.
    """
    each = width // 4
    scaled = xyzr / xyzr.new_tensor([PIXELS, PIXELS, 1.0, 1.0])
    exponents = torch.arange(0, each, 2, device=xyzr.device, dtype=xyzr.dtype) / each
    angles = scaled[..., None] / 10000**exponents  # (…, 4, each / 2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)
