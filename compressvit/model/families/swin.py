"""timm's Swin (version 1): stages of a grid of tokens, attention in windows that are shifted in every second block.

Shapes: B batch, H heads, N tokens of a window, D head width, C width; blocks carry (B, height, width, C).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
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
from compressvit.model.mixing import open_attention, with_contextual
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
        table = self._get_rel_pos_bias()

        def positions(logits: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
            return with_contextual(self.rpe_k, logits, queries) + table

        return attend_in_windows(self, q * self.scale, k, v, mask, positions)


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


def attend_in_windows(
    attention: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    positions: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """What an attention with slots returns, (windows·B, N, C), of queries, keys and values (windows·B, H, N, D).

    Args:
        mask: (windows, N, N) of 0 and −100, or None.
        positions: see `open_attention`.
    """
    hidden = None if mask is None else partial(_hidden, mask)
    windows = 1 if mask is None else mask.shape[0]
    out = open_attention(attention, q, k, v, positions=positions, mask=hidden, together=windows)
    result: torch.Tensor = attention.proj_drop(attention.proj(out))
    return result


def _hidden(mask: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Logits (windows·B, H, N, N) plus a mask (windows, N, N)."""
    by_window = rearrange(logits, "(b w) h n m -> b w h n m", w=mask.shape[0])
    return rearrange(by_window + mask[:, None], "b w h n m -> (b w) h n m")


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, which timm may give as one number."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
