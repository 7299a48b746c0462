"""timm's Swin (version 1): stages of a grid of tokens, attention in windows that are shifted in every second block.

Shapes: B batch, H heads, N tokens of a window, D head width, C width; blocks carry (B, height, width, C).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from timm.models import swin_transformer
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
)
from torch import nn
from torch.fx import wrap

from compressvit.model.family import PRE_NORM_BRANCHES, BlockInfo, Example, Family, HeadOption, family
from compressvit.model.slots import ATTENTION_SLOTS, BLOCK_SLOTS, beside

wrap("rearrange")  # torch.fx records the call: einops does not take its proxies

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (2, 4),
    "num_heads": (2, 4),
    "window_size": 4,
    "num_classes": 5,
    "drop_path_rate": 0.0,
}


class ExplicitWindowAttention(WindowAttention):
    """timm's `WindowAttention` (Swin v1) with slots on its logits and probabilities."""

    slots = ATTENTION_SLOTS

    rpe_k: nn.Module | None
    logit_mix: nn.Module | None
    prob_mix: nn.Module | None

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """x: (windows·B, N, C); mask: (windows, N, N) of 0 and −100, or None."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        q = q * self.scale

        logits = q @ k.transpose(-2, -1)
        if self.rpe_k is not None:
            logits = logits + self.rpe_k(q)
        logits = logits + self._get_rel_pos_bias()
        return mix_and_weigh(self, logits, v, mask)


class SlottedSwinBlock(SwinTransformerBlock):
    """timm's `SwinTransformerBlock` with a slot before the MLP and one beside it; x is (B, height, width, C)."""

    slots = BLOCK_SLOTS

    mlp_conv: nn.Module | None
    adaptformer: nn.Module | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self._attn(self.norm1(x)))
        if self.mlp_conv is not None:
            x = self.mlp_conv(x)
        normed = self.norm2(x)
        return x + self.drop_path2(self.mlp(normed)) + beside(self.adaptformer, x, normed)


@family("swin")
class Swin(Family):
    """`layers.STAGE.blocks.I`, each with `attn` and `mlp`."""

    title = "Swin"
    supports = ("SwinTransformer (swin_*, version 1)",)
    models = (SwinTransformer,)
    block, attention = SwinTransformerBlock, WindowAttention
    slotted_block, slotted_attention = SlottedSwinBlock, ExplicitWindowAttention
    position_table = True
    prompts = "windows"
    layout = "channels_last"
    branches = PRE_NORM_BRANCHES
    of_each_head: ClassVar[Mapping[str, tuple[int, ...]]] = {"relative_position_bias_table": (1,)}
    examples: ClassVar[Mapping[str, Example]] = {"swin": Example("swin_tiny_patch4_window7_224", SMALL)}

    def blocks(self, model: nn.Module) -> Iterator[BlockInfo]:
        assert isinstance(model, SwinTransformer)
        return in_stages(model)

    def head_options(self, attention: nn.Module) -> tuple[HeadOption, ...]:
        return ("heads", "head_dim")

    def set_heads(self, attention: nn.Module, heads: int, head_dim: int) -> None:
        assert isinstance(attention, WindowAttention)
        attention.num_heads, attention.scale = heads, head_dim**-0.5

    def convert(self, tensors: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        return swin_transformer.checkpoint_filter_fn(tensors, model)


def in_stages(model: Any) -> Iterator[BlockInfo]:
    """`layers.S.blocks.I` of a Swin of either version."""
    index = 0
    for stage, layer in enumerate(model.layers):
        for i, block in enumerate(layer.blocks):
            yield BlockInfo(
                path=f"layers.{stage}.blocks.{i}",
                index=index,
                stage=stage,
                width=block.dim,
                heads=block.attn.num_heads,
                resolution=pair(block.input_resolution),
                window=pair(block.window_size),
                shift=pair(block.shift_size),
                stage_path=f"layers.{stage}",
            )
            index += 1


def mix_and_weigh(attention: Any, logits: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What an attention with slots returns: (windows·B, N, C), from its logits (windows·B, H, N, N) and values (windows·B, H, N, D).

    Args:
        mask: (windows, N, N) of 0 and −100, or None.
    """
    if attention.logit_mix is not None:
        logits = attention.logit_mix(logits)
    if mask is not None:
        windows = mask.shape[0]
        logits = rearrange(logits, "(b w) h n m -> b w h n m", w=windows) + mask[:, None]
        logits = rearrange(logits, "b w h n m -> (b w) h n m")
    probabilities = attention.softmax(logits)
    if attention.prob_mix is not None:
        probabilities = attention.prob_mix(probabilities)
    out = rearrange(attention.attn_drop(probabilities) @ v, "b h n d -> b n (h d)")
    result: torch.Tensor = attention.proj_drop(attention.proj(out))
    return result


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, which timm may give as one number."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
