"""timm's CaiT: patches alone in blocks whose heads talk to each other, then a class token that looks at them in blocks of its own.

Those last blocks (`blocks_token_only`), two of 26 to 50, are no blocks here: transforms leave them as they are, but for `quantise`,
which rounds them too.

Shapes: B batch, H heads, N tokens, D head width, C width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from einops import rearrange
from timm.layers import resample_abs_pos_embed
from timm.models import cait
from timm.models.cait import Cait as TimmCait
from timm.models.cait import LayerScaleBlock, TalkingHeadAttn
from torch import nn
from torch.fx import wrap

from compressvit.model.families.vit import in_one_stage
from compressvit.model.family import GAMMA_BRANCHES, BlockInfo, Example, Family, HeadOption, family
from compressvit.model.slots import ATTENTION_SLOTS, BLOCK_SLOTS, beside

wrap("rearrange")  # torch.fx records the call: einops does not take its proxies

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 5,
    "init_values": 1.0,
}


class ExplicitTalkingHeads(TalkingHeadAttn):
    """timm's `TalkingHeadAttn`, with heads of any dimension, and slots on its logits and probabilities."""

    slots = ATTENTION_SLOTS

    rpe_k: nn.Module | None
    logit_mix: nn.Module | None
    prob_mix: nn.Module | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        q = q * self.scale
        logits = q @ k.transpose(-2, -1)
        if self.rpe_k is not None:
            logits = logits + self.rpe_k(q)
        logits = self.proj_l(logits.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.logit_mix is not None:
            logits = self.logit_mix(logits)
        probabilities = self.proj_w(logits.softmax(dim=-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.prob_mix is not None:
            probabilities = self.prob_mix(probabilities)
        out = rearrange(self.attn_drop(probabilities) @ v, "b h n d -> b n (h d)")
        return self.proj_drop(self.proj(out))


class SlottedLayerScaleBlock(LayerScaleBlock):
    """timm's pre-norm `LayerScaleBlock` of CaiT with a slot before the MLP and one beside it."""

    slots = BLOCK_SLOTS

    mlp_conv: nn.Module | None
    adaptformer: nn.Module | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        if self.mlp_conv is not None:
            x = self.mlp_conv(x)
        normed = self.norm2(x)
        return x + self.drop_path(self.gamma_2 * self.mlp(normed)) + beside(self.adaptformer, x, normed)


@family("cait")
class Cait(Family):
    """`blocks.I`, each with `attn` and `mlp`, in one stage."""

    title = "CaiT"
    supports = ("Cait (cait_*)",)
    models = (TimmCait,)
    block, attention = LayerScaleBlock, TalkingHeadAttn
    slotted_block, slotted_attention = SlottedLayerScaleBlock, ExplicitTalkingHeads
    mixed_heads = True
    prompts = "sequence"
    branches = GAMMA_BRANCHES
    of_each_head: ClassVar[Mapping[str, tuple[int, ...]]] = {
        "proj_l.weight": (0, 1),
        "proj_l.bias": (0,),
        "proj_w.weight": (0, 1),
        "proj_w.bias": (0,),
    }
    drop_paths = ("drop_path",)
    examples: ClassVar[Mapping[str, Example]] = {"cait": Example("cait_xxs24_224", SMALL)}

    def blocks(self, model: nn.Module) -> Iterator[BlockInfo]:
        assert isinstance(model, TimmCait)
        return in_one_stage(model)

    def prefix_tokens(self, model: nn.Module) -> int:
        return 0  # the class token comes after the blocks

    def head_options(self, attention: nn.Module) -> tuple[HeadOption, ...]:
        return ("head_dim",)

    def attention_of_heads(self, attention: nn.Module) -> type[nn.Module] | None:
        return ExplicitTalkingHeads  # timm's takes for granted that heads are as wide as the tokens

    def set_heads(self, attention: nn.Module, heads: int, head_dim: int) -> None:
        assert isinstance(attention, TalkingHeadAttn)
        attention.scale = head_dim**-0.5

    def convert(self, tensors: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
        tensors = cait.checkpoint_filter_fn(tensors, model)
        table = tensors.get("pos_embed")
        if table is not None and table.shape != model.pos_embed.shape:
            tensors["pos_embed"] = resample_abs_pos_embed(table, [*model.patch_embed.grid_size], num_prefix_tokens=0)
        return tensors
