"""Bottleneck adapters: two small projections after every attention and every MLP of a frozen backbone.

Paper: Parameter-Efficient Transfer Learning for NLP, ICML 2019, https://arxiv.org/abs/1902.00751; in the form of MiMi,
WACV 2024, https://arxiv.org/abs/2311.03873

`A(h) = h + act(h Dᵀ) Uᵀ` is applied to the output of a sublayer, before LayerScale and the outer residual; D is (h', M), U is (M, h').
U is initialised to zero, so the model starts unchanged. Each adapter has 2·M·h' parameters without biases. A ConvNeXt block has one,
after its MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.reference import Reference
from compressvit.model import surgery
from compressvit.transforms.base import LedgerEntry, Plan, Transform, record, transform
from compressvit.transforms.bottleneck import (
    UP_STARTS_AT_ZERO,
    Activation,
    AdapterLinear,
    Bottleneck,
    BottleneckPlan,
    Place,
    Start,
    adapter_widths,
    at_tokens,
    sublayer_width,
)
from compressvit.transforms.on_blocks import OnBlocks


class WithAdapter(surgery.Mixin):
    """Mixin for a sublayer (attention, MLP): `A(h) = h + adapter(h)` on its output, before LayerScale and the outer residual."""

    slots = ("adapter",)

    adapter: nn.Module | None

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        h = super().forward(x, *args, **kwargs)
        return h if self.adapter is None else h + at_tokens(self.adapter, h, self)


class AdaptersPlan(BottleneckPlan):
    """Resolved `Adapters`, by path of the sublayer."""

    prunable = True
    slot = "adapter"
    starts = ("init",)
    left = (
        "the Kronecker products became dense matrices; the adapters keep their activation, so this is an artifact with dense `adapters`, "
        "not a plain timm model"
    )

    bias: bool
    act: str
    init: Start = "zero"

    def bottleneck(self, model: nn.Module, path: str, hidden: int) -> Bottleneck:
        """A new adapter for the sublayer at `path`."""
        like, width = sublayer_width(model, path)
        options: dict[str, Any] = {"bias": self.bias, "device": like.device, "dtype": like.dtype}
        return Bottleneck(AdapterLinear(width, hidden, **options), AdapterLinear(hidden, width, **options), self.act)

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        paths = [path for path, hidden in self.widths.items() if hidden]
        return record(model, paths, lambda path: self._add(model, path))

    def _add(self, model: nn.Module, path: str) -> str:
        surgery.extend(model, path, WithAdapter)
        self.put(model, path, self.bottleneck(model, path, self.widths[path]))
        return f"+ {self.transform} bottleneck of {self.widths[path]}"

    @torch.no_grad()
    def initialise(self, student: nn.Module, reference: Reference) -> None:
        for bottleneck in self.bottlenecks(student).values():
            bottleneck.reset(self.init)

    @property
    def least(self) -> int:
        """Neurons that pruning must leave in every adapter: 1 with biases, because the up projection's bias needs the layer to exist."""
        return int(self.bias)

    def remove(self, model: nn.Module, path: str) -> None:
        """Remove an adapter that has no neurons left from the forward pass."""
        surgery.retract(model, path, WithAdapter)

    def fold(self, model: nn.Module) -> Plan | None:
        raise UserError(
            f"{self.transform} cannot be folded: the activation between the two projections has no counterpart in a linear layer. "
            "Ship the artifact as it is, or adapt with repadapter, lora, ssf or fact, which can be"
        )


@transform("adapters", AdaptersPlan)
class Adapters(OnBlocks):
    """Bottleneck adapters after attention and MLP; the backbone is frozen. MiMi's `prune` starts from them."""

    freezes = True
    blind_at_start: ClassVar[dict[str, str]] = UP_STARTS_AT_ZERO

    width: int | None = Field(
        None, ge=1, description="Neurons h' of every adapter (uniform). Alternatively give `ratio`."
    )
    ratio: float | None = Field(
        None, gt=0, description="Neurons as a share of the block's width M (proportional); 1/8 if neither is given."
    )
    places: tuple[Place, ...] = Field(
        ("attn", "mlp"),
        min_length=1,
        description="Sublayers that get an adapter, where a block has them. MiMi's released ViT counts the adapters of attention, but "
        "never calls them; here both act.",
    )
    bias: bool = Field(False, description="Whether the projections have biases; the reference has none.")
    act: Activation = Field("gelu", description="timm's name of the activation between the projections.")
    init: Start = Field(
        "zero",
        description="zero: the upper projection is zero, so the model is unchanged at the start (the lower one is uniform within ±1/√M). "
        "noise: both projections normal with std 0.02, as in MiMi's released code, which changes the model.",
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Adapters:
        if self.width is not None and self.ratio is not None:
            raise ValueError(f"width={self.width} and ratio={self.ratio:g} are both given; remove one of them")
        return self

    @classmethod
    def examples(cls) -> Sequence[Transform]:
        return (
            Adapters(ratio=0.25),
            Adapters(width=3, places=("mlp",), bias=True, act="relu"),
            Adapters(width=4, blocks=("0-0", 1)),
        )

    def plan(self, model: nn.Module, reference: Reference | None = None) -> AdaptersPlan:
        ratio = 1 / 8 if self.ratio is None else self.ratio
        widths = adapter_widths(model, "adapters", self.chosen(model), self.places, self.width, ratio)
        return AdaptersPlan(widths=widths, bias=self.bias, act=self.act, init=self.init)
