"""RepAdapter: linear adapters before the projections of a frozen backbone, which merge into them: no cost at inference.

Paper: Towards Efficient Visual Adaption via Structural Re-parameterization, https://arxiv.org/abs/2302.08106

`φ(x) = x + s·(B(A x + a) + b)` on what enters attention and MLP (`place: block`) or attention alone; A (h', M), B in g groups, no
activation, dropout between the two in training. A Xavier, the rest zero: the identity at the start. M·h' + h' + M·h'/g + M
parameters each. In ConvNeXt φ sits between the norm and the MLP: before the depth-wise convolution it would make that one dense.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from compressvit import surgery
from compressvit.affine import merge_before_, refuse_tied
from compressvit.backbone import ALL_FAMILIES, describe, model_name
from compressvit.errors import UserError
from compressvit.layers.adapter import RepBottleneck, WithRepAdapter
from compressvit.source import Source
from compressvit.transforms.base import LedgerEntry, Plan, Transform, record, transform

FIRST_LAYER = {"attn": "qkv", "mlp": "fc1"}  # of a sublayer: what φ merges into


class RepAdapterPlan(Plan):
    """A resolved `RepAdapter`: the sublayers that have one."""

    foldable = True
    folds_last = True  # `W R` is of the whole W, with what other steps add to it

    paths: tuple[str, ...]
    width: int
    groups: int
    scale: float
    dropout: float

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        return record(model, self.paths, lambda path: self._add(model, path))

    def _add(self, model: nn.Module, path: str) -> str:
        first: Any = model.get_submodule(f"{path}.{_first(path)}")
        adapter = RepBottleneck(
            first.weight.shape[1],
            self.width,
            self.groups,
            self.scale,
            self.dropout,
            device=first.weight.device,
            dtype=first.weight.dtype,
        )
        surgery.extend(model, path, WithRepAdapter)
        surgery.fill_slot(model, path, "repadapter", adapter)
        return f"+ linear bottleneck of {self.width} in {self.groups} groups, scale {self.scale:g}"

    @torch.no_grad()
    def initialise(self, student: nn.Module, source: Source) -> None:
        for path in self.paths:
            student.get_submodule(path).repadapter.reset()

    def trains(self, model: nn.Module) -> set[str]:
        return {f"{path}.repadapter.{name}" for path in self.paths
                for name, _ in model.get_submodule(path).repadapter.named_parameters()}  # fmt: skip

    def fold(self, model: nn.Module) -> None:
        """Merge every φ into the projection behind it: `W' = W R`, `b' = b + W c` with `φ(x) = R x + c`."""
        refuse_tied(model, "repadapter", [f"{path}.{_first(path)}.weight" for path in self.paths])
        for path in self.paths:
            sublayer = model.get_submodule(path)
            merge_before_(sublayer.get_submodule(_first(path)), *sublayer.repadapter.as_affine())
            surgery.retract(model, path, WithRepAdapter)


def _first(path: str) -> str:
    return FIRST_LAYER[path.rpartition(".")[2]]


@transform("repadapter", RepAdapterPlan)
class RepAdapter(Transform):
    """Linear adapters before attention and MLP, merged into the projections for inference (RepAdapter)."""

    freezes = True

    width: int = Field(8, ge=1, description="Hidden neurons h'.")
    groups: int = Field(2, ge=1, description="Groups g of the second projection; divides h' and M.")
    scale: float = Field(1.0, gt=0, description="s; the paper chooses it per task from 0.1, 0.5, 1, 5, 10.")
    place: Literal["block", "attention"] = Field("block", description="Before attention and MLP, or attention alone.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Between the projections, in training.")

    def plan(self, model: nn.Module, source: Source | None = None) -> RepAdapterPlan:
        backbone = describe(model, ALL_FAMILIES)
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
        return RepAdapterPlan(paths=paths, width=self.width, groups=self.groups, scale=self.scale, dropout=self.dropout)
