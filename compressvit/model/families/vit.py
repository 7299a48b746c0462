"""timm's ViT, DeiT, DeiT III and DINOv2: one sequence of tokens, attention over all of them.

Shapes: B batch, H heads, N tokens, D head width, C width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Attention
from timm.models import vision_transformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.fx import wrap

from compressvit.model.family import PRE_NORM_BRANCHES, BlockInfo, Example, Family, HeadOption, family
from compressvit.model.mixing import open_attention, with_contextual
from compressvit.model.slots import ATTENTION_SLOTS, BLOCK_SLOTS, beside

wrap("rearrange")  # torch.fx records the call: einops does not take its proxies

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 5,
}


@wrap  # torch.fx does not trace its conditions
def masked(logits: torch.Tensor, attn_mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
    """The logits (B, H, N, N) with a mask, as timm's `Attention` takes it: −inf where a boolean one is False; another is added."""
    if is_causal:
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        return logits.masked_fill(future, float("-inf"))
    if attn_mask is None:
        return logits
    if attn_mask.dtype == torch.bool:
        return logits.masked_fill(~attn_mask, float("-inf"))
    return logits + attn_mask


class ExplicitAttention(Attention):
    """timm's `Attention` (ViT, DeiT, DINOv2) with slots on its logits and probabilities."""

    slots = ATTENTION_SLOTS

    rpe_k: nn.Module | None
    logit_mix: nn.Module | None
    prob_mix: nn.Module | None

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        q, k = self.q_norm(q) * self.scale, self.k_norm(k)
        # The mask comes after the mix: a weighted sum of −inf and finite logits would let masked tokens through or be NaN.
        x_out = open_attention(
            *(self, q, k, v),
            positions=partial(with_contextual, self.rpe_k),
            mask=partial(masked, attn_mask=attn_mask, is_causal=is_causal),
            together=1 if attn_mask is None else None,
        )

        x_out = self.norm(x_out)
        gate = getattr(self, "gate", None)
        if gate is not None:
            x_out = x_out * gate(x).sigmoid()
        return self.proj_drop(self.proj(x_out))


class SlottedBlock(Block):
    """timm's pre-norm ViT `Block` with a slot before the MLP and one beside it."""

    slots = BLOCK_SLOTS

    mlp_conv: nn.Module | None
    adaptformer: nn.Module | None

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        return pre_norm(self, x, self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal), self.ls1, self.ls2)


@family("vit")
class ViT(Family):
    """`blocks.I`, each with `attn` and `mlp`, in one stage."""

    title = "ViT"
    supports: ClassVar[tuple[str, ...]] = (
        "VisionTransformer (vit_*, deit_*, deit3_*, DINOv2 with LayerScale and register tokens)",
        "VisionTransformerDistilled (deit_*_distilled_*)",
    )
    models: ClassVar[tuple[type[nn.Module], ...]] = (VisionTransformer, VisionTransformerDistilled)
    block, attention = Block, Attention
    slotted_block, slotted_attention = SlottedBlock, ExplicitAttention
    prompts = "sequence"
    branches = PRE_NORM_BRANCHES
    examples: ClassVar[Mapping[str, Example]] = {
        "vit": Example("vit_tiny_patch16_224", SMALL),
        "vit_no_class_token": Example(
            "vit_tiny_patch16_224", {**SMALL, "class_token": False, "global_pool": "avg"}, "whole"
        ),
        "deit_distilled": Example("deit_tiny_distilled_patch16_224", SMALL, "whole"),
        "dinov2_registers": Example("vit_small_patch14_reg4_dinov2", {**SMALL, "init_values": 0.1}),
        "headless": Example("vit_small_patch14_dinov2", {**SMALL, "num_classes": 0}, "whole"),
        "clip": Example("vit_base_patch16_clip_quickgelu_224", SMALL, "frozen"),
    }

    def blocks(self, model: nn.Module) -> Iterator[BlockInfo]:
        assert isinstance(model, VisionTransformer)
        return in_one_stage(model)

    def head_options(self, attention: nn.Module) -> tuple[HeadOption, ...]:
        assert isinstance(attention, Attention)
        if attention.gate is not None or not isinstance(attention.norm, nn.Identity):
            return ()  # they act on all heads' dimensions at once
        return ("heads", "head_dim") if isinstance(attention.q_norm, nn.Identity) else ("heads",)

    def set_heads(self, attention: nn.Module, heads: int, head_dim: int) -> None:
        assert isinstance(attention, Attention)
        attention.num_heads, attention.head_dim, attention.attn_dim = heads, head_dim, heads * head_dim
        attention.scale = head_dim**-0.5

    def convert(self, tensors: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        assert isinstance(model, VisionTransformer)
        # adapt_layer_scale: gamma_1 of the original DeiT III files
        return vision_transformer.checkpoint_filter_fn(tensors, model, adapt_layer_scale=True)


Scale = nn.Module | torch.Tensor | None  # a LayerScale: a module, a parameter (C,), or none


def pre_norm(block: Any, x: torch.Tensor, attended: torch.Tensor, first: Scale, second: Scale) -> torch.Tensor:
    """What a pre-norm block with a slot before the MLP and one beside it gives, (B, N, C).

    Args:
        x: the residual stream before the block, (B, N, C).
        attended: what its attention gives.
        first, second: after attention and MLP.
    """
    x = x + block.drop_path1(_scaled(attended, first))
    if block.mlp_conv is not None:
        x = block.mlp_conv(x)
    normed = block.norm2(x)
    return x + block.drop_path2(_scaled(block.mlp(normed), second)) + beside(block.adaptformer, x, normed)


def _scaled(given: torch.Tensor, scale: Scale) -> torch.Tensor:
    if scale is None:
        return given
    found: torch.Tensor = scale(given) if isinstance(scale, nn.Module) else scale * given
    return found


def in_one_stage(model: Any) -> Iterator[BlockInfo]:
    """`blocks.I` of a model that keeps one sequence of tokens of one width."""
    for i, block in enumerate(model.blocks):
        yield BlockInfo(
            path=f"blocks.{i}",
            index=i,
            stage=0,
            width=model.embed_dim,
            heads=getattr(getattr(block, "attn", None), "num_heads", 0),
            resolution=model.patch_embed.grid_size,
        )


def attend(
    attention: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """What an attention with a bias on its logits and slots to mix heads returns, (B, N, C). While the slots are empty it is torch's fused
    one, as in timm.

    Args:
        q, k, v: (B, H, N, D).
        bias: (H, N, N) or (1, H, N, N), of every image; or None.
    """
    if attention.fused_attn and attention.logit_mix is None and attention.prob_mix is None:
        dropout = attention.attn_drop.p if attention.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        heads = rearrange(out, "b h n d -> b n (h d)")
    else:
        heads = open_attention(attention, q * attention.scale, k, v, positions=partial(_biased, bias))
    result: torch.Tensor = attention.proj_drop(attention.proj(heads))
    return result


def _biased(bias: torch.Tensor | None, logits: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    return logits if bias is None else logits + bias
