"""timm's `Eva`: EVA, EVA-02, DINOv3, RoPE-ViT and Perception Encoder: one sequence of tokens, those of patches with rotary positions.

Queries, keys and values come from one layer or from three; their biases, where the keys have none, are parameters of the attention. Head
dimensions are turned in pairs by angles that their number says, so heads can go, but not their dimensions.

Shapes: B batch, H heads, N tokens, D head width, C width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models import eva
from timm.models.eva import Eva as TimmEva
from timm.models.eva import EvaAttention, EvaBlock
from torch import nn
from torch.fx import wrap

from compressvit.model.families.vit import in_one_stage, masked, pre_norm
from compressvit.model.family import GAMMA_BRANCHES, BlockInfo, Example, Family, HeadOption, family
from compressvit.model.mixing import open_attention
from compressvit.model.slots import ATTENTION_SLOTS, BLOCK_SLOTS

wrap("rearrange")  # torch.fx records the call: einops does not take its proxies
wrap("masked")  # as in `vit`

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 5,
    "init_values": 0.1,
    "head_init_scale": 1.0,
    "dynamic_img_size": False,
}
EVA02: dict[str, Any] = {
    "ref_feat_shape": (4, 4),
    "mlp_ratio": 2,
    "scale_mlp": False,
    "swiglu_align_to": 8,
    "init_values": None,
}


class _Explicit(nn.Module):
    """What `ExplicitEvaAttention` and `ExplicitAttentionRope` share: timm's attention of either class, of any number of heads, with slots
    on its logits and probabilities. While the slots are empty it is torch's fused one, as in timm."""

    slots = ATTENTION_SLOTS

    rpe_k: nn.Module | None
    logit_mix: nn.Module | None
    prob_mix: nn.Module | None

    def forward(
        self: Any,
        x: torch.Tensor,
        rope: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """x: (B, N, C); rope: sines and cosines of the patches (N − prefix, 2·D), or (H, …) with angles for every head."""
        q, k, v = self._queries_keys_values(x)
        q, k = self.q_norm(q), self.k_norm(k)
        unturned = q
        if rope is not None:
            q, k = self._turned(q, rope, v), self._turned(k, rope, v)
        groups = getattr(self, "num_kv_groups", 1)
        if groups > 1:  # a key and a value for several queries
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)

        if self.fused_attn and self.rpe_k is None and self.logit_mix is None and self.prob_mix is None:
            dropout = self.attn_drop.p if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)
            out = rearrange(out, "b h n d -> b n (h d)")
        else:
            # contextual positions depend on contents and distance, so on queries before they are turned
            contextual = None if self.rpe_k is None else self.rpe_k(unturned * self.scale)
            out = open_attention(
                *(self, q * self.scale, k, v),
                positions=lambda logits, queries: logits if contextual is None else logits + contextual,
                mask=partial(masked, attn_mask=attn_mask, is_causal=is_causal),
                together=1 if attn_mask is None and contextual is None else None,
            )

        out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _turned(self: Any, tokens: torch.Tensor, rope: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Queries or keys (B, H, N, D), those of patches turned by their positions."""
        count = self.num_prefix_tokens
        patches = apply_rot_embed_cat(tokens[:, :, count:, :], rope, half=self.rotate_half)
        return torch.cat([tokens[:, :, :count, :], patches], dim=2).type_as(like)

    def _queries_keys_values(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, H, N, D) each."""
        if self.qkv is None:
            heads = (self.num_heads, *(getattr(self, "num_kv_heads", self.num_heads),) * 2)
            layers = (self.q_proj, self.k_proj, self.v_proj)
            return tuple(
                rearrange(layer(x), "b n (h d) -> b h n d", h=count) for layer, count in zip(layers, heads, strict=True)
            )
        qkv = self.qkv(x)
        if getattr(self, "q_bias", None) is not None:
            qkv += torch.cat((self.q_bias, self.k_bias, self.v_bias))  # in place, as timm: taps on the layer see them
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        return q, k, v


class ExplicitEvaAttention(_Explicit, EvaAttention):
    """timm's `EvaAttention` (EVA, DINOv3) with slots."""


class ExplicitAttentionRope(_Explicit, AttentionRope):
    """timm's `AttentionRope` (RoPE-ViT, Perception Encoder) with slots."""


class SlottedEvaBlock(EvaBlock):
    """timm's pre-norm `EvaBlock` with a slot before the MLP and one beside it."""

    slots = BLOCK_SLOTS

    mlp_conv: nn.Module | None
    adaptformer: nn.Module | None

    def forward(
        self,
        x: torch.Tensor,
        rope: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        attended = self.attn(self.norm1(x), rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        return pre_norm(self, x, attended, self.gamma_1, self.gamma_2)


@family("eva")
class Eva(Family):
    """`blocks.I`, each with `attn` and `mlp`, in one stage."""

    title = "Eva"
    supports = (
        "Eva (DINOv3 vit_*_dinov3*, eva_*, eva02_*, vit_*_rope_*, vit_pe_*, but for the post-norm eva02_enormous)",
    )
    models = (TimmEva,)
    block, attention = EvaBlock, (EvaAttention, AttentionRope)
    slotted_block, slotted_attention = SlottedEvaBlock, (ExplicitEvaAttention, ExplicitAttentionRope)
    whole_heads = True
    prompts = "sequence"
    branches = GAMMA_BRANCHES
    of_heads = ("q_bias", "k_bias", "v_bias")
    examples: ClassVar[Mapping[str, Example]] = {
        "dinov3": Example("vit_small_patch16_dinov3_qkvb", SMALL),
        # three projections, SwiGLU in two layers, no LayerScale, and a table of positions besides
        "eva02": Example("eva02_base_patch14_224", {**SMALL, **EVA02}),
    }

    def blocks(self, model: nn.Module) -> Iterator[BlockInfo]:
        assert isinstance(model, TimmEva)
        return in_one_stage(model)

    def head_options(self, attention: nn.Module) -> tuple[HeadOption, ...]:
        assert isinstance(attention, (EvaAttention, AttentionRope))
        if attention.gate is not None or not isinstance(attention.norm, nn.Identity):
            return ()  # they act on all heads' dimensions at once
        return ("heads",)

    def heads_stay(self, model: nn.Module, attention: nn.Module) -> str | None:
        if getattr(model, "rope_mixed", False):
            return "each of which has its own frequencies of rotary positions, outside of the blocks"
        return "several of which share a key and a value" if getattr(attention, "num_kv_groups", 1) > 1 else None

    def attention_of_heads(self, attention: nn.Module) -> type[nn.Module] | None:
        # its forward takes for granted that heads are as wide as the tokens
        return ExplicitEvaAttention if isinstance(attention, EvaAttention) else None

    def set_heads(self, attention: nn.Module, heads: int, head_dim: int) -> None:
        assert isinstance(attention, (EvaAttention, AttentionRope))
        attention.num_heads = heads
        if isinstance(attention, AttentionRope):
            attention.num_kv_heads, attention.attn_dim, attention.kv_dim = heads, heads * head_dim, heads * head_dim

    def convert(self, tensors: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        biases = {name: tensor for name, tensor in tensors.items() if name.endswith(".attn.qkv.bias")}
        own = {name for name, _ in model.named_parameters()}
        if "storage_tokens" in tensors and not any(
            name.endswith(".q_bias") for name in own
        ):  # timm would leave them out, and print
            used = [name for name, tensor in biases.items() if torch.cat([*tensor.chunk(3)[::2]]).any()]
            if used:
                raise ValueError(
                    f"{used[0]} is not zero, and the model has no biases of queries and values; give the name of timm's model with them, "
                    "vit_*_dinov3_qkvb"
                )
            tensors = {name: tensor for name, tensor in tensors.items() if name not in biases}
        return eva.checkpoint_filter_fn(tensors, model)
