"""Linear layers of every form: a dense weight, a weight with an added low-rank term, or two factors."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn


def effective_weight(layer: nn.Module) -> torch.Tensor:
    """The weight (out, in) that a linear layer computes with: low-rank terms and factors included, adapters excluded."""
    computed = getattr(layer, "effective_weight", None)
    return cast(nn.Linear, layer).weight if computed is None else computed()


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer or 1×1 convolution."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.in_channels
    linear = cast(nn.Linear, layer)  # or one of ours, which need not extend it
    return linear.out_features, linear.in_features
