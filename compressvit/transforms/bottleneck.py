"""Bottlenecks beside frozen sublayers, and the places where they act.

Shapes: x is (…, M), or (B, M, height, width) after timm's convolutional MLPs; M width, h hidden neurons of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.moments import Reference
from compressvit.model import surgery
from compressvit.model.backbone import describe, model_name
from compressvit.model.linear import ChannelsFirst, weight_shape
from compressvit.transforms.base import Plan
from compressvit.transforms.claims import Claim, slot

Place = Literal["attn", "mlp"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "hard_swish", "leaky_relu", "elu", "tanh"]

# Parameters without a gradient in the first step of training.
UP_STARTS_AT_ZERO = dict.fromkeys(("down.weight", "down.bias"), "the upper projection of an adapter starts at zero")


class Projection(Protocol):
    """The methods that a bottleneck needs from its projections, besides those of modules."""

    def reset(self, *, zero: bool) -> None:
        """Start so that the product is zero, or not."""


class Bottleneck(nn.Module):
    """`s · up(act(down(x)))`, zero at the start: (…, M) → (…, M).

    Args:
        down, up: linear layers M → h and h → M.
        act: timm's name of an activation.
        scale: s; 'learnable' for a parameter that starts at 1.
        reads: for a branch beside the MLP, whether its input is the MLP's ('normed') or the residual stream.
    """

    def __init__(
        self,
        down: nn.Module,
        up: nn.Module,
        act: str = "gelu",
        scale: float | Literal["learnable"] = 1.0,
        reads: Literal["normed", "residual"] = "normed",
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

    def dense(self) -> tuple[AdapterLinear, AdapterLinear]:
        """The projections down and up of a bottleneck whose neurons or weights can be removed."""
        assert isinstance(self.down, AdapterLinear)
        assert isinstance(self.up, AdapterLinear)
        return self.down, self.up

    def reset(self) -> None:
        """Start as zero, with a gradient for the upper projection."""
        down, up = cast(Projection, self.down), cast(Projection, self.up)
        down.reset(zero=False)
        up.reset(zero=True)

    def allow_all(self) -> None:
        """Give both projections a mask, to be filled from a file."""
        for projection in self.dense():
            projection.allow_all()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.act(self.down(x))) * self.scale


class AdapterLinear(nn.Linear):
    """A dense projection of a bottleneck, (…, in) → (…, out). With a `mask` of its weight's shape, the others are zero for good."""

    mask: torch.Tensor | None
    kept: int  # how many of a mask that has no values, on the meta device

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.register_buffer("mask", None)

    def allow_all(self) -> None:
        """Take a mask of ones, to be filled from a file."""
        self.mask = torch.ones_like(self.weight, dtype=torch.bool)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight if self.mask is None else self.weight * self.mask, self.bias)

    def reset(self, *, zero: bool) -> None:
        """Start at zero, or Kaiming-uniform (with a bias of zero either way)."""
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def at_tokens(adapter: nn.Module, x: torch.Tensor, owner: nn.Module) -> torch.Tensor:
    """The adapter on the channels of x, which are last, except after a convolutional MLP."""
    if isinstance(getattr(owner, "fc1", None), (nn.Conv2d, ChannelsFirst)):
        return rearrange(adapter(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")
    return adapter(x)


class BottleneckPlan(Plan):
    """What all plans of bottlenecks have: by path, how many neurons the one in the path's slot has (0: it is gone)."""

    slot: ClassVar[str]

    widths: dict[str, int]
    masked: bool = False  # a `sparsify` phase masked single weights

    @property
    def least(self) -> int:
        """Neurons that pruning must leave in every bottleneck."""
        return 0

    def remove(self, model: nn.Module, path: str) -> None:
        """Take a bottleneck without neurons out of the forward pass, where they can be pruned."""
        raise TypeError(f"{type(self).__name__} does not define remove")

    def claims(self, model: nn.Module) -> list[Claim]:
        return [slot(path, self.slot) for path in self.widths]

    def bottlenecks(self, model: nn.Module) -> dict[str, Bottleneck]:
        """The bottlenecks that are present, by path."""
        return {path: getattr(model.get_submodule(path), self.slot) for path, hidden in self.widths.items() if hidden}

    def prefix(self, path: str) -> str:
        """Where the bottleneck of a path is in the model."""
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
    """A tensor of the sublayer at `path` (for its device and type), and its width M."""
    sublayer = model.get_submodule(path)
    last = sublayer.get_submodule("proj" if hasattr(sublayer, "proj") else "fc2")
    return next(last.parameters()), weight_shape(last)[0]


def adapter_widths(
    model: nn.Module, asker: str, places: Sequence[Place], width: int | None, ratio: float | None
) -> dict[str, int]:
    """Neurons of the bottleneck after every sublayer: `width` everywhere, or `ratio` of each one's M.

    Raises:
        UserError: a block has none of the places, or the ratio leaves no neuron.
    """
    backbone = describe(model)
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
