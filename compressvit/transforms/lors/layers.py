"""Linear layers whose weight is shared plus a private low-rank term, or low rank alone.

Paper: LORS: Low-rank Residual Structure for Parameter-Efficient Network Stacking, CVPR 2024, https://arxiv.org/abs/2403.04303
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class LowRank(nn.Module):
    """The product `up @ down`, of shape (out, in) and rank at most r. Private to a layer.

    Args:
        in_features, out_features: of the layer.
        rank: r.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, device=None, dtype=None):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.reset_zero()

    @torch.no_grad()
    def reset_zero(self) -> None:
        """Start as the zero matrix: `down` Kaiming-uniform, `up` zero (LORS, section 4)."""
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        nn.init.zeros_(self.up)

    @torch.no_grad()
    def set_factors(self, up: torch.Tensor, down: torch.Tensor) -> None:
        """Take these values, of any precision; components without any start as `reset_zero` leaves them, so that they can learn."""
        self.reset_zero()
        size = up.norm(dim=0) * down.norm(dim=1)
        used = size > 1e-7 * size.max()  # float32 has nothing below that beside the largest
        self.up[:, used] = up[:, used].to(self.up)
        self.down[used] = down[used].to(self.down)

    def product(self) -> torch.Tensor:  # (out, in)
        return self.up @ self.down

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…, in) -> (…, out)
        return F.linear(F.linear(x, self.down), self.up)


class SharedLowRankLinear(nn.Linear):
    """timm's linear layer with a private low-rank term in its slot: `y = x (weight + up @ down)ᵀ + bias`.

    The cheaper of two equal orders is used: the product is added to the weight where there are more tokens than that costs,
    and applied to the tokens where there are fewer.
    """

    slots = ("low_rank",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.numel() // x.shape[-1]
        if tokens * (self.in_features + self.out_features) < self.in_features * self.out_features:
            return F.linear(x, self.weight, self.bias) + self.low_rank(x)
        return F.linear(x, self.effective_weight(), self.bias)

    def effective_weight(self) -> torch.Tensor:  # (out, in)
        return self.weight + self.low_rank.product()


class FactoredLinear(nn.Linear):
    """timm's linear layer with its dense weight gone: `y = (x downᵀ) upᵀ + bias`, r·(in + out) multiply-accumulates a token."""

    slots = ("low_rank",)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The product, for code that reads a layer's weight past its forward; it has no key of its own."""
        return self.low_rank.product()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.low_rank(x)
        return y if self.bias is None else y + self.bias

    def effective_weight(self) -> torch.Tensor:  # (out, in)
        return self.low_rank.product()
