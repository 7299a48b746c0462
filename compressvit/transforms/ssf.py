"""SSF: a scale and shift of the channels behind every layer of a frozen backbone.

Paper: Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning, NeurIPS 2022, https://arxiv.org/abs/2210.08823

`y = γ ⊙ z + β` behind every linear layer, convolution and norm that has a bias (β needs it to merge into; Swin's reductions have
none), the classifier left out. γ around 1 and β around 0 with a deviation of 0.02 in the paper's code; exactly there by default.
It merges exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import nn

from compressvit import surgery
from compressvit.affine import refuse_tied
from compressvit.backbone import ALL_FAMILIES, describe, head_names
from compressvit.layers.delta import ScaleShift, WithScaleShift
from compressvit.source import Source
from compressvit.transforms.base import LedgerEntry, Plan, Transform, record, transform


class SSFPlan(Plan):
    """A resolved `SSF`: the layers that have a scale and shift behind them."""

    foldable = True
    starts = ("std",)

    layers: tuple[str, ...]
    std: float

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        return record(model, self.layers, lambda path: self._add(model, path))

    def _add(self, model: nn.Module, path: str) -> str:
        layer: Any = model.get_submodule(path)
        # timm's LayerNorm2d normalises the channels of (B, C, H, W), and is a LayerNorm
        first = isinstance(layer, nn.Conv2d) or any(kind.__name__.endswith("2d") for kind in type(layer).__mro__)
        term = ScaleShift(layer.bias.shape[0], first, device=layer.bias.device, dtype=layer.bias.dtype)
        surgery.extend(model, path, WithScaleShift)
        surgery.fill_slot(model, path, "ssf", term)
        return "+ scale and shift"

    @torch.no_grad()
    def initialise(self, student: nn.Module, source: Source) -> None:
        for path in self.layers:
            student.get_submodule(path).ssf.reset(self.std)

    def trains(self, model: nn.Module) -> set[str]:
        return {f"{path}.ssf.{name}" for path in self.layers for name in ("scale", "shift")}

    @torch.no_grad()
    def fold(self, model: nn.Module) -> None:
        """`W' = diag(γ) W`, `b' = γ b + β`, of norms alike."""
        refuse_tied(model, "ssf", [f"{path}.{name}" for path in self.layers for name in ("weight", "bias")])
        for path in self.layers:
            layer: Any = model.get_submodule(path)
            scale, shift = layer.ssf.scale.double(), layer.ssf.shift.double()
            layer.weight.copy_(layer.weight.double() * scale.reshape(-1, *[1] * (layer.weight.ndim - 1)))
            layer.bias.copy_(layer.bias.double() * scale + shift)
            surgery.retract(model, path, WithScaleShift)


@transform("ssf", SSFPlan)
class SSF(Transform):
    """A scale and shift behind every linear layer, convolution and norm; the backbone is frozen (SSF)."""

    freezes = True

    std: float = Field(0.0, ge=0, description="Deviation of their start; the paper's code has 0.02, 0 is the identity.")

    def plan(self, model: nn.Module, source: Source | None = None) -> SSFPlan:
        describe(model, ALL_FAMILIES)
        heads = head_names(model)
        of_steps = surgery.added_modules(model)  # earlier steps' own layers
        layers = tuple(
            path
            for path, layer in model.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d, nn.LayerNorm))
            and getattr(layer, "bias", None) is not None
            and f"{path}.bias" not in heads
            and path not in of_steps
        )
        return SSFPlan(layers=layers, std=self.std)
