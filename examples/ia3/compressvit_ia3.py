"""IA³: learned scales of the keys, the values and the hidden layer of the MLP of a frozen backbone.

Paper: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, NeurIPS 2022,
https://arxiv.org/abs/2205.05638, section 3.3

`softmax(q (l_k ⊙ k)ᵀ) (l_v ⊙ v)` in attention and `(l_ff ⊙ γ(x W1)) W2` in the MLP. All scales are initialised to one, so the
model starts unchanged. 2·M + hidden parameters per block of width M. The scales merge exactly, into the rows of qkv and the columns of fc2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from compressvit.fitting.reference import Reference
from compressvit.model.backbone import projection
from compressvit.model.linear import weight_shape
from compressvit.transforms.base import Transform, transform
from compressvit.transforms.term import TermPlan, new_like


class Scales(nn.Module):
    """`l ⊙ x` over the last `channels` channels of x, (…, C) → (…, C); the channels before them (queries) are unchanged.

    Args:
        channels: number of scaled channels.
        on_inputs: whether x is the input of the layer, instead of its output.
    """

    def __init__(self, channels: int, on_inputs: bool, device=None, dtype=None):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.on_inputs = on_inputs

    def reset(self) -> None:
        """Set all scales to one, the identity."""
        nn.init.ones_(self.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x.shape[-1] - len(self.scale)
        return torch.cat([x[..., :kept], x[..., kept:] * self.scale], dim=-1)


class WithScales:
    """Mixin for a linear layer: scales its inputs or outputs."""

    slots = ("ia3",)
    ia3: Scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.ia3.on_inputs:
            return super().forward(self.ia3(x))  # type: ignore[misc]
        return self.ia3(super().forward(x))  # type: ignore[misc]


class IA3Plan(TermPlan):
    """A resolved `IA3`: the layers that give keys and values, one `qkv` or one for each, and those that read the hidden neurons."""

    mixin = WithScales
    slot = "ia3"

    qkv: tuple[str, ...]
    fc2: tuple[str, ...]

    @property
    def sites(self) -> Iterable[str]:
        return (*self.qkv, *self.fc2)

    def term(self, module: Any, path: str) -> tuple[nn.Module, str]:
        (outputs, inputs), like = weight_shape(module), new_like(next(module.parameters()))
        if path in self.qkv:
            fused = path.endswith(".qkv")
            return Scales(outputs * 2 // 3 if fused else outputs, False, **like), "+ scales of keys and values"
        return Scales(inputs, True, **like), "+ scales of the hidden neurons"

    def folds_into(self, path: str) -> list[str]:
        return [f"{path}.weight", f"{path}.bias"] if path in self.qkv else [f"{path}.weight"]

    def fold_term(self, module: Any, term: Any, path: str) -> None:
        """Multiply the rows of qkv and its bias, or the columns of fc2, by their scales."""
        outputs, inputs = module.weight.shape
        scale = term(torch.ones(inputs if term.on_inputs else outputs).to(module.weight)).double()
        weight = module.weight.double()
        module.weight.copy_(weight * (scale if term.on_inputs else scale[:, None]))
        if module.bias is not None and not term.on_inputs:
            module.bias.copy_(module.bias.double() * scale)


@transform("ia3", IA3Plan)
class IA3(Transform):
    """Learned scales of keys, values and the hidden layer of the MLP; the backbone is frozen (IA³)."""

    freezes = True
    needs = ("attention",)

    def plan(self, model: nn.Module, reference: Reference | None = None) -> IA3Plan:
        blocks = self.backbone(model).blocks
        qkv = [
            f"{info.path}.{name}" for info in blocks for name in info.projections[-2:]
        ]  # without queries of their own
        fc2 = [f"{info.path}.mlp.fc2" for info in blocks]
        for path in (*qkv, *fc2):
            projection(model, path, "ia3")  # whose message says what a block has instead
        return IA3Plan(qkv=tuple(qkv), fc2=tuple(fc2))
