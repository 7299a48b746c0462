"""Linear layers and pointwise convolutions of every form: a dense weight, a weight with an added low-rank term, or two factors."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn


class ChannelsFirst:
    """Marks a layer of ours that reads and writes (B, C, height, width), as `nn.Conv2d` does."""


def channels_last(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What `layer` reads or writes as (…, C): itself, or for a convolution with the channels moved."""
    return x.movedim(1, -1) if isinstance(layer, (nn.Conv2d, ChannelsFirst)) else x


def is_pointwise(layer: nn.Module) -> bool:
    """Whether a layer is a 1×1 convolution that maps every position alone: a linear layer over channels."""
    if not isinstance(layer, nn.Conv2d):
        return False
    return layer.kernel_size == layer.stride == (1, 1) and layer.padding in ((0, 0), "valid") and layer.groups == 1


def effective_weight(layer: nn.Module) -> torch.Tensor:
    """The weight (out, in) that a linear layer or point-wise convolution computes with.

    Low-rank terms and factors are included, what adapters add is left out.
    """
    computed = getattr(layer, "effective_weight", None)
    return cast(nn.Linear, layer).weight.flatten(1) if computed is None else computed()


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer or 1×1 convolution."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.in_channels
    linear = cast(nn.Linear, layer)  # or one of ours, which need not extend it
    return linear.out_features, linear.in_features
