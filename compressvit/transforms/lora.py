"""LoRA: low-rank terms on projections of a frozen backbone, by default on queries and values.

Paper: LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, https://arxiv.org/abs/2106.09685

`W + (α/r) B A`, with A (r, in) initialised Kaiming-uniform and B (out, r) to zero. timm fuses q, k and v in one layer, in which q and v
have separate factors. ConvNeXt has no attention: use `targets: [fc1, fc2]`. The term merges exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.reference import Reference
from compressvit.model import surgery
from compressvit.model.backbone import model_name, projection
from compressvit.model.calls import layers_for
from compressvit.model.linear import weight_shape
from compressvit.transforms.base import Transform, transform
from compressvit.transforms.on_blocks import OnBlocks
from compressvit.transforms.term import TermPlan, add_to_weight_, new_like, with_term

Target = Literal["q", "k", "v", "proj", "fc1", "fc2"]
_PLACE = {"q": "attn.qkv", "k": "attn.qkv", "v": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


class LoRATerm(nn.Module):
    """`scale · up_p down_p` for some of the equal parts of a projection's outputs, such as q and v of a fused qkv.

    Args:
        in_features: of the projection.
        part_features: outputs of one part.
        rank: r.
        parts: indices of the parts that have a term, out of `num_parts`.
        scale: α / r.
    """

    def __init__(
        self,
        in_features: int,
        part_features: int,
        rank: int,
        parts: tuple[int, ...],
        num_parts: int,
        scale: float,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.down = nn.Parameter(torch.empty(len(parts), rank, in_features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(len(parts), part_features, rank, device=device, dtype=dtype))
        self.parts, self.num_parts, self.scale = parts, num_parts, scale

    @torch.no_grad()
    def reset(self) -> None:
        """Initialise `down` Kaiming-uniform and `up` to zero."""
        for matrix in self.down:
            nn.init.kaiming_uniform_(matrix, a=5**0.5)
        nn.init.zeros_(self.up)

    def product(self) -> torch.Tensor:  # (out, in)
        return self._spread(self.scale * self.up @ self.down, dim=0).flatten(0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.einsum("...i,pri->...pr", x, self.down)
        out = torch.einsum("...pr,por->...po", hidden, self.up) * self.scale
        return self._spread(out, dim=-2).flatten(-2)

    def _spread(self, parts: torch.Tensor, dim: int) -> torch.Tensor:
        """Fill in zeros for the parts without a term."""
        if len(self.parts) == self.num_parts:
            return parts
        taken = {part: parts.select(dim, i) for i, part in enumerate(self.parts)}
        empty = torch.zeros_like(taken[self.parts[0]])
        return torch.stack([taken.get(p, empty) for p in range(self.num_parts)], dim=dim)


class WithLoRA(surgery.Mixin):
    """Mixin for a linear layer or 1×1 convolution: `y + lora(x)`."""

    slots = ("lora",)

    lora: nn.Module | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return with_term(super().forward(x), x, self.lora, self)


class LoRAPlan(TermPlan):
    """A resolved `LoRA`: by layer path, the parts of its outputs that have a term (thirds of a fused qkv; `[0]` for any other layer)."""

    mixin = WithLoRA
    slot = "lora"

    layers: dict[str, tuple[int, ...]]
    rank: int
    alpha: float

    @property
    def sites(self) -> Iterable[str]:
        return self.layers

    def term(self, module: nn.Module, path: str) -> tuple[nn.Module, str]:
        pieces = 3 if path.endswith(".qkv") else 1
        outputs, inputs = weight_shape(module)
        which, scale = self.layers[path], self.alpha / self.rank
        term = LoRATerm(
            inputs, outputs // pieces, self.rank, which, pieces, scale, **new_like(next(module.parameters()))
        )
        return term, f"+ LoRA of rank {self.rank}" + (f" on {', '.join('qkv'[p] for p in which)}" * (pieces > 1))

    def fold_term(self, module: nn.Module, term: Any, path: str) -> None:
        """`weight += (α/r) B A`."""
        add_to_weight_(module, term.product())


@transform("lora", LoRAPlan)
class LoRA(OnBlocks):
    """Low-rank terms on projections; the backbone is frozen (LoRA)."""

    freezes = True
    blind_at_start: ClassVar[dict[str, str]] = {"lora.down": "the factor after it starts at zero"}

    rank: int = Field(8, ge=1, description="Rank r of every term.")
    alpha: float | None = Field(None, gt=0, description="Terms are scaled by α/r. Null for α = r.")
    targets: tuple[Target, ...] = Field(
        ("q", "v"), min_length=1, description="Projections that get a term, where a block has them."
    )

    @classmethod
    def examples(cls) -> Sequence[Transform]:
        return (LoRA(rank=2, targets=("v", "fc1", "fc2")), LoRA(rank=2, alpha=1.0, targets=("fc1",)))

    def plan(self, model: nn.Module, reference: Reference | None = None) -> LoRAPlan:
        backbone = self.backbone(model)
        layers: dict[str, tuple[int, ...]] = {}
        sites = {t: _PLACE[t] for t in self.targets if _PLACE[t].partition(".")[0] in backbone.parts}
        if not sites:
            raise UserError(
                f"lora.targets: {', '.join(self.targets)} are projections of attention, which the blocks of {model_name(model)} do not "
                "have; they have fc1, fc2"
            )
        for info in self.chosen(model):
            for target, place in sites.items():
                names = layers_for(model.get_submodule(info.path), place)
                part = "qkv".index(target) if place == "attn.qkv" else 0
                if place == "attn.qkv" and len(names) > 1:  # a layer for each
                    names, part = names[part : part + 1], 0
                for path in (f"{info.path}.{name}" for name in names):
                    shape = weight_shape(projection(model, path, "lora.targets"))
                    if self.rank > min(shape):
                        raise UserError(
                            f"lora.rank={self.rank} is more than {path}, {shape}, can have; the largest is {min(shape)}"
                        )
                    layers[path] = tuple(sorted({*layers.get(path, ()), part}))
        return LoRAPlan(layers=layers, rank=self.rank, alpha=self.alpha or float(self.rank))
