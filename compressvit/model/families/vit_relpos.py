"""timm's ViT with relative positions: a table or a small network of distances in every block, or one for all, and a class token or none.

Shapes: B batch, H heads, N tokens, D head width, C width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from einops import rearrange
from timm.models import vision_transformer_relpos
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock, VisionTransformerRelPos
from torch import nn
from torch.fx import wrap

from compressvit.model.families.vit import attend, in_one_stage, pre_norm
from compressvit.model.family import PRE_NORM_BRANCHES, BlockInfo, Example, Family, HeadOption, family
from compressvit.model.slots import BLOCK_SLOTS, MIX_SLOTS

wrap("rearrange")  # torch.fx records the call: einops does not take its proxies

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 5,
    "init_values": 0.1,
    "rel_pos_dim": 16,
    "weight_init": "",
}


class ExplicitRelPosAttention(RelPosAttention):
    """timm's `RelPosAttention`, of any number of heads, with slots on its logits and probabilities."""

    slots = MIX_SLOTS

    logit_mix: nn.Module | None
    prob_mix: nn.Module | None

    def forward(self: Any, x: torch.Tensor, shared_rel_pos: torch.Tensor | None = None) -> torch.Tensor:
        """x: (B, N, C); shared_rel_pos: (1, H, N, N), for attention without positions of its own."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        return attend(self, self.q_norm(q), self.k_norm(k), v, bias)


class SlottedRelPosBlock(RelPosBlock):
    """timm's pre-norm `RelPosBlock` with a slot before the MLP and one beside it."""

    slots = BLOCK_SLOTS

    mlp_conv: nn.Module | None
    adaptformer: nn.Module | None

    def forward(self, x: torch.Tensor, shared_rel_pos: torch.Tensor | None = None) -> torch.Tensor:
        return pre_norm(self, x, self.attn(self.norm1(x), shared_rel_pos=shared_rel_pos), self.ls1, self.ls2)


@family("vit_relpos")
class ViTRelPos(Family):
    """`blocks.I`, each with `attn` and `mlp`, in one stage."""

    title = "ViT with relative positions"
    supports = ("VisionTransformerRelPos (vit_relpos_*, vit_srelpos_*, but for the post-norm *_rpn_*)",)
    models = (VisionTransformerRelPos,)
    block, attention = RelPosBlock, RelPosAttention
    slotted_block, slotted_attention = SlottedRelPosBlock, ExplicitRelPosAttention
    position_table = True
    prompts = "biased_sequence"
    branches = PRE_NORM_BRANCHES
    of_each_head: ClassVar[Mapping[str, tuple[int, ...]]] = {
        "rel_pos.relative_position_bias_table": (1,),
        "rel_pos.mlp.fc2.weight": (0,),
        "rel_pos.mlp.fc2.bias": (0,),
    }
    examples: ClassVar[Mapping[str, Example]] = {"vit_relpos": Example("vit_relpos_small_patch16_224", SMALL)}

    def blocks(self, model: nn.Module) -> Iterator[BlockInfo]:
        assert isinstance(model, VisionTransformerRelPos)
        return in_one_stage(model)

    def head_options(self, attention: nn.Module) -> tuple[HeadOption, ...]:
        assert isinstance(attention, RelPosAttention)
        return ("heads", "head_dim") if isinstance(attention.q_norm, nn.Identity) else ("heads",)

    def heads_stay(self, model: nn.Module, attention: nn.Module) -> str | None:
        shared = getattr(model, "shared_rel_pos", None) is not None
        return "whose relative positions are those of all blocks, outside of them" if shared else None

    def attention_of_heads(self, attention: nn.Module) -> type[nn.Module] | None:
        return ExplicitRelPosAttention  # timm's takes for granted that heads are as wide as the tokens

    def set_heads(self, attention: nn.Module, heads: int, head_dim: int) -> None:
        assert isinstance(attention, RelPosAttention)
        attention.num_heads, attention.head_dim, attention.scale = heads, head_dim, head_dim**-0.5
        positions: Any = attention.rel_pos
        if positions is not None:
            positions.num_heads, positions.bias_shape = heads, (*positions.bias_shape[:2], heads)

    def convert(self, tensors: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        return vision_transformer_relpos.checkpoint_filter_fn(tensors, model)
