"""FacT: the changes of all projections of a frozen ViT as one tensor, factored.

Paper: FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer, AAAI 2023, https://arxiv.org/abs/2212.03145

The projections of a block are cut into M×M slots: q, k, v, the output, and as many of fc1 and of fc2 as the hidden width holds M (12
in all at 4M). `ΔW_j = s·V Σ_j U` with U (r, M) and V (M, r) shared by all blocks of one width; in the tensor-train form (TT) Σ_j is
free, in the Tucker form (TK) `Σ_j = Σ_k p_jk C_k` with a shared C (r, r, r). V is zero at the start. TK of rank 16 on ViT-B: 30,976.
It merges exactly.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from compressvit import surgery, ties
from compressvit.affine import refuse_tied
from compressvit.backbone import describe
from compressvit.errors import UserError
from compressvit.layers.delta import FacTTerm, WithFacT, add_to_weight_
from compressvit.source import Source
from compressvit.transforms.base import LedgerEntry, Plan, Transform, transform

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


class FacTPlan(Plan):
    """A resolved `FacT`: the layers of each width, which share U and V (and C)."""

    foldable = True

    groups: tuple[tuple[str, ...], ...]
    form: Literal["tt", "tk"]
    rank: int
    scale: float

    @property
    def paths(self) -> tuple[str, ...]:
        """Of all layers."""
        return tuple(path for group in self.groups for path in group)

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        before = ties.count_at_paths(model, self.paths)
        texts = {path: self._add(model, path) for path in self.paths}
        shared = ("u", "v", "core") if self.form == "tk" else ("u", "v")
        ties.tie(model, [[f"{path}.fact.{name}" for path in group] for group in self.groups for name in shared])
        after = ties.count_at_paths(model, self.paths)
        return [LedgerEntry(path, texts[path], before[path], after[path]) for path in self.paths]

    def _add(self, model: nn.Module, path: str) -> str:
        layer: Any = model.get_submodule(path)
        width = min(layer.weight.shape)
        on_inputs = layer.weight.shape[1] > width
        term = FacTTerm(
            width,
            self.rank,
            max(layer.weight.shape) // width,
            on_inputs,
            self.scale,
            self.form == "tk",
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )
        surgery.extend(model, path, WithFacT)
        surgery.fill_slot(model, path, "fact", term)
        return f"+ FacT-{self.form.upper()} of rank {self.rank}"

    @torch.no_grad()
    def initialise(self, student: nn.Module, source: Source) -> None:
        for path in self.paths:
            student.get_submodule(path).fact.reset()

    def trains(self, model: nn.Module) -> set[str]:
        return {
            f"{path}.fact.{name}"
            for path in self.paths
            for name, _ in model.get_submodule(path).fact.named_parameters()
        }

    def fold(self, model: nn.Module) -> None:
        """`weight += s·V Σ U`, slot by slot."""
        refuse_tied(model, "fact", [f"{path}.weight" for path in self.paths])
        for path in self.paths:
            layer = model.get_submodule(path)
            add_to_weight_(layer, layer.fact.product())
            surgery.retract(model, path, WithFacT)


@transform("fact", FacTPlan)
class FacT(Transform):
    """Low-rank changes of all projections that share their outer factors; the backbone is frozen (FacT)."""

    freezes = True

    form: Literal["tt", "tk"] = Field("tk", description="Tensor train (a free Σ per slot) or Tucker.")
    rank: int = Field(16, ge=1, description="r.")
    scale: float = Field(1.0, gt=0, description="s; the paper chooses it per task from 0.01, 0.1, 1, 10, 100.")

    def plan(self, model: nn.Module, source: Source | None = None) -> FacTPlan:
        groups = []
        for stage in describe(model).stages:
            for info in stage:
                for name in LAYERS:
                    shape = tuple(model.get_submodule(f"{info.path}.{name}").weight.shape)  # type: ignore[union-attr,arg-type]
                    if min(shape) != info.width or max(shape) % info.width:
                        raise UserError(
                            f"fact cuts projections into {info.width}×{info.width} slots, which {info.path}.{name}, {shape}, is not "
                            "made of; use lora, which takes any shape"
                        )
                    if self.rank > info.width:
                        raise UserError(f"fact.rank={self.rank} is more than the width {info.width} of {info.path}")
            groups.append(tuple(f"{info.path}.{name}" for info in stage for name in LAYERS))
        return FacTPlan(groups=tuple(groups), form=self.form, rank=self.rank, scale=self.scale)
