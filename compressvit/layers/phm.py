"""Projections whose matrix is a sum of Kronecker products (parameterised hypercomplex multiplication).

Papers: Beyond Fully-Connected Layers with Quaternions, ICLR 2021, https://arxiv.org/abs/2102.08597 (eq. 3); Compacter, NeurIPS 2021,
https://arxiv.org/abs/2106.04647 (eq. 8)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from compressvit.layers.adapter import AdapterLinear


class PHMLinear(nn.Module):
    """`y = x Hᵀ + b` with `H = Σ_k rule_k ⊗ W_k`: (…, in) → (…, out).

    Args:
        in_features, out_features: both divisible by n.
        n: number of products; `rule` is (n, n, n), W is (n, out/n, in/n).
        rank: None for full W_k; 1 for `W_k = left_k right_kᵀ` (Compacter).
    """

    def __init__(self, in_features: int, out_features: int, n: int, rank: int | None = None, device=None, dtype=None):
        super().__init__()
        new = {"device": device, "dtype": dtype}
        self.rule = nn.Parameter(torch.empty(n, n, n, **new))
        if rank is None:
            self.weight = nn.Parameter(torch.empty(n, out_features // n, in_features // n, **new))
        else:
            self.left = nn.Parameter(torch.empty(n, out_features // n, rank, **new))
            self.right = nn.Parameter(torch.empty(n, rank, in_features // n, **new))
        self.rank = rank
        self.bias = nn.Parameter(torch.empty(out_features, **new))

    @torch.no_grad()
    def reset(self, *, zero: bool) -> None:
        """`rule` normal (0.01, as in Compacter's code), factors Glorot; with `zero` the last factor is zero instead."""
        nn.init.normal_(self.rule, std=0.01)
        first, last = (self.weight, self.weight) if self.rank is None else (self.right, self.left)
        for k in range(self.rule.shape[0]):
            nn.init.xavier_uniform_(first[k])
            nn.init.xavier_uniform_(last[k])
        if zero:
            nn.init.zeros_(last)
        nn.init.zeros_(self.bias)

    def dense(self) -> torch.Tensor:
        """H, of shape (out, in)."""
        factors = self.weight if self.rank is None else self.left @ self.right
        n, rows, columns = factors.shape
        return torch.einsum("kab,krc->arbc", self.rule, factors).reshape(n * rows, n * columns)

    @torch.no_grad()
    def as_dense(self) -> AdapterLinear:
        """A layer with the matrix itself, which computes the same."""
        rows, columns = self.dense().shape
        layer = AdapterLinear(columns, rows, device=self.bias.device, dtype=self.bias.dtype)
        layer.weight.copy_(self.dense())
        layer.bias.copy_(self.bias)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dense(), self.bias)
