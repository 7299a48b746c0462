"""The layer of `low_rank`: two linear layers in place of one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import skip_init

from compressvit.model import surgery


class FactoredLinear(nn.Module):
    """`y = up(down(x))`, with `down` (in → r) without a bias and `up` (r → out) with the bias: r·(in + out) multiply-accumulates a token.

    Both are plain `nn.Linear`s, so whatever works on linear layers (quantisers, profilers, LoRA, exporters) finds them. The module is
    the one that was a linear layer before, with its hooks; it has no `weight`.

    Attributes:
        in_features, out_features: of the layer that it replaces.
    """

    slots = ("down", "up")
    adopted = ("up.bias",)

    in_features: int
    out_features: int
    down: nn.Linear
    up: nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…, in) -> (…, out)
        return self.up(self.down(x))

    @property
    def rank(self) -> int:
        """r."""
        return self.down.out_features

    @property
    def bias(self) -> nn.Parameter | None:
        """That of `up`, (out,)."""
        return self.up.bias

    def effective_weight(self) -> torch.Tensor:  # (out, in)
        """The weight of the dense layer that computes the same."""
        return self.up.weight @ self.down.weight

    def reset_zero(self) -> None:
        """Start as the zero matrix; see `reset_zero_`."""
        reset_zero_(self.up.weight, self.down.weight)

    def set_factors(self, up: torch.Tensor, down: torch.Tensor) -> None:
        """Take these values (out, r) and (r, in); see `set_factors_`."""
        set_factors_(self.up.weight, self.down.weight, up, down)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


@torch.no_grad()
def reset_zero_(up: torch.Tensor, down: torch.Tensor) -> None:
    """Make `up @ down` the zero matrix in place, so that it can learn: `down` as PyTorch starts a linear layer, `up` zero."""
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
    """Make the linear layer at `path` a `FactoredLinear`, in place; it keeps its bias, and its weight is gone.

    Raises:
        UserError: another transform has made the layer something else than a plain `nn.Linear`.
    """
    layer = model.get_submodule(path)
    assert isinstance(layer, nn.Linear)
    bias = layer.bias
    like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    # without their own initialisation, which would draw random numbers for nothing
    down = skip_init(nn.Linear, layer.in_features, rank, bias=False, **like)
    up = skip_init(nn.Linear, rank, layer.out_features, bias=bias is not None, **like)
    reset_zero_(up.weight, down.weight)
    if bias is not None:
        up.bias = bias
    surgery.exchange(model, path, nn.Linear, FactoredLinear, {})
    surgery.fill_slot(model, path, "down", down)
    surgery.fill_slot(model, path, "up", up)


def unfactor(model: nn.Module, path: str, weight: nn.Parameter) -> None:
    """Make the `FactoredLinear` at `path` a plain linear layer again, in place, with this weight (out, in) and its bias."""
    layer = model.get_submodule(path)
    assert isinstance(layer, FactoredLinear)
    surgery.exchange(model, path, FactoredLinear, nn.Linear, {"weight": weight, "bias": layer.bias})


def current_names(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Names of parameters of a model as they are now, where some of its linear layers have been factored: their biases moved."""
    factored = {path for path, module in model.named_modules() if isinstance(module, FactoredLinear)}
    moved = {f"{path}.bias": f"{path}.up.bias" for path in factored}
    return {moved.get(name, name) for name in names}
