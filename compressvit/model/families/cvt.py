"""CvT (`compressvit.model.cvt`): stages of tokens, of which the last has a class token; convolutions and batch norms before queries, keys
and values, of which keys and values are on a coarser grid.

Shapes: B batch, H heads, N tokens, M keys, D head width, C width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from compressvit.model.cvt.blocks import CvTAttention, CvTBlock, Size
from compressvit.model.cvt.model import CvT
from compressvit.model.family import PRE_NORM_BRANCHES, BlockInfo, Example, Family, HeadOption, family
from compressvit.model.mixing import open_attention
from compressvit.model.slots import BLOCK_SLOTS, MIX_SLOTS, beside

SMALL: dict[str, Any] = {
    "img_size": 32,
    "depths": (2, 2),
    "embed_dims": (16, 32),
    "num_heads": (2, 4),
    "num_classes": 5,
}


class ExplicitCvTAttention(CvTAttention):
    """`CvTAttention` with slots on its logits and probabilities."""

    slots = MIX_SLOTS

    logit_mix: nn.Module | None
    prob_mix: nn.Module | None

    def forward(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        if self.logit_mix is None and self.prob_mix is None:
            return super().forward(x, size)
        q, k, v = self.heads(x, size)
        return self.proj_drop(self.proj(open_attention(self, q * self.scale, k, v)))


class SlottedCvTBlock(CvTBlock):
    """`CvTBlock` with a slot before the MLP and one beside it."""

    slots = BLOCK_SLOTS

    mlp_conv: nn.Module | None
    adaptformer: nn.Module | None

    def forward(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        if self.mlp_conv is not None:
            x = self.mlp_conv(x)
        normed = self.norm2(x)
        return x + self.drop_path(self.mlp(normed)) + beside(self.adaptformer, x, normed)


@family("cvt")
class Cvt(Family):
    """`stageS.blocks.I`, each with `attn` and `mlp`."""

    title = "CvT"
    supports = ("CvT (cvt_13, cvt_21, cvt_w24; of compressvit)",)
    models = (CvT,)
    block, attention = CvTBlock, CvTAttention
    slotted_block, slotted_attention = SlottedCvTBlock, ExplicitCvTAttention
    coarse_keys = True
    whole_heads = True
    before_qkv = "a convolution"
    branches = PRE_NORM_BRANCHES
    drop_paths = ("drop_path",)
    examples: ClassVar[Mapping[str, Example]] = {"cvt": Example("cvt_13", SMALL)}

    def blocks(self, model: nn.Module) -> Iterator[BlockInfo]:
        assert isinstance(model, CvT)
        index = 0
        for stage, (layer, grid) in enumerate(zip(model.stages, model.grids, strict=True)):
            for i, block in enumerate(layer.blocks):
                assert isinstance(block, CvTBlock)
                yield BlockInfo(
                    path=f"stage{stage}.blocks.{i}",
                    index=index,
                    stage=stage,
                    width=layer.patch_embed.proj.out_channels,
                    heads=block.attn.num_heads,
                    resolution=grid,
                    stage_path=f"stage{stage}",
                    key_stride=block.attn.conv_proj_k.conv.stride[0],
                )
                index += 1

    def patch_size(self, model: nn.Module) -> tuple[int, int]:
        assert isinstance(model, CvT)
        return model.stages[0].patch_embed.patch_size

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        assert isinstance(model, CvT)
        return model.img_size

    def prefix_in(self, model: nn.Module, path: str) -> int:
        assert isinstance(model, CvT)
        return model.num_prefix_tokens if path.startswith(f"stage{len(model.depths) - 1}.") else 0

    def head_options(self, attention: nn.Module) -> tuple[HeadOption, ...]:
        return ("heads",)  # three layers give queries, keys and values

    def set_heads(self, attention: nn.Module, heads: int, head_dim: int) -> None:
        assert isinstance(attention, CvTAttention)
        attention.num_heads = heads  # logits are divided by √C of the width, which stays
