"""timm's ConvNeXt (versions 1 and 2): stages of a grid, a depth-wise convolution in place of attention.

Shapes: B batch, C width; blocks carry (B, C, height, width).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from einops import rearrange
from timm.models import convnext
from timm.models.convnext import ConvNeXt as TimmConvNeXt
from timm.models.convnext import ConvNeXtBlock, ConvNeXtStage
from torch import nn
from torch.fx import wrap

from compressvit.model.backbone import input_size
from compressvit.model.family import BlockInfo, Example, Family, family
from compressvit.model.linear import weight_shape
from compressvit.model.slots import beside

wrap("rearrange")  # torch.fx records the call: einops does not take its proxies

SMALL: dict[str, Any] = {
    "depths": (1, 1, 2, 1),
    "dims": (8, 16, 16, 32),
    "patch_size": 4,
    "num_classes": 5,
    "ls_init_value": 0.1,
}


class SlottedConvNeXtBlock(ConvNeXtBlock):
    """timm's `ConvNeXtBlock` with a slot beside the MLP; x is (B, C, height, width)."""

    slots = ("adaptformer",)

    adaptformer: nn.Module | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.conv_dw(x)
        if self.use_conv_mlp:
            normed = self.norm(mixed)
            inner = self.mlp(normed)
            normed = rearrange(normed, "b c h w -> b h w c")
        else:
            normed = self.norm(rearrange(mixed, "b c h w -> b h w c"))
            inner = rearrange(self.mlp(normed), "b h w c -> b c h w")
        if self.gamma is not None:
            inner = inner * self.gamma[:, None, None]
        out = self.drop_path(inner) + self.shortcut(x)
        if self.adaptformer is None:
            return out
        branch = beside(self.adaptformer, rearrange(x, "b c h w -> b h w c"), normed)
        return out + rearrange(branch, "b h w c -> b c h w")


@family("convnext")
class ConvNeXt(Family):
    """`stages.STAGE.blocks.I`, each with `mlp`."""

    title = "ConvNeXt"
    supports = ("ConvNeXt (convnext_*, versions 1 and 2)",)
    models = (TimmConvNeXt,)
    block = ConvNeXtBlock
    slotted_block = SlottedConvNeXtBlock
    layout = "channels_first"
    drop_paths = ("drop_path",)
    examples: ClassVar[Mapping[str, Example]] = {
        "convnext": Example("convnext_tiny", SMALL),
        "convnext_conv_mlp": Example("convnext_tiny", {**SMALL, "conv_mlp": True}),
    }

    def blocks(self, model: nn.Module) -> Iterator[BlockInfo]:
        assert isinstance(model, TimmConvNeXt)
        index = 0
        height, width = input_size(model)[1:]
        for stage, layer in enumerate(cast(Iterable[ConvNeXtStage], model.stages)):
            reduction = model.feature_info[stage]["reduction"]
            assert isinstance(reduction, int)
            for i, block in enumerate(cast(Iterable[ConvNeXtBlock], layer.blocks)):
                yield BlockInfo(
                    path=f"stages.{stage}.blocks.{i}",
                    index=index,
                    stage=stage,
                    width=weight_shape(block.get_submodule("mlp.fc1"))[1],
                    heads=0,
                    resolution=(height // reduction, width // reduction),
                    stage_path=f"stages.{stage}",
                )
                index += 1

    def convert(self, tensors: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        return convnext.checkpoint_filter_fn(tensors, model)
