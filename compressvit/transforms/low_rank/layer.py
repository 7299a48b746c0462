"""The layers of `low_rank`: two linear layers, or two point-wise convolutions, in place of one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import skip_init

from compressvit.model import surgery
from compressvit.model.linear import ChannelsFirst, weight_shape


class Factored(nn.Module):
    """`y = up(down(x))`, with `down` (in → r) without a bias and `up` (r → out) with one: r·(in + out) multiply-accumulates per token.

    Both are plain torch layers, so quantisers, profilers, LoRA libraries and exporters recognise them. The module is the same object that
    was a single layer before, and keeps its hooks; it has no `weight`.
    """

    slots = ("down", "up")
    adopted = ("up.bias",)

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
    def bias(self) -> nn.Parameter | None:
        """The bias of `up`, (out,)."""
        return self.up._parameters["bias"]

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
    size = new_up.norm(dim=0) * new_down.norm(dim=1)
    used = size > 1e-7 * size.max()  # below float32's precision relative to the largest
    up[:, used] = new_up[:, used].to(up)
    down[used] = new_down[used].to(down)


def factor(model: nn.Module, path: str, rank: int) -> None:
    """Replace the linear layer or point-wise convolution at `path` by two of its kind, in place; the bias is kept, the weight is not.

    Raises:
        UserError: another transform has changed the layer, so it is no longer a plain `nn.Linear` or `nn.Conv2d`.
    """
    layer = model.get_submodule(path)
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    bias, (outputs, inputs) = layer.bias, weight_shape(layer)
    like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    # skips their initialisation, which would consume random numbers needlessly
    if isinstance(layer, nn.Conv2d):
        down: nn.Module = skip_init(nn.Conv2d, inputs, rank, 1, bias=False, **like)
        up: nn.Module = skip_init(nn.Conv2d, rank, outputs, 1, bias=bias is not None, **like)
        surgery.exchange(model, path, nn.Conv2d, FactoredConv2d, {})
    else:
        down = skip_init(nn.Linear, inputs, rank, bias=False, **like)
        up = skip_init(nn.Linear, rank, outputs, bias=bias is not None, **like)
        surgery.exchange(model, path, nn.Linear, FactoredLinear, {})
    if bias is not None:
        up.bias = bias
    surgery.fill_slot(model, path, "down", down)
    surgery.fill_slot(model, path, "up", up)
    made = model.get_submodule(path)
    assert isinstance(made, Factored)
    made.reset_zero()


def unfactor(model: nn.Module, path: str, weight: nn.Parameter) -> None:
    """Make the `Factored` at `path` a plain layer again, in place, with this weight (out, in) and its bias."""
    layer = model.get_submodule(path)
    assert isinstance(layer, Factored)
    if isinstance(layer, FactoredConv2d):
        kernel = nn.Parameter(weight.detach()[:, :, None, None], requires_grad=weight.requires_grad)
        surgery.exchange(model, path, FactoredConv2d, nn.Conv2d, {"weight": kernel, "bias": layer.bias})
    else:
        surgery.exchange(model, path, FactoredLinear, nn.Linear, {"weight": weight, "bias": layer.bias})


def current_names(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Translate parameter names to the current ones after some layers have been factored, which renames their biases."""
    factored = {path for path, module in model.named_modules() if isinstance(module, Factored)}
    moved = {f"{path}.bias": f"{path}.up.bias" for path in factored}
    return {moved.get(name, name) for name in names}
