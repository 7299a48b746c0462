"""AdaptFormer: a scaled bottleneck parallel to the MLPs of a frozen backbone, or after them.

Paper: AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition, NeurIPS 2022, https://arxiv.org/abs/2205.13535

`y = u + DP(MLP(LN2 u)) + s·(ReLU(v Dᵀ + b_D) Uᵀ + b_U)`, where v is `LN2 u` in the paper and u itself in its code. D is Kaiming-uniform
as in the code or, with `init: normal`, Kaiming-normal as in the paper; the rest is zero, so the model is unchanged at the start. In
training, dropout after the ReLU, as in the code. 2·M·h' + h' + M parameters a block. It cannot be merged: ReLU, and parallel to the MLP.
The serial form of the paper's ablation is the same bottleneck after the MLP: `m = MLP(LN2 u)`,
`y = u + DP(m + s·(ReLU(m Dᵀ + b_D) Uᵀ + b_U))`.
In ConvNeXt, u is the block's input and `LN u` what the MLP reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.reference import Reference
from compressvit.model import surgery
from compressvit.model.backbone import describe
from compressvit.model.family import Need
from compressvit.transforms.base import LedgerEntry, record, transform
from compressvit.transforms.bottleneck import (
    UP_STARTS_AT_ZERO,
    AdapterLinear,
    Bottleneck,
    BottleneckPlan,
    at_tokens,
    sublayer_width,
)
from compressvit.transforms.on_blocks import OnBlocks

Reads = Literal["normed", "residual"]
Form = Literal["parallel", "serial"]


class WithAdaptFormer(surgery.Mixin):
    """Of an MLP, in the serial form: `m + adaptformer(m)` on what leaves it, before LayerScale and the outer residual."""

    slots = ("adaptformer",)

    adaptformer: nn.Module | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        m = super().forward(x)
        return m if self.adaptformer is None else m + at_tokens(self.adaptformer, m, self)


class AdaptFormerPlan(BottleneckPlan):
    """A resolved `AdaptFormer`, by path of a block, or in the serial form of an MLP."""

    prunable = True
    slot = "adaptformer"
    starts = ("init",)

    scale: float | Literal["learnable"]
    reads: Reads
    dropout: float = 0.0  # of artifacts that do not say
    form: Form = "parallel"
    init: Literal["uniform", "normal"] = "uniform"

    @torch.no_grad()
    def initialise(self, student: nn.Module, reference: Reference) -> None:
        super().initialise(student, reference)
        if self.init == "normal":
            for bottleneck in self.bottlenecks(student).values():
                nn.init.kaiming_normal_(bottleneck.dense()[0].weight)

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        paths = [path for path, hidden in self.widths.items() if hidden]
        return record(model, paths, lambda path: self._add(model, path))

    def _add(self, model: nn.Module, path: str) -> str:
        like, width = sublayer_width(model, f"{path}.mlp" if self.form == "parallel" else path)
        hidden, device, dtype = self.widths[path], like.device, like.dtype
        down = AdapterLinear(width, hidden, device=device, dtype=dtype)
        up = AdapterLinear(hidden, width, device=device, dtype=dtype)
        if self.form == "parallel":
            surgery.specialise(model, path, describe(model, "slotted_block").slotted_block)
        else:
            surgery.extend(model, path, WithAdaptFormer)
        self.put(model, path, Bottleneck(down, up, "relu", self.scale, self.reads, self.dropout))
        return f"+ {self.form} bottleneck of {hidden}, scale {self.scale}"

    @property
    def least(self) -> int:
        """1: the up projection's bias needs the layer to exist."""
        return 1

    def remove(self, model: nn.Module, path: str) -> None:
        """Take a branch without neurons out of the forward pass."""
        if self.form == "parallel":
            model.get_submodule(path).register_module("adaptformer", None)
        else:
            surgery.retract(model, path, WithAdaptFormer)

    def fold(self, model: nn.Module) -> None:
        parallel = " and runs parallel to the MLP" if self.form == "parallel" else ""
        raise UserError(
            f"adaptformer cannot be folded: its branch has a ReLU{parallel}. Ship the artifact as it is, or adapt "
            "with repadapter, lora, ssf or fact, which can be"
        )


@transform("adaptformer", AdaptFormerPlan)
class AdaptFormer(OnBlocks):
    """A scaled bottleneck parallel to the MLP, or after it; the backbone is frozen (AdaptFormer)."""

    freezes = True
    needs: ClassVar[tuple[Need, ...]] = ("slotted_block",)
    blind_at_start: ClassVar[dict[str, str]] = {
        **UP_STARTS_AT_ZERO,
        "adaptformer.scale": "what it scales starts at zero",
    }

    width: int = Field(64, ge=1, description="Neurons h' of every branch.")
    scale: Annotated[float, Field(gt=0)] | Literal["learnable"] = Field(
        0.1, description="s: a number, or learnable (one per block, initially 1)."
    )
    input: Reads = Field(
        "normed",
        description="Input of the parallel branch: the MLP's normalised input (the paper), or the residual stream (its code).",
    )
    dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Dropout after the ReLU, in training; 0.1 in the released code, not mentioned in the paper.",
    )
    form: Form = Field(
        "parallel",
        description="parallel: beside the MLP, as in the paper; serial: after the MLP, before LayerScale and the residual (its ablation).",
    )

    init: Literal["uniform", "normal"] = Field(
        "uniform",
        description="Start of the lower projection's weight. uniform: Kaiming-uniform within ±1/√M, as in the released code; normal: "
        "Kaiming-normal of std √(2/M), as the paper says. The rest starts at zero in both.",
    )

    @model_validator(mode="after")
    def _serial_reads_the_mlp(self) -> AdaptFormer:
        if self.form == "serial" and self.input == "residual":
            raise ValueError("form: serial reads what leaves the MLP; leave out input: residual, or use form: parallel")
        return self

    def needed(self) -> tuple[Need, ...]:
        return self.needs if self.form == "parallel" else ("blocks",)

    @classmethod
    def examples(cls) -> Sequence[AdaptFormer]:
        return (
            AdaptFormer(width=4),
            AdaptFormer(width=3, scale="learnable", input="residual", blocks=(0, "0-1")),
            AdaptFormer(width=4, form="serial", stages=(0,)),
        )

    def plan(self, model: nn.Module, reference: Reference | None = None) -> AdaptFormerPlan:
        path_of = "{}" if self.form == "parallel" else "{}.mlp"
        return AdaptFormerPlan(
            widths={path_of.format(info.path): self.width for info in self.chosen(model)},
            scale=self.scale,
            reads=self.input,
            dropout=self.dropout,
            form=self.form,
            init=self.init,
        )
