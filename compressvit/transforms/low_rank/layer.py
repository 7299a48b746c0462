"""The layers of `low_rank`: two linear layers, or two point-wise convolutions, in place of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn.utils import skip_init

from compressvit.fitting.lowrank import used_components
from compressvit.model import surgery
from compressvit.model.linear import ChannelsFirst, weight_shape


class Factored(nn.Module):
    """`y = up(down(x))`, with `down` (in → r) without a bias and `up` (r → out) with one: r·(in + out) multiply-accumulates per token.

    Both are plain torch layers, so quantisers, profilers, LoRA libraries and exporters recognise them. The module is the same object that
    was a single layer before, and keeps its hooks; it has no `weight`.
    """

    slots: ClassVar[tuple[str, ...]] = ("down", "up")
    adopted: ClassVar[tuple[str, ...]] = ("up.bias",)

    __jit_unused_properties__ = ("rank", "bias", "in_features", "out_features")

    if TYPE_CHECKING:  # torch.jit.script takes no annotations that are text, as they are at run time
        down: nn.Linear | nn.Conv2d
        up: nn.Linear | nn.Conv2d

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))

    @property
    def rank(self) -> int:
        """The rank r."""
        return len(self.down.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of the equivalent dense layer, (out,): that of `up`."""
        return self.up._parameters["bias"]

    def whole_bias(self) -> nn.Parameter | None:
        """The bias as a parameter of a dense layer."""
        return self.up._parameters["bias"]

    def outputs_of(self, part: str) -> slice | torch.Tensor | None:
        """Which of the outputs one of the two layers gives, in its order; None if it gives none."""
        return slice(None) if part == "up" else None

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`up` (out, r) and `down` (r, in), which share memory with the weights of the two layers."""
        up, down = self.up.weight, self.down.weight
        return up.view(*up.shape[:2]), down.view(*down.shape[:2])

    def effective_weight(self) -> torch.Tensor:  # (out, in)
        """The weight (out, in) of the equivalent dense layer."""
        up, down = self.factors()
        return up @ down

    def reset_zero(self) -> None:
        """Initialise to the zero matrix; see `reset_zero_`."""
        reset_zero_(*self.factors())

    def set_factors(self, up: torch.Tensor, down: torch.Tensor) -> None:
        """Set `up` (out, r) and `down` (r, in); see `set_factors_`."""
        set_factors_(*self.factors(), up, down)

    @torch.no_grad()
    def set_bias(self, bias: torch.Tensor) -> None:
        """Set the bias (out,) of the equivalent dense layer."""
        self.up.get_parameter("bias").copy_(bias)

    def extra_repr(self) -> str:
        outputs, inputs = weight_shape(self)
        return f"in_features={inputs}, out_features={outputs}, rank={self.rank}"


class FactoredLinear(Factored):
    """Two `nn.Linear`s in place of one: (…, in) → (…, out).

    Attributes:
        in_features, out_features: of the layer that it replaces.
    """

    if TYPE_CHECKING:
        in_features: int
        out_features: int


class FactoredConv2d(Factored, ChannelsFirst):
    """Two 1×1 `nn.Conv2d`s in place of one: (B, in, height, width) → (B, out, height, width).

    Attributes:
        in_channels, out_channels: of the layer that it replaces.
    """

    if TYPE_CHECKING:
        in_channels: int
        out_channels: int

    @property
    def in_features(self) -> int:
        """As a linear layer over channels has it."""
        return self.in_channels

    @property
    def out_features(self) -> int:
        """As a linear layer over channels has it."""
        return self.out_channels


@torch.no_grad()
def reset_zero_(up: torch.Tensor, down: torch.Tensor) -> None:
    """Make `up @ down` the zero matrix in place, so that it can learn: `down` as PyTorch starts a linear layer, `up` zero."""
    nn.init.kaiming_uniform_(down, a=5**0.5)
    nn.init.zeros_(up)


@torch.no_grad()
def set_factors_(up: torch.Tensor, down: torch.Tensor, new_up: torch.Tensor, new_down: torch.Tensor) -> None:
    """Set `up` (out, r) and `down` (r, in) in place, from values of any precision.

    Components whose new values are zero are initialised as in `reset_zero_`, so that they stay trainable.
    """
    reset_zero_(up, down)
    used = used_components(new_up, new_down)
    up[:, used] = new_up[:, used].to(up)
    down[used] = new_down[used].to(down)


@torch.no_grad()
def set_bias_(layer: nn.Module, bias: torch.Tensor) -> None:
    """Set the bias (out,) of a layer that has one, in place, from values of any precision."""
    if isinstance(layer, Factored):
        layer.set_bias(bias)
    else:
        layer.get_parameter("bias").copy_(bias)


def factor(model: nn.Module, path: str, rank: int) -> None:
    """Replace the linear layer or point-wise convolution at `path` by two of its kind, in place; the bias is kept, the weight is not.

    Raises:
        UserError: another transform has changed the layer, so it is no longer a plain `nn.Linear` or `nn.Conv2d`.
    """
    layer = model.get_submodule(path)
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    outputs, inputs = weight_shape(layer)
    two = two_layers(layer, (inputs, rank, None), (rank, outputs, layer.bias))
    become(model, path, FactoredConv2d if isinstance(layer, nn.Conv2d) else FactoredLinear, two)


Shape = tuple[int, int, torch.Tensor | None]  # inputs, outputs and bias of a layer


def two_layers(layer: nn.Linear | nn.Conv2d, down: Shape, up: Shape) -> dict[str, nn.Module]:
    """`down` and `up` of these shapes, of the kind, device and precision of `layer`; their weights have no values yet."""
    kind: Any = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    kernel = (1,) if kind is nn.Conv2d else ()
    made: dict[str, nn.Module] = {}
    for name, (inputs, outputs, bias) in (("down", down), ("up", up)):
        options = {"bias": bias is not None, "device": layer.weight.device, "dtype": layer.weight.dtype}
        # skips the initialisation, which would consume random numbers needlessly
        made[name] = skip_init(kind, inputs, outputs, *kernel, **options)
        if bias is not None:
            made[name].bias = bias
    return made


def become(model: nn.Module, path: str, kind: type[Factored], parts: Mapping[str, nn.Module]) -> None:
    """Make the plain layer at `path` a `kind` in place, with these modules in its slots, and a weight of zero."""
    surgery.exchange(model, path, nn.Conv2d if issubclass(kind, ChannelsFirst) else nn.Linear, kind, {})
    for slot, part in parts.items():
        surgery.fill_slot(model, path, slot, part)
    made = model.get_submodule(path)
    assert isinstance(made, Factored)
    made.reset_zero()


def unfactor(model: nn.Module, path: str, weight: nn.Parameter) -> None:
    """Make the `Factored` at `path` a plain layer again, in place, with this weight (out, in) and its bias."""
    layer = model.get_submodule(path)
    assert isinstance(layer, Factored)
    original = nn.Conv2d if isinstance(layer, ChannelsFirst) else nn.Linear
    kernel = weight.detach()[:, :, None, None] if original is nn.Conv2d else weight
    dense = weight if kernel is weight else nn.Parameter(kernel, requires_grad=weight.requires_grad)
    surgery.exchange(model, path, surgery.kind_of(layer), original, {"weight": dense, "bias": layer.whole_bias()})


def current_names(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Translate parameter names to the current ones after some layers have been factored, which renames their biases."""
    factored = {path: module for path, module in model.named_modules() if isinstance(module, Factored)}
    moved = {f"{path}.bias": {f"{path}.{name}" for name in layer.adopted} for path, layer in factored.items()}
    return set[str]().union(*(moved.get(name, {name}) for name in names))
