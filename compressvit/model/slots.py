"""Slots that transforms fill inside attention and blocks. A family's slotted classes define them and where they are applied.

Attention, in the order of the MiniViT code: logits → + `rpe_k` (contextual relative position) → + position table → `logit_mix` (mix
heads) → + mask → softmax → `prob_mix` (mix heads) → dropout. A block: `mlp_conv` between attention and MLP, `adaptformer` beside the MLP.
With all slots empty the output equals timm's.
"""

from __future__ import annotations

import torch
from torch import nn

MIX_SLOTS = ("logit_mix", "prob_mix")
ATTENTION_SLOTS = ("rpe_k", *MIX_SLOTS)
BLOCK_SLOTS = ("mlp_conv", "adaptformer")


def beside(adapter: nn.Module | None, x: torch.Tensor, normed: torch.Tensor) -> torch.Tensor | float:
    """What a branch parallel to the MLP adds to the residual stream; 0 without one.

    Args:
        adapter: what is in the slot. Its `reads` says whether its input is `normed` or `x`.
        x: the residual stream (…, C).
        normed: the MLP's input (…, C).
    """
    if adapter is None:
        return 0.0
    return adapter(normed if adapter.reads == "normed" else x)
