"""Linear layers whose weight is shared plus a private low-rank term.

Paper: LORS: Low-rank Residual Structure for Parameter-Efficient Network Stacking, CVPR 2024, https://arxiv.org/abs/2403.04303
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import wrap

from compressvit.transforms.low_rank.layer import set_factors_


class LowRankTerm(nn.Module):
    """The private low-rank term `up @ down` of a layer, of shape (out, in) and rank at most r.

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
        """Start as the zero matrix, as in the paper's code: `down` Kaiming-uniform, within ±√(6 / in), `up` zero."""
        nn.init.kaiming_uniform_(self.down)
        nn.init.zeros_(self.up)

    def product(self) -> torch.Tensor:  # (out, in)
        return self.up @ self.down


@wrap  # torch.fx does not trace its condition
def linear_with_term(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """`x (weight + up @ down)ᵀ + bias`, (…, in) → (…, out), in the cheaper of two equivalent forms: for many tokens the product is added to
    the weight first, for few tokens, or a weight that cannot be added to, the factors are applied to the tokens."""
    tokens, (outputs, inputs) = x.numel() // x.shape[-1], weight.shape
    wrapped = hasattr(weight, "__tensor_flatten__")  # a tensor of integers and scales, for example, of torchao
    of_any_batch = isinstance(tokens, torch.SymInt)  # of torch.export: a choice here would bound the size of the batch
    if wrapped or (not of_any_batch and tokens * (inputs + outputs) < inputs * outputs):
        return F.linear(x, weight, bias) + F.linear(F.linear(x, down), up)
    return F.linear(x, weight + up @ down, bias)


class SharedLowRankLinear(nn.Linear):
    """timm's linear layer with a private low-rank term in its slot: `y = x (weight + up @ down)ᵀ + bias`."""

    slots = ("low_rank",)

    low_rank: LowRankTerm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear_with_term(x, self.weight, self.bias, self.low_rank.up, self.low_rank.down)

    def effective_weight(self) -> torch.Tensor:  # (out, in)
        """The weight (out, in) of the equivalent dense layer."""
        return self.weight + self.low_rank.product()

    def set_factors(self, up: torch.Tensor, down: torch.Tensor) -> None:
        """Set the factors `up` (out, r) and `down` (r, in) of the term; see `set_factors_`."""
        set_factors_(self.low_rank.up, self.low_rank.down, up, down)
