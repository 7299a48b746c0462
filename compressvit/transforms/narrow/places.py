"""Where a block can be made narrower: its MLP's hidden neurons, its attention's heads and their dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compressvit.fitting.lowrank import Tensor
from compressvit.model.backbone import Backbone, class_in_timm
from compressvit.model.family import Family, HeadOption
from compressvit.model.linear import is_pointwise, weight_shape

FC1, FC2, QKV, PROJ = "mlp.fc1", "mlp.fc2", "attn.qkv", "attn.proj"
LAYERS = (QKV, PROJ, FC1, FC2)  # within a block, in the order they run


@dataclass(frozen=True)
class Place:
    """The sublayers of one block that can be changed.

    Attributes:
        path: of the block.
        neurons: hidden neurons of its MLP; 0 where they cannot be removed.
        gated: whether a neuron is a pair of rows of `fc1` (SwiGLU and other gated linear units).
        heads, head_dim: of its attention; 0 without one that can be changed.
        options: what can be changed of its heads.
    """

    path: str
    neurons: int = 0
    gated: bool = False
    heads: int = 0
    head_dim: int = 0
    options: tuple[HeadOption, ...] = ()

    def rows(self, kept: Tensor) -> Tensor:
        """The rows of `fc1` of the neurons `kept`."""
        return torch.cat([kept, kept + self.neurons]) if self.gated else kept


def places(model: nn.Module, backbone: Backbone) -> list[Place]:
    """The blocks of a model, in order."""
    return [_place(model.get_submodule(info.path), info.path, backbone.family) for info in backbone.blocks]


def _place(block: Any, path: str, family: Family) -> Place:
    found = Place(path, *_neurons(getattr(block, "mlp", None)))
    attention: Any = getattr(block, "attn", None)
    options = () if family.attention is None or attention is None else family.head_options(attention)
    if not options or not _plain(attention.qkv, attention.proj):
        return found
    heads = attention.num_heads
    return Place(path, found.neurons, found.gated, heads, attention.qkv.out_features // (3 * heads), tuple(options))


def _neurons(mlp: Any) -> tuple[int, bool]:
    """The number of an MLP's neurons that can be removed, and whether it is gated."""
    from timm.layers import GluMlp, Mlp  # words and settings do not wait for it

    kind = None if mlp is None else class_in_timm(mlp, Mlp, GluMlp)
    if kind not in (Mlp, GluMlp) or not isinstance(mlp.norm, nn.Identity) or not _plain(mlp.fc1, mlp.fc2):
        return 0, False
    neurons = weight_shape(mlp.fc2)[1]
    if kind is GluMlp and weight_shape(mlp.fc1)[0] != 2 * neurons:
        return 0, False
    return neurons, kind is GluMlp


def _plain(*layers: nn.Module) -> bool:
    """Whether these are linear layers, also where an earlier step has changed them: it is then that step which is refused."""
    from compressvit.transforms.low_rank.layer import Factored

    return all(isinstance(layer, (nn.Linear, Factored)) or is_pointwise(layer) for layer in layers)


def narrowable(found: Sequence[Place]) -> bool:
    """Whether anything in these blocks can be made narrower."""
    return any(place.neurons or place.options for place in found)


def set_outputs(layer: nn.Module, outputs: int) -> None:
    """Give a linear layer, or a point-wise convolution, so many outputs, in place; its values are then undefined."""
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    layer.weight = _resized(layer.weight, outputs, *layer.weight.shape[1:])
    if layer.bias is not None:
        layer.bias = _resized(layer.bias, outputs)
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", outputs)


def set_inputs(layer: nn.Module, inputs: int) -> None:
    """Give it so many inputs, in place; its values are then undefined."""
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    outputs, _, *kernel = layer.weight.shape
    layer.weight = _resized(layer.weight, outputs, inputs, *kernel)
    setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", inputs)


def _resized(parameter: torch.Tensor, *shape: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach().new_zeros(shape), requires_grad=parameter.requires_grad)
