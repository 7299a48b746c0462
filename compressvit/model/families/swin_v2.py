"""timm's Swin v2: Swin with attention by cosines, positions from a small network of distances, and norms after the branches.

Shapes: B batch, H heads, N tokens of a window, D head width, C width; blocks carry (B, height, width, C).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models import swin_transformer_v2
from timm.models.swin_transformer_v2 import (
    SwinTransformerV2,
    SwinTransformerV2Block,
    WindowAttention,
)
from torch import nn
from torch.fx import wrap

from compressvit.model.families.swin import attend_in_windows, in_stages
from compressvit.model.family import BlockInfo, Example, Family, HeadOption, family
from compressvit.model.slots import BLOCK_SLOTS, MIX_SLOTS, beside

wrap("rearrange")  # torch.fx records the call: einops does not take its proxies

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
    "num_classes": 5,
    "drop_path_rate": 0.0,
}
_MOST = math.log(100)  # of the logarithm of a scale


class ExplicitCosineAttention(WindowAttention):
    """timm's `WindowAttention` of Swin v2 with slots on its logits and probabilities."""

    slots = MIX_SLOTS

    logit_mix: nn.Module | None
    prob_mix: nn.Module | None

    def forward(self: Any, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """x: (windows·B, N, C); mask: (windows, N, N) of 0 and −100, or None."""
        qkv = self.qkv(x)
        if self.q_bias is not None:
            qkv += torch.cat((self.q_bias, self.k_bias, self.v_bias))  # in place, as timm: taps on the layer see them
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        scale, table = self.logit_scale.clamp(max=_MOST).exp(), self._positions()

        def positions(logits: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
            return logits * scale + table

        return attend_in_windows(self, F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, mask, positions)

    def _positions(self: Any) -> torch.Tensor:  # (H, N, N)
        of_distances = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        count = self.window_size[0] * self.window_size[1]
        of_pairs = of_distances[self.relative_position_index.view(-1)].view(count, count, -1)
        return 16 * torch.sigmoid(of_pairs.permute(2, 0, 1))


class SlottedSwinV2Block(SwinTransformerV2Block):
    """timm's `SwinTransformerV2Block` with a slot before the MLP and one beside it; x is (B, height, width, C)."""

    slots = BLOCK_SLOTS

    mlp_conv: nn.Module | None
    adaptformer: nn.Module | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.norm1(self._attn(x)))
        if self.mlp_conv is not None:
            x = self.mlp_conv(x)
        return x + self.drop_path2(self.norm2(self.mlp(x))) + beside(self.adaptformer, x, x)


@family("swin_v2")
class SwinV2(Family):
    """`layers.STAGE.blocks.I`, each with `attn` and `mlp`."""

    title = "Swin v2"
    supports = ("SwinTransformerV2 (swinv2_*)",)
    models = (SwinTransformerV2,)
    block, attention = SwinTransformerV2Block, WindowAttention
    slotted_block, slotted_attention = SlottedSwinV2Block, ExplicitCosineAttention
    position_table = True
    whole_heads = True
    layout = "channels_last"
    of_heads = ("q_bias", "k_bias", "v_bias")
    of_each_head: ClassVar[Mapping[str, tuple[int, ...]]] = {"logit_scale": (0,), "cpb_mlp.2.weight": (0,)}
    examples: ClassVar[Mapping[str, Example]] = {"swin_v2": Example("swinv2_tiny_window8_256", SMALL)}

    def blocks(self, model: nn.Module) -> Iterator[BlockInfo]:
        assert isinstance(model, SwinTransformerV2)
        return in_stages(model)

    def head_options(self, attention: nn.Module) -> tuple[HeadOption, ...]:
        return ("heads",)

    def attention_of_heads(self, attention: nn.Module) -> type[nn.Module] | None:
        return ExplicitCosineAttention  # timm's takes for granted that heads are as wide as the tokens

    def set_heads(self, attention: nn.Module, heads: int, head_dim: int) -> None:
        assert isinstance(attention, WindowAttention)
        attention.num_heads = heads

    def convert(self, tensors: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        return swin_transformer_v2.checkpoint_filter_fn(tensors, model)
