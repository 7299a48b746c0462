"""timm's Hiera: stages of tokens in the order of mask units, within which the first stages attend; the first block of a stage pools its
queries and widens the tokens, so that a stage is not of blocks of one shape.

Shapes: B batch, N tokens in the order of mask units, C width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from timm.models import hiera
from timm.models.hiera import Hiera as TimmHiera
from timm.models.hiera import HieraBlock, MaskUnitAttention
from torch import nn

from compressvit.model.family import BlockInfo, Branch, Example, Family, HeadOption, family
from compressvit.model.slots import beside

SMALL: dict[str, Any] = {
    "img_size": 32,
    "embed_dim": 16,
    "num_heads": 2,
    "stages": (2, 2),
    "q_pool": 1,
    "mask_unit_size": (4, 4),
    "mask_unit_attn": (True, False),
    "num_classes": 5,
    "head_init_scale": 1.0,
}


class SlottedHieraBlock(HieraBlock):
    """timm's `HieraBlock` with a slot beside the MLP."""

    slots = ("adaptformer",)

    adaptformer: nn.Module | None

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x)
        if self.do_expand:
            parts = (x if self.proj is None else self.proj(normed)).unflatten(1, (self.attn.q_stride, -1))
            largest = parts.amax(dim=1)
            x = largest if self.proj is not None else torch.cat([largest, parts.mean(dim=1)], dim=-1)
        x = x + self.drop_path1(self.ls1(self.attn(normed)))
        normed = self.norm2(x)
        return x + self.drop_path2(self.ls2(self.mlp(normed))) + beside(self.adaptformer, x, normed)


@family("hiera")
class Hiera(Family):
    """`blocks.I`, each with `attn` and `mlp`."""

    title = "Hiera"
    supports = ("Hiera (hiera_*)",)
    models = (TimmHiera,)
    block, attention = HieraBlock, MaskUnitAttention
    slotted_block = SlottedHieraBlock
    whole_heads = True
    widens = True
    in_rows = False  # mask unit by mask unit
    # Attention has none: before the first norm of a stage the stream is narrower, and of more tokens.
    branches: ClassVar[Mapping[str, Branch]] = {"mlp.fc2": Branch("norm2", "mlp", "ls2")}
    examples: ClassVar[Mapping[str, Example]] = {"hiera": Example("hiera_tiny_224", SMALL)}

    def blocks(self, model: Any) -> Iterator[BlockInfo]:
        height, width = model.tokens_spatial_shape
        unit = model.mask_unit_size
        stage = 0
        for i, block in enumerate(model.blocks):
            attention = block.attn
            before, keys = (height, width), unit
            if i - 1 in model.stage_ends:
                stage += 1
                if stage <= model.q_pool:
                    down, across = model.q_stride
                    height, width, unit = height // down, width // across, (unit[0] // down, unit[1] // across)
            if not attention.use_mask_unit_attn:
                keys = before
            yield BlockInfo(
                path=f"blocks.{i}",
                index=i,
                stage=stage,
                width=block.dim_out,
                heads=attention.heads,
                resolution=(height, width),
                window=keys if attention.use_mask_unit_attn or attention.q_stride > 1 else None,
            )

    def patch_size(self, model: nn.Module) -> tuple[int, int]:
        assert isinstance(model, TimmHiera)
        height, width = model.patch_stride
        return height, width

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        assert isinstance(model, TimmHiera)
        height, width = (
            count * side for count, side in zip(model.tokens_spatial_shape, model.patch_stride, strict=True)
        )
        return height, width

    def head_options(self, attention: nn.Module) -> tuple[HeadOption, ...]:
        assert isinstance(attention, MaskUnitAttention)
        # a pooled query is the largest number of several in each dimension, so dimensions stay what they are
        return ("heads", "head_dim") if attention.q_stride == 1 else ("heads",)

    def set_heads(self, attention: nn.Module, heads: int, head_dim: int) -> None:
        assert isinstance(attention, MaskUnitAttention)
        attention.heads, attention.head_dim, attention.dim_out = heads, head_dim, heads * head_dim
        attention.scale = head_dim**-0.5

    def convert(self, tensors: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        return hiera.checkpoint_filter_fn(tensors, model)
