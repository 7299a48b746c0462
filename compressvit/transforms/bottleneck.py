"""Bottleneck modules beside or after frozen sublayers, and where they are inserted.

Shapes: x is (…, M), or (B, M, height, width) after timm's convolutional MLPs; M width, h hidden neurons of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.fx import wrap

from compressvit.errors import UserError
from compressvit.fitting.reference import Reference
from compressvit.model import surgery
from compressvit.model.backbone import describe, model_name
from compressvit.model.family import BlockInfo
from compressvit.model.linear import ChannelsFirst, weight_shape
from compressvit.transforms.base import Plan
from compressvit.transforms.claims import Claim, slot

wrap("rearrange")  # torch.fx records the call: einops does not take its proxies

Place = Literal["attn", "mlp"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "hard_swish", "leaky_relu", "elu", "tanh"]

Start = Literal["zero", "noise"]

# Parameters without a gradient in the first step of training.
UP_STARTS_AT_ZERO = dict.fromkeys(("down.weight", "down.bias"), "the upper projection of an adapter starts at zero")


class Projection(Protocol):
    """The interface that a bottleneck needs of its projections, in addition to that of a module."""

    def reset(self, *, zero: bool) -> None:
        """Initialise the projection, with `zero` such that its output is zero."""

    def reset_noise(self) -> None:
        """Start from noise, as the reference does."""


class Bottleneck(nn.Module):
    """`s · up(dropout(act(down(x))))`, zero at the start unless it starts from noise: (…, M) → (…, M).

    Args:
        down, up: linear layers M → h and h → M.
        act: name of an activation in timm.
        scale: s; 'learnable' for a parameter that starts at 1.
        reads: for a branch beside the MLP, whether its input is the MLP's ('normed') or the residual stream.
        dropout: of the hidden neurons, in training.
    """

    def __init__(
        self,
        down: nn.Module,
        up: nn.Module,
        act: str = "gelu",
        scale: float | Literal["learnable"] = 1.0,
        reads: Literal["normed", "residual"] = "normed",
        dropout: float = 0.0,
    ):
        from timm.layers import create_act_layer

        super().__init__()
        self.down, self.up = down, up
        self.act = create_act_layer(act)
        like = next(down.parameters())
        self.scale = (
            nn.Parameter(torch.ones((), device=like.device, dtype=like.dtype)) if scale == "learnable" else scale
        )
        self.reads = reads
        self.dropout = nn.Dropout(dropout)

    def dense(self) -> tuple[AdapterLinear, AdapterLinear]:
        """The down and up projections, for a bottleneck whose neurons or weights can be removed."""
        assert isinstance(self.down, AdapterLinear)
        assert isinstance(self.up, AdapterLinear)
        return self.down, self.up

    def reset(self, start: Start = "zero") -> None:
        """Start as zero, with a gradient for the upper projection, or with noise in both projections. A learnable s starts at 1."""
        down, up = cast(Projection, self.down), cast(Projection, self.up)
        if start == "noise":
            down.reset_noise()
            up.reset_noise()
        else:
            down.reset(zero=False)
            up.reset(zero=True)

    def allow_all(self) -> None:
        """Add masks of ones to both projections; their values are then loaded from a file."""
        for projection in self.dense():
            projection.allow_all()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.dropout(self.act(self.down(x)))) * self.scale


class AdapterLinear(nn.Linear):
    """A dense projection of a bottleneck, (…, in) → (…, out). Weights outside the optional `mask` (out, in) stay zero."""

    mask: torch.Tensor | None
    kept: int  # number of ones in a mask on the meta device, which has no values

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.register_buffer("mask", None)

    def allow_all(self) -> None:
        """Add a mask of ones; its values are then loaded from a file."""
        self.mask = torch.ones_like(self.weight, dtype=torch.bool)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight if self.mask is None else self.weight * self.mask, self.bias)

    def reset(self, *, zero: bool) -> None:
        """Initialise the weight to zero, or Kaiming-uniform; the bias is zero in both cases."""
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def reset_noise(self) -> None:
        """Start as MiMi's code does: normal with a standard deviation of 0.02 (and a bias of zero)."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def at_tokens(adapter: nn.Module, x: torch.Tensor, owner: nn.Module) -> torch.Tensor:
    """Apply the adapter to the channels of x, which are the last dimension, except after a convolutional MLP."""
    if isinstance(getattr(owner, "fc1", None), (nn.Conv2d, ChannelsFirst)):
        return rearrange(adapter(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")
    return adapter(x)


class BottleneckPlan(Plan):
    """Base of plans with bottlenecks: by path, the number of neurons of the bottleneck in the slot there (0: it was removed)."""

    slot: ClassVar[str]

    widths: dict[str, int]
    masked: bool = False  # a `sparsify` phase masked single weights

    @property
    def least(self) -> int:
        """Neurons that pruning must leave in every bottleneck."""
        return 0

    def remove(self, model: nn.Module, path: str) -> None:
        """Remove a bottleneck that has no neurons left from the forward pass. Needed where neurons can be pruned."""
        raise TypeError(f"{type(self).__name__} does not define remove")

    def claims(self, model: nn.Module) -> list[Claim]:
        return [slot(path, self.slot) for path in self.widths]

    def bottlenecks(self, model: nn.Module) -> dict[str, Bottleneck]:
        """The bottlenecks that are present, by path."""
        return {path: getattr(model.get_submodule(path), self.slot) for path, hidden in self.widths.items() if hidden}

    def prefix(self, path: str) -> str:
        """The module path of the bottleneck that belongs to `path`."""
        return f"{path}.{self.slot}"

    def put(self, model: nn.Module, path: str, bottleneck: Bottleneck) -> None:
        """Put a bottleneck into the slot at `path`."""
        if self.masked:
            bottleneck.allow_all()
        surgery.fill_slot(model, path, self.slot, bottleneck)

    @torch.no_grad()
    def initialise(self, student: nn.Module, reference: Reference) -> None:
        for bottleneck in self.bottlenecks(student).values():
            bottleneck.reset()

    def trains(self, model: nn.Module) -> set[str]:
        return {
            f"{self.prefix(path)}.{name}"
            for path, bottleneck in self.bottlenecks(model).items()
            for name, _ in bottleneck.named_parameters(remove_duplicate=False)
        }


def sublayer_width(model: nn.Module, path: str) -> tuple[torch.Tensor, int]:
    """A tensor of the sublayer at `path` (for its device and dtype), and the sublayer's width M."""
    sublayer = model.get_submodule(path)
    last = sublayer.get_submodule("proj" if hasattr(sublayer, "proj") else "fc2")
    return next(last.parameters()), weight_shape(last)[0]


def adapter_widths(
    model: nn.Module,
    asker: str,
    blocks: Sequence[BlockInfo],
    places: Sequence[Place],
    width: int | None,
    ratio: float | None,
) -> dict[str, int]:
    """Neurons of the bottleneck after every sublayer of these blocks: `width` everywhere, or `ratio` of each one's M.

    Raises:
        UserError: a block has none of these sublayers, or the ratio leaves no neuron.
    """
    backbone = describe(model)
    parts = [part for part in backbone.parts if part in places]
    if not parts:
        raise UserError(
            f"{asker}.places asks for {', '.join(places)}, but the blocks of {model_name(model)} have {', '.join(backbone.parts)}"
        )
    widths: dict[str, int] = {}
    for info in blocks:
        hidden = width if width is not None else int(info.width * (ratio or 0) + 1e-9)
        if hidden < 1:
            least = -(-10_000 // info.width) / 10_000  # rounded up, so that the ratio is still reached
            raise UserError(
                f"{asker}.ratio={ratio:g} of the {info.width} channels of {info.path} leaves no neuron; give at least {least}"
            )
        widths |= {f"{info.path}.{part}": hidden for part in parts}
    return widths
