"""AdaptFormer: a scaled bottleneck parallel to every MLP of a frozen backbone.

Paper: AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition, NeurIPS 2022, https://arxiv.org/abs/2205.13535

`y = u + DP(MLP(LN2 u)) + s·(ReLU(v Dᵀ + b_D) Uᵀ + b_U)`, where v is `LN2 u` in the paper and u itself in its code. D Kaiming, the rest
zero, so the model is unchanged at the start. 2·M·h' + h' + M parameters a block. It cannot be merged: ReLU, and parallel to the MLP.
In ConvNeXt, u is the block's input and `LN u` what the MLP reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.moments import Reference
from compressvit.model import surgery
from compressvit.model.backbone import describe
from compressvit.model.family import Need
from compressvit.transforms.base import LedgerEntry, Transform, record, transform
from compressvit.transforms.bottleneck import (
    UP_STARTS_AT_ZERO,
    AdapterLinear,
    Bottleneck,
    BottleneckPlan,
    sublayer_width,
)

Reads = Literal["normed", "residual"]


class AdaptFormerPlan(BottleneckPlan):
    """A resolved `AdaptFormer`, by path of a block."""

    prunable = True
    slot = "adaptformer"

    scale: float | Literal["learnable"]
    reads: Reads

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        slotted = describe(model, "slotted_block").slotted_block
        paths = [path for path, hidden in self.widths.items() if hidden]
        return record(model, paths, lambda path: self._add(model, path, slotted))

    def _add(self, model: nn.Module, path: str, slotted: type[nn.Module]) -> str:
        like, width = sublayer_width(model, f"{path}.mlp")
        hidden, device, dtype = self.widths[path], like.device, like.dtype
        down = AdapterLinear(width, hidden, device=device, dtype=dtype)
        up = AdapterLinear(hidden, width, device=device, dtype=dtype)
        surgery.specialise(model, path, slotted)
        self.put(model, path, Bottleneck(down, up, "relu", self.scale, self.reads))
        return f"+ parallel bottleneck of {hidden}, scale {self.scale}"

    @property
    def least(self) -> int:
        """One: the bias of the upper projection has no other place."""
        return 1

    def remove(self, model: nn.Module, path: str) -> None:
        """Take a branch without neurons out of the forward pass."""
        model.get_submodule(path).register_module("adaptformer", None)

    def fold(self, model: nn.Module) -> None:
        raise UserError(
            "adaptformer cannot be folded: its branch has a ReLU and runs parallel to the MLP. Ship the artifact as it is, or adapt "
            "with repadapter, lora, ssf or fact, which can be"
        )


@transform("adaptformer", AdaptFormerPlan)
class AdaptFormer(Transform):
    """A scaled bottleneck parallel to every MLP; the backbone is frozen (AdaptFormer)."""

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
        description="Input of the branch: the MLP's normalised input (the paper), or the residual stream (its code).",
    )

    @classmethod
    def examples(cls) -> Sequence[Transform]:
        return (AdaptFormer(width=4), AdaptFormer(width=3, scale="learnable", input="residual"))

    def plan(self, model: nn.Module, reference: Reference | None = None) -> AdaptFormerPlan:
        widths = {info.path: self.width for info in self.backbone(model).blocks}
        return AdaptFormerPlan(widths=widths, scale=self.scale, reads=self.input)
