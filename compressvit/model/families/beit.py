"""timm's `Beit`: BEiT and BEiT v2: one sequence of tokens, with a table of relative positions in every block, or one for all.

Biases of queries and values are parameters of the attention; keys have none.

Shapes: B batch, H heads, N tokens, D head width, C width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from einops import rearrange
from timm.models import beit
from timm.models.beit import Attention, Block
from timm.models.beit import Beit as TimmBeit
from torch import nn
from torch.fx import wrap

from compressvit.model.families.vit import attend, in_one_stage, pre_norm
from compressvit.model.family import GAMMA_BRANCHES, BlockInfo, Example, Family, HeadOption, family
from compressvit.model.slots import BLOCK_SLOTS, MIX_SLOTS

wrap("rearrange")  # torch.fx records the call: einops does not take its proxies

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 5,
    "head_init_scale": 1.0,
}
_SHARED = "rel_pos_bias.relative_position_bias_table"


class ExplicitBeitAttention(Attention):
    """timm's `Attention` of BEiT, of any number of heads, with slots on its logits and probabilities."""

    slots = MIX_SLOTS

    logit_mix: nn.Module | None
    prob_mix: nn.Module | None

    def forward(self: Any, x: torch.Tensor, shared_rel_pos_bias: torch.Tensor | None = None) -> torch.Tensor:
        """x: (B, N, C); shared_rel_pos_bias: (H, N, N), added to the logits besides those of the block's own table."""
        qkv = self.qkv(x)
        if self.q_bias is not None:
            qkv += torch.cat((self.q_bias, self.k_bias, self.v_bias))  # in place, as timm: taps on the layer see them
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            bias = self._get_rel_pos_bias() if bias is None else self._get_rel_pos_bias() + bias
        return attend(self, q, k, v, bias)


class SlottedBeitBlock(Block):
    """timm's pre-norm `Block` of BEiT with a slot before the MLP and one beside it."""

    slots = BLOCK_SLOTS

    mlp_conv: nn.Module | None
    adaptformer: nn.Module | None

    def forward(self, x: torch.Tensor, shared_rel_pos_bias: torch.Tensor | None = None) -> torch.Tensor:
        attended = self.attn(self.norm1(x), shared_rel_pos_bias=shared_rel_pos_bias)
        return pre_norm(self, x, attended, self.gamma_1, self.gamma_2)


@family("beit")
class Beit(Family):
    """`blocks.I`, each with `attn` and `mlp`, in one stage."""

    title = "BEiT"
    supports = ("Beit (beit_*, beitv2_*)",)
    models = (TimmBeit,)
    block, attention = Block, Attention
    slotted_block, slotted_attention = SlottedBeitBlock, ExplicitBeitAttention
    position_table = True
    prompts = "biased_sequence"
    branches = GAMMA_BRANCHES
    biases_apart: ClassVar[Mapping[str, tuple[str | None, ...]]] = {"qkv": ("q_bias", None, "v_bias")}
    of_heads = ("q_bias", "k_bias", "v_bias")
    of_each_head: ClassVar[Mapping[str, tuple[int, ...]]] = {"relative_position_bias_table": (1,)}
    examples: ClassVar[Mapping[str, Example]] = {"beit": Example("beit_base_patch16_224", SMALL)}

    def blocks(self, model: nn.Module) -> Iterator[BlockInfo]:
        assert isinstance(model, TimmBeit)
        return in_one_stage(model)

    def head_options(self, attention: nn.Module) -> tuple[HeadOption, ...]:
        return ("heads", "head_dim")

    def heads_stay(self, model: nn.Module, attention: nn.Module) -> str | None:
        shared = getattr(model, "rel_pos_bias", None) is not None
        return "which have one table of relative positions for all blocks, outside of them" if shared else None

    def attention_of_heads(self, attention: nn.Module) -> type[nn.Module] | None:
        return ExplicitBeitAttention  # timm's takes for granted that heads are as wide as the tokens

    def set_heads(self, attention: nn.Module, heads: int, head_dim: int) -> None:
        assert isinstance(attention, Attention)
        attention.num_heads, attention.scale = heads, head_dim**-0.5

    def convert(self, tensors: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        assert isinstance(model, TimmBeit)
        if (
            _SHARED in tensors and model.rel_pos_bias is None
        ):  # the official pretraining; fine-tuning gives every block its own
            shared = tensors.pop(_SHARED)
            tensors |= {f"blocks.{i}.attn.relative_position_bias_table": shared for i in range(len(model.blocks))}
        return beit.checkpoint_filter_fn(tensors, model)
