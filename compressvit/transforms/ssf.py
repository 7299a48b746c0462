"""SSF: a per-channel scale and shift after every layer of a frozen backbone.

Paper: Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning, NeurIPS 2022, https://arxiv.org/abs/2210.08823

`y = γ ⊙ z + β` after every linear layer, convolution and norm that has a bias (β needs it to merge into; Swin's reductions have
none), the classifier left out; with `blocks` or `stages`, inside those blocks alone. γ around 1 and β around 0 with a deviation of 0.02
in the paper's code; exactly there by default. It merges exactly.

Swin's merging norms have one, too. The released code leaves them out, which is 5,376 parameters fewer in Swin-T.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field
from torch import nn

from compressvit.fitting.reference import Reference
from compressvit.model import surgery
from compressvit.model.backbone import head_names
from compressvit.transforms.base import transform
from compressvit.transforms.low_rank.layer import Factored
from compressvit.transforms.on_blocks import OnBlocks
from compressvit.transforms.term import TermPlan, new_like


class ScaleShift(nn.Module):
    """`γ ⊙ z + β` over the channels of z.

    Args:
        channels: number of channels.
        channels_first: whether channels are the second dimension, as in (B, C, H, W), instead of the last.
    """

    def __init__(self, channels: int, channels_first: bool = False, device=None, dtype=None):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.channels_first = channels_first

    @torch.no_grad()
    def reset(self, std: float) -> None:
        """Draw γ around 1 and β around 0 from normal distributions with this standard deviation; 0 gives the identity."""
        nn.init.normal_(self.scale, 1.0, std)
        nn.init.normal_(self.shift, 0.0, std)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if self.channels_first:
            return z * self.scale[:, None, None] + self.shift[:, None, None]
        return z * self.scale + self.shift


class WithScaleShift(surgery.Mixin):
    """Mixin for any layer: a scale and shift of its output channels."""

    slots = ("ssf",)

    ssf: nn.Module | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = super().forward(x)
        return z if self.ssf is None else self.ssf(z)

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Of a batch norm: torch.fx sees into one that is no longer torch's own, and does not trace the check."""


class SSFPlan(TermPlan):
    """A resolved `SSF`: the layers that are followed by a scale and shift."""

    mixin = WithScaleShift
    slot = "ssf"
    starts = ("std",)

    layers: tuple[str, ...]
    std: float

    @property
    def sites(self) -> Iterable[str]:
        return self.layers

    def term(self, module: nn.Module, path: str) -> tuple[nn.Module, str]:
        # timm's LayerNorm2d, a subclass of LayerNorm, normalises the channels of (B, C, H, W)
        first = isinstance(module, nn.Conv2d) or any(kind.__name__.endswith("2d") for kind in type(module).__mro__)
        bias: Any = module.bias
        return ScaleShift(len(bias), first, **new_like(bias)), "+ scale and shift"

    @torch.no_grad()
    def initialise(self, student: nn.Module, reference: Reference) -> None:
        for term in self.terms(student).values():
            term.reset(self.std)

    def folds_into(self, path: str) -> list[str]:
        return [f"{path}.weight", f"{path}.bias"]

    def fold_term(self, module: nn.Module, term: Any, path: str) -> None:
        """`W' = diag(γ) W`, `b' = γ b + β`; the same for norms."""
        scale, shift = term.scale.double(), term.shift.double()
        weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
        weight.copy_(weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1)))
        bias.copy_(bias.double() * scale + shift)


@transform("ssf", SSFPlan)
class SSF(OnBlocks):
    """A scale and shift after every linear layer, convolution and norm; the backbone is frozen (SSF)."""

    freezes = True

    std: float = Field(
        0.0,
        ge=0,
        description="Standard deviation of the initial values; 0 starts as the identity, the paper's code uses 0.02.",
    )

    def plan(self, model: nn.Module, reference: Reference | None = None) -> SSFPlan:
        inside = tuple(f"{info.path}." for info in self.chosen(model))
        everywhere = self.blocks is None and self.stages is None  # then also outside the blocks
        heads = head_names(model)
        of_steps = surgery.added_modules(model)  # layers added by earlier steps
        layers = tuple(
            path
            for path, layer in model.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d, Factored))
            and getattr(layer, "bias", None) is not None
            and f"{path}.bias" not in heads
            and path not in of_steps
            and (everywhere or path.startswith(inside))
        )
        return SSFPlan(layers=layers, std=self.std)
