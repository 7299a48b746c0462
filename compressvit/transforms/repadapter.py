"""RepAdapter: linear adapters before the projections of a frozen backbone, which merge into them: no cost at inference.

Paper: Towards Efficient Visual Adaption via Structural Re-parameterization, https://arxiv.org/abs/2302.08106

`φ(x) = x + s·(B(A x + a) + b)` on what enters attention and MLP (`place: block`) or attention alone; A (h', M), B in g groups, no
activation, dropout between the two in training. A Xavier, the rest zero: the identity at the start. M·h' + h' + M·h'/g + M
parameters each. In ConvNeXt φ sits between the norm and the MLP: before the depth-wise convolution it would make that one dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from pydantic import Field
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.moments import Reference
from compressvit.model import surgery
from compressvit.model.affine import merge_before_
from compressvit.model.backbone import describe, model_name, projection
from compressvit.model.linear import weight_shape
from compressvit.transforms.base import Transform, transform
from compressvit.transforms.bottleneck import at_tokens
from compressvit.transforms.term import TermPlan, new_like

FIRST_LAYER = {"attn": "qkv", "mlp": "fc1"}  # of a sublayer: what φ merges into


class RepBottleneck(nn.Module):
    """`s · (B(A x + a) + b)` without an activation, zero at the start: A dense (h, M), B in g groups, (M, h/g).

    Hidden slice k feeds output slice k (RepAdapter, eq. 5).

    Args:
        width: M.
        hidden: h; the groups divide it and M.
        groups: g.
        scale: s.
        dropout: between A and B, in training.
    """

    def __init__(
        self, width: int, hidden: int, groups: int, scale: float, dropout: float = 0.1, device=None, dtype=None
    ):
        super().__init__()
        self.down = nn.Linear(width, hidden, device=device, dtype=dtype)
        self.up_weight = nn.Parameter(
            torch.empty(groups, width // groups, hidden // groups, device=device, dtype=dtype)
        )
        self.up_bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.dropout = nn.Dropout(dropout)
        self.scale = scale

    @torch.no_grad()
    def reset(self) -> None:
        """A Xavier-uniform, the rest zero, as in the paper's code."""
        nn.init.xavier_uniform_(self.down.weight)
        for zero in (self.down.bias, self.up_weight, self.up_bias):
            nn.init.zeros_(zero)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = rearrange(self.dropout(self.down(x)), "... (g k) -> ... g k", g=self.up_weight.shape[0])
        out = torch.einsum("...gk,gok->...go", hidden, self.up_weight)
        return self.scale * (rearrange(out, "... g o -> ... (g o)") + self.up_bias)

    @torch.no_grad()
    def as_affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """R (M, M) and c (M,) in float64, so that `x + self(x) = R x + c` in eval mode."""
        down, bias = self.down.weight.double(), self.down.bias.double()
        up = torch.block_diag(*self.up_weight.double())
        identity = torch.eye(down.shape[1], dtype=torch.float64, device=down.device)
        return identity + self.scale * up @ down, self.scale * (up @ bias + self.up_bias.double())


class WithRepAdapter(surgery.Mixin):
    """Mixin for a sublayer: `φ(x) = x + repadapter(x)` on its input, so that φ can be merged into its first projection.

    In Swin that is after the padding of windows, so padded tokens see φ(0): what the merged projection does to them, too.
    """

    slots = ("repadapter",)

    repadapter: nn.Module | None

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.repadapter is not None:
            x = x + at_tokens(self.repadapter, x, self)
        return super().forward(x, *args, **kwargs)


class RepAdapterPlan(TermPlan):
    """A resolved `RepAdapter`: the sublayers that have one."""

    mixin = WithRepAdapter
    slot = "repadapter"
    folds_last = True  # `W R` is of the whole W, with what other steps add to it

    paths: tuple[str, ...]
    width: int
    groups: int
    scale: float
    dropout: float

    @property
    def sites(self) -> Iterable[str]:
        return self.paths

    def term(self, module: nn.Module, path: str) -> tuple[nn.Module, str]:
        layer = module.get_submodule(_first(path))
        options = (self.width, self.groups, self.scale, self.dropout)
        text = f"+ linear bottleneck of {self.width} in {self.groups} groups, scale {self.scale:g}"
        return RepBottleneck(weight_shape(layer)[1], *options, **new_like(next(layer.parameters()))), text

    def folds_into(self, path: str) -> list[str]:
        return [f"{path}.{_first(path)}.weight"]

    def fold_term(self, module: nn.Module, term: Any, path: str) -> None:
        """Into the projection after it: `W' = W R`, `b' = b + W c` with `φ(x) = R x + c`."""
        merge_before_(module.get_submodule(_first(path)), *term.as_affine())


def _first(path: str) -> str:
    return FIRST_LAYER[path.rpartition(".")[2]]


@transform("repadapter", RepAdapterPlan)
class RepAdapter(Transform):
    """Linear adapters before attention and MLP, merged into the projections for inference (RepAdapter)."""

    freezes = True
    blind_at_start: ClassVar[dict[str, str]] = dict.fromkeys(
        ("down.weight", "down.bias"), "the second projection starts at zero"
    )

    width: int = Field(8, ge=1, description="Hidden neurons h'.")
    groups: int = Field(2, ge=1, description="Groups g of the second projection; must divide h' and M.")
    scale: float = Field(1.0, gt=0, description="Scale s; the paper chooses it per task from 0.1, 0.5, 1, 5, 10.")
    place: Literal["block", "attention"] = Field(
        "block", description="block: before attention and MLP; attention: before attention only."
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout between the projections in training.")

    @classmethod
    def examples(cls) -> Sequence[Transform]:
        return (RepAdapter(width=4, scale=0.5),)

    def plan(self, model: nn.Module, reference: Reference | None = None) -> RepAdapterPlan:
        backbone = describe(model)
        parts = backbone.parts if self.place == "block" else tuple(p for p in backbone.parts if p == "attn")
        if not parts:
            raise UserError(
                f"repadapter.place=attention, but the blocks of {model_name(model)} have no attention; use place=block"
            )
        for what, size in [("width", self.width), *((info.path, info.width) for info in backbone.blocks)]:
            if size % self.groups:
                raise UserError(
                    f"repadapter.groups={self.groups} does not divide the {size} of {what}; it can be one of "
                    f"{[g for g in range(1, self.width + 1) if self.width % g == 0 and size % g == 0]}"
                )
        paths = tuple(f"{info.path}.{part}" for info in backbone.blocks for part in parts)
        for path in paths:
            projection(model, f"{path}.{_first(path)}", f"repadapter.place={self.place}")
        return RepAdapterPlan(paths=paths, width=self.width, groups=self.groups, scale=self.scale, dropout=self.dropout)
