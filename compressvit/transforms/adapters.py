"""Bottleneck adapters: two small projections behind every attention and every MLP of a frozen backbone.

Paper: Parameter-Efficient Transfer Learning for NLP, ICML 2019, https://arxiv.org/abs/1902.00751; in the form of MiMi,
WACV 2024, https://arxiv.org/abs/2311.03873

`A(h) = h + act(h Dᵀ) Uᵀ` on what leaves a sublayer, before LayerScale and the outer residual; D (h', M), U (M, h'), U zero at the
start, so the model is unchanged. 2·M·h' parameters each, without biases. A ConvNeXt block has one, behind its MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from compressvit import surgery
from compressvit.backbone import ALL_FAMILIES, describe, model_name
from compressvit.errors import UserError
from compressvit.layers.adapter import AdapterLinear, Bottleneck, WithAdapter
from compressvit.source import Source
from compressvit.transforms.base import LedgerEntry, Plan, Transform, record, transform

Place = Literal["attn", "mlp"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "hard_swish", "leaky_relu", "elu", "tanh"]


class BottleneckPlan(Plan):
    """What all plans of bottlenecks have: by path, how many neurons the one in the path's slot has (0: it is gone)."""

    slot: ClassVar[str]

    widths: dict[str, int]
    masked: bool = False  # a `sparsify` phase masked single weights

    def bottlenecks(self, model: nn.Module) -> dict[str, Bottleneck]:
        """Those that are there, by path."""
        return {path: getattr(model.get_submodule(path), self.slot) for path, hidden in self.widths.items() if hidden}

    def prefix(self, path: str) -> str:
        """Where the bottleneck of a path has its own name."""
        return f"{path}.{self.slot}"

    def put(self, model: nn.Module, path: str, bottleneck: Bottleneck) -> None:
        """Fill the slot at `path`."""
        if self.masked:
            bottleneck.allow_all()
        surgery.fill_slot(model, path, self.slot, bottleneck)

    @torch.no_grad()
    def initialise(self, student: nn.Module, source: Source) -> None:
        for bottleneck in self.bottlenecks(student).values():
            bottleneck.down.reset(zero=False)  # type: ignore[operator]
            bottleneck.up.reset(zero=True)  # type: ignore[operator]

    def trains(self, model: nn.Module) -> set[str]:
        return {
            f"{self.prefix(path)}.{name}"
            for path, bottleneck in self.bottlenecks(model).items()
            for name, _ in bottleneck.named_parameters(remove_duplicate=False)
        }


class AdaptersPlan(BottleneckPlan):
    """Resolved adapters, by path of a sublayer."""

    prunable = True
    slot = "adapter"

    bias: bool
    act: str

    def bottleneck(self, model: nn.Module, path: str, hidden: int) -> Bottleneck:
        """A fresh adapter for the sublayer at `path`."""
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

    @property
    def least(self) -> int:
        """Neurons that pruning must leave in every adapter: the bias of the upper projection has no other place."""
        return int(self.bias)

    def remove(self, model: nn.Module, path: str) -> None:
        """Take an adapter without neurons out of the forward pass."""
        surgery.retract(model, path, WithAdapter)

    def fold(self, model: nn.Module) -> Plan | None:
        raise UserError(
            f"{self.transform} cannot be folded: the activation between the two projections has no counterpart in a linear layer. "
            "Ship the artifact as it is, or adapt with repadapter, lora, ssf or fact, which can be"
        )


def sublayer_width(model: nn.Module, path: str) -> tuple[torch.Tensor, int]:
    """A tensor of the sublayer at `path` (for its device and type), and its width M."""
    sublayer = model.get_submodule(path)
    last: Any = sublayer.proj if hasattr(sublayer, "proj") else sublayer.fc2
    return last.weight, last.weight.shape[0]


def adapter_widths(
    model: nn.Module, asker: str, places: Sequence[Place], width: int | None, ratio: float | None
) -> dict[str, int]:
    """Neurons of the bottleneck behind every sublayer: `width` everywhere, or `ratio` of each one's M.

    Raises:
        UserError: a block has none of the places, or the ratio leaves no neuron.
    """
    backbone = describe(model, ALL_FAMILIES)
    parts = [part for part in backbone.parts if part in places]
    if not parts:
        raise UserError(
            f"{asker}.places asks for {', '.join(places)}, but the blocks of {model_name(model)} have {', '.join(backbone.parts)}"
        )
    widths: dict[str, int] = {}
    for info in backbone.blocks:
        hidden = width if width is not None else int(info.width * (ratio or 0) + 1e-9)
        if hidden < 1:
            least = -(-10_000 // info.width) / 10_000  # rounded up, so that it is enough
            raise UserError(
                f"{asker}.ratio={ratio:g} of the {info.width} channels of {info.path} leaves no neuron; give at least {least}"
            )
        widths |= {f"{info.path}.{part}": hidden for part in parts}
    return widths


@transform("adapters", AdaptersPlan)
class Adapters(Transform):
    """Bottleneck adapters behind attention and MLP; the backbone is frozen. What MiMi's `prune` starts from."""

    freezes = True

    width: int | None = Field(None, ge=1, description="Neurons h' of every adapter (uniform). Or give `ratio`.")
    ratio: float | None = Field(
        None, gt=0, description="Neurons as a share of the block's width M (proportional); 1/8 where neither is given."
    )
    places: tuple[Place, ...] = Field(
        ("attn", "mlp"), min_length=1, description="Sublayers that get one, of those that a block has."
    )
    bias: bool = Field(False, description="Biases of the projections; the reference has none.")
    act: Activation = Field("gelu", description="timm's name of the activation between them.")

    @model_validator(mode="after")
    def _one_of_two(self) -> Adapters:
        if self.width is not None and self.ratio is not None:
            raise ValueError(f"width={self.width} and ratio={self.ratio:g} are both given; remove one of them")
        return self

    def plan(self, model: nn.Module, source: Source | None = None) -> AdaptersPlan:
        ratio = 1 / 8 if self.ratio is None else self.ratio
        widths = adapter_widths(model, "adapters", self.places, self.width, ratio)
        return AdaptersPlan(widths=widths, bias=self.bias, act=self.act)
