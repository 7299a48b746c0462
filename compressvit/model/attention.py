"""timm's attention with the N×N matrix in the open, and slots where a transform can act on it.

Order, as in the MiniViT code: logits → + contextual relative position → + position table → mix heads → + mask → softmax →
mix heads → dropout. An empty slot does nothing, and with all of them empty the value is timm's own.

Shapes: B batch (times windows in Swin), H heads, N tokens, D head width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from timm.layers import Attention
from timm.models.swin_transformer import WindowAttention
from torch import nn

_SLOTS = ("rpe_k", "logit_mix", "prob_mix")


class HeadMixing(nn.Module):
    """Mix attention maps across heads: `out[g] = Σ_h weight[g, h] · maps[h] (+ bias[g])`. Private to a layer (MiniViT, eq. 5–6).

    Args:
        num_heads: H.
        bias: one bias per head; the reference has it in Swin, not in DeiT.
    """

    def __init__(self, num_heads: int, bias: bool = False, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, num_heads, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype)) if bias else None
        self.reset_identity()

    @torch.no_grad()
    def reset_identity(self) -> None:
        """Start as the identity, so that attention is unchanged."""
        nn.init.eye_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def reset_noise(self, std: float = 0.02) -> None:
        """Start from truncated normal noise, as the paper's code does."""
        nn.init.trunc_normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:  # (B, H, N, N) -> (B, H, N, N)
        mixed = torch.matmul(self.weight, maps.flatten(2)).view_as(maps)
        return mixed if self.bias is None else mixed + self.bias[:, None, None]


class ExplicitAttention(Attention):
    """timm's `Attention` (ViT, DeiT, DINOv2) with slots on its logits and probabilities."""

    slots = _SLOTS

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        q, k = self.q_norm(q) * self.scale, self.k_norm(k)

        logits = q @ k.transpose(-2, -1)
        if self.rpe_k is not None:
            logits = logits + self.rpe_k(q)
        if self.logit_mix is not None:
            logits = self.logit_mix(logits)
        # The mask comes after the mix: a weighted sum of −inf and finite logits would let masked tokens through or be NaN.
        if is_causal:
            future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            logits = logits.masked_fill(future, float("-inf"))
        elif attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            logits = logits + attn_mask
        probabilities = logits.softmax(dim=-1)
        if self.prob_mix is not None:
            probabilities = self.prob_mix(probabilities)
        x_out = rearrange(self.attn_drop(probabilities) @ v, "b h n d -> b n (h d)")

        x_out = self.norm(x_out)
        gate = getattr(self, "gate", None)
        if gate is not None:
            x_out = x_out * gate(x).sigmoid()
        return self.proj_drop(self.proj(x_out))


class ExplicitWindowAttention(WindowAttention):
    """timm's `WindowAttention` (Swin v1) with slots on its logits and probabilities."""

    slots = _SLOTS

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """x: (windows·B, N, C); mask: (windows, N, N) of 0 and −100, or None."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        q = q * self.scale

        logits = q @ k.transpose(-2, -1)
        if self.rpe_k is not None:
            logits = logits + self.rpe_k(q)
        logits = logits + self._get_rel_pos_bias()
        if self.logit_mix is not None:
            logits = self.logit_mix(logits)
        if mask is not None:
            windows = mask.shape[0]
            logits = rearrange(logits, "(b w) h n m -> b w h n m", w=windows) + mask[:, None]
            logits = rearrange(logits, "b w h n m -> (b w) h n m")
        probabilities = self.softmax(logits)
        if self.prob_mix is not None:
            probabilities = self.prob_mix(probabilities)
        x_out = rearrange(self.attn_drop(probabilities) @ v, "b h n d -> b n (h d)")
        return self.proj_drop(self.proj(x_out))


EXPLICIT_ATTENTION: dict[str, type[nn.Module]] = {"vit": ExplicitAttention, "swin": ExplicitWindowAttention}
