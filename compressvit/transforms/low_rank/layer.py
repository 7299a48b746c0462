"""The layers of `low_rank`: two linear layers, or two point-wise convolutions, in place of one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import skip_init

from compressvit.model import surgery
from compressvit.model.linear import ChannelsFirst, weight_shape


class Factored(nn.Module):
    """`y = up(down(x))`, with `down` (in → r) without a bias and `up` (r → out) with the bias: r·(in + out) multiply-accumulates a token.

    Both are plain layers of torch, so whatever works on such (quantisers, profilers, LoRA, exporters) finds them. The module is the one
    that was a single layer before, with its hooks; it has no `weight`.
    """

    slots = ("down", "up")
    adopted = ("up.bias",)

    down: nn.Linear | nn.Conv2d
    up: nn.Linear | nn.Conv2d

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))

    @property
    def rank(self) -> int:
        """r."""
        return len(self.down.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """That of `up`, (out,)."""
        return self.up._parameters["bias"]

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`up` (out, r) and `down` (r, in), which share memory with the weights of the two layers."""
        up, down = self.up.weight, self.down.weight
        return up.view(*up.shape[:2]), down.view(*down.shape[:2])

    def effective_weight(self) -> torch.Tensor:  # (out, in)
        """The weight of the dense layer that computes the same."""
        up, down = self.factors()
        return up @ down

    def reset_zero(self) -> None:
        """Start as the zero matrix; see `reset_zero_`."""
        reset_zero_(*self.factors())

    def set_factors(self, up: torch.Tensor, down: torch.Tensor) -> None:
        """Take these values (out, r) and (r, in); see `set_factors_`."""
        set_factors_(*self.factors(), up, down)

    def extra_repr(self) -> str:
        outputs, inputs = weight_shape(self)
        return f"in_features={inputs}, out_features={outputs}, rank={self.rank}"


class FactoredLinear(Factored):
    """Two `nn.Linear`s in place of one: (…, in) → (…, out).

    Attributes:
        in_features, out_features: of the layer that it replaces.
    """

    in_features: int
    out_features: int


class FactoredConv2d(Factored, ChannelsFirst):
    """Two 1×1 `nn.Conv2d`s in place of one: (B, in, height, width) → (B, out, height, width).

    Attributes:
        in_channels, out_channels: of the layer that it replaces.
    """

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
    """Make `up @ down` the zero matrix in place, so that it can learn: `down` Kaiming-uniform, `up` zero (LORS, section 4)."""
    nn.init.kaiming_uniform_(down, a=5**0.5)
    nn.init.zeros_(up)


@torch.no_grad()
def set_factors_(up: torch.Tensor, down: torch.Tensor, new_up: torch.Tensor, new_down: torch.Tensor) -> None:
    """Give `up` (out, r) and `down` (r, in) new values of any precision, in place.

    Components whose new values are zero start as `reset_zero_` leaves them, so that they can learn.
    """
    reset_zero_(up, down)
    size = new_up.norm(dim=0) * new_down.norm(dim=1)
    used = size > 1e-7 * size.max()  # float32 has nothing below that beside the largest
    up[:, used] = new_up[:, used].to(up)
    down[used] = new_down[used].to(down)


def factor(model: nn.Module, path: str, rank: int) -> None:
    """Make the linear layer or point-wise convolution at `path` two of its kind, in place; it keeps its bias, and its weight is gone.

    Raises:
        UserError: another transform has made the layer something else than a plain `nn.Linear` or `nn.Conv2d`.
    """
    layer = model.get_submodule(path)
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    bias, (outputs, inputs) = layer.bias, weight_shape(layer)
    like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    # without their own initialisation, which would draw random numbers for nothing
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
    """Names of parameters of a model as they are now, where some of its layers have been factored: their biases moved."""
    factored = {path for path, module in model.named_modules() if isinstance(module, Factored)}
    moved = {f"{path}.bias": f"{path}.up.bias" for path in factored}
    return {moved.get(name, name) for name in names}
