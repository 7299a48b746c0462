"""PHM adapters: bottleneck adapters whose projections are sums of Kronecker products.

Paper: Beyond Fully-Connected Layers with Quaternions: Parameterization of Hypercomplex Multiplications with 1/n Parameters,
ICLR 2021, https://arxiv.org/abs/2102.08597; as a baseline of MiMi, https://arxiv.org/abs/2311.03873

`H = Σ_{k≤n} A_k ⊗ W_k`, A (n, n, n), W (n, out/n, in/n), with biases: 2·n³ + 2·M·h'/n + h' + M parameters an adapter. A starts normal
with a standard deviation of 0.01 and W Glorot-uniform with a gain of √2, but W of the upper projection is zero, so the model is
unchanged (`init: noise` for the released code's start). Merging multiplies the products out: what is left are `adapters`
with biases, which compute the same in fewer operations and more parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.reference import Reference
from compressvit.transforms.adapters import AdaptersPlan
from compressvit.transforms.base import Transform, transform
from compressvit.transforms.bottleneck import (
    UP_STARTS_AT_ZERO,
    Activation,
    AdapterLinear,
    Bottleneck,
    Place,
    Start,
    adapter_widths,
    sublayer_width,
)
from compressvit.transforms.on_blocks import OnBlocks


class PHMLinear(nn.Module):
    """`y = x Hᵀ + b` with `H = Σ_k rule_k ⊗ W_k`: (…, in) → (…, out).

    Args:
        in_features, out_features: both divisible by n.
        n: number of Kronecker products; `rule` is (n, n, n), W is (n, out/n, in/n).
        rank: None for full W_k; 1 for `W_k = left_k right_kᵀ` (Compacter).
        rule_std: standard deviation of `rule` at the start.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n: int,
        rank: int | None = None,
        rule_std: float = 0.01,
        device=None,
        dtype=None,
    ):
        super().__init__()
        new = {"device": device, "dtype": dtype}
        self.rule = nn.Parameter(torch.empty(n, n, n, **new))
        if rank is None:
            self.weight = nn.Parameter(torch.empty(n, out_features // n, in_features // n, **new))
        else:
            self.left = nn.Parameter(torch.empty(n, out_features // n, rank, **new))
            self.right = nn.Parameter(torch.empty(n, rank, in_features // n, **new))
        self.rank, self.rule_std = rank, rule_std
        self.bias = nn.Parameter(torch.empty(out_features, **new))

    @torch.no_grad()
    def reset(self, *, zero: bool) -> None:
        """`rule` normal, factors Glorot-uniform with a gain of √2, as in Compacter's code; with `zero` the last factor is zero instead."""
        nn.init.normal_(self.rule, std=self.rule_std)
        first, last = (self.weight, self.weight) if self.rank is None else (self.right, self.left)
        for k in range(self.rule.shape[0]):
            nn.init.xavier_uniform_(first[k], gain=2**0.5)
            nn.init.xavier_uniform_(last[k], gain=2**0.5)
        if zero:
            nn.init.zeros_(last)
        nn.init.zeros_(self.bias)

    def reset_noise(self) -> None:
        """Start as Compacter's code does: no factor is zero."""
        self.reset(zero=False)

    def dense(self) -> torch.Tensor:
        """H, of shape (out, in)."""
        factors = self.weight if self.rank is None else self.left @ self.right
        n, rows, columns = factors.shape
        return torch.einsum("kab,krc->arbc", self.rule, factors).reshape(n * rows, n * columns)

    @torch.no_grad()
    def as_dense(self) -> AdapterLinear:
        """The equivalent dense layer."""
        rows, columns = self.dense().shape
        layer = AdapterLinear(columns, rows, device=self.bias.device, dtype=self.bias.dtype)
        layer.weight.copy_(self.dense())
        layer.bias.copy_(self.bias)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dense(), self.bias)


class PHMPlan(AdaptersPlan):
    """Resolved PHM adapters."""

    prunable = False  # a neuron has no row of its own in a Kronecker product
    foldable = True
    rank: ClassVar[int | None] = None  # of W_k: full
    rule_std: ClassVar[float] = 0.01

    n: int

    def bottleneck(self, model: nn.Module, path: str, hidden: int) -> Bottleneck:
        like, width = sublayer_width(model, path)
        options: dict[str, Any] = {"rank": self.rank, "rule_std": self.rule_std}
        options |= {"device": like.device, "dtype": like.dtype}
        return Bottleneck(
            PHMLinear(width, hidden, self.n, **options), PHMLinear(hidden, width, self.n, **options), self.act
        )

    def fold(self, model: nn.Module) -> AdaptersPlan:
        """Replace every projection by a dense one whose matrix is the sum of its Kronecker products."""
        for bottleneck in self.bottlenecks(model).values():
            for projection in ("down", "up"):
                setattr(bottleneck, projection, getattr(bottleneck, projection).as_dense())
        return AdaptersPlan(widths=self.widths, bias=True, act=self.act)


def require_divisible(asker: str, n: int, widths: dict[str, int], model: nn.Module) -> None:
    """Raise a `UserError` unless n divides the width and the neurons of every adapter."""
    for path, hidden in widths.items():
        width = sublayer_width(model, path)[1]
        for what, size in (("width", width), ("bottleneck", hidden)):
            if size % n:
                near = [d for d in range(1, size + 1) if width % d == 0 and hidden % d == 0]
                raise UserError(
                    f"{asker}.n={n} does not divide the {what} {size} of {path} ({width} channels, {hidden} neurons); "
                    f"n can be one of {near or [1]} there, or give another ratio"
                )


@transform("phm", PHMPlan)
class PHM(OnBlocks):
    """Adapters whose projections are sums of Kronecker products (PHM)."""

    freezes = True
    blind_at_start: ClassVar[dict[str, str]] = {
        **UP_STARTS_AT_ZERO,
        "down.rule": "the upper projection starts at zero",
        "down.left": "the upper projection starts at zero",
        "down.right": "the upper projection starts at zero",
        "up.rule": "the factors it multiplies start at zero",
        "up.right": "the factor after it starts at zero",
    }

    n: int = Field(
        12, ge=1, description="Number of Kronecker products; must divide the width and the neurons of every adapter."
    )
    ratio: float = Field(1 / 8, gt=0, description="Neurons as a share of the block's width M.")
    places: tuple[Place, ...] = Field(
        ("attn", "mlp"), min_length=1, description="Sublayers that get an adapter, where a block has them."
    )
    act: Activation = Field("gelu", description="timm's name of the activation between the projections.")
    init: Start = Field(
        "zero",
        description="zero: the last factor of the upper projection is zero, so the model is unchanged at the start. noise: both "
        "projections as in Compacter's released code, every factor Glorot-uniform with a gain of √2, which changes the model.",
    )

    @classmethod
    def examples(cls) -> Sequence[Transform]:
        return (cls(n=2, ratio=0.25),)

    def plan(self, model: nn.Module, reference: Reference | None = None) -> PHMPlan:
        widths = adapter_widths(model, self.name, self.chosen(model), self.places, None, self.ratio)
        require_divisible(self.name, self.n, widths, model)
        plan_class: Any = self.plan_class  # Compacter's is another
        return plan_class(widths=widths, bias=True, act=self.act, n=self.n, init=self.init)
