"""The layers of `low_rank: {pivoted: true}`: a weight of low rank as some of its own rows or columns, and what makes the others of them.

See `compressvit.fitting.pivoted` for the algebra. The paper (PIFA, ICML 2025, https://arxiv.org/abs/2501.19090) takes rows, so that outputs
are put in order. On a CPU that takes longer than the r² multiply-accumulates that are saved, wherever a layer has many outputs; so columns
are taken where it has as many outputs as inputs or more, and inputs are put in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.pivoted import pivoted
from compressvit.model.linear import weight_shape
from compressvit.transforms.low_rank.layer import Factored, FactoredConv2d, FactoredLinear, become, two_layers


class Ordered(nn.Module):
    """Holds an order of the channels of x.

    Args:
        count: of the channels.
        dim: the dimension of x that has them.

    Attributes:
        order: (count,) int64.
    """

    if TYPE_CHECKING:
        order: torch.Tensor

    def __init__(self, count: int, dim: int, device: torch.device | None = None):
        super().__init__()
        self.dim = dim
        self.register_buffer("order", torch.arange(count, device=device))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Raise a `UserError` for an order that is none: an index outside would read other memory on some devices."""
        order: torch.Tensor = state_dict.get(f"{prefix}order", self.order)
        known = not order.is_meta and order.shape == self.order.shape
        if known and not torch.equal(order.sort().values.cpu(), torch.arange(len(order))):
            raise UserError(
                f"{prefix}order is damaged: it is no order of {len(order)} channels; restore the file, or make it again"
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)


@torch.fx.wrap  # a trace takes it as it is: it asks where its channels are
def channels(x: torch.Tensor, dim: int, which: torch.Tensor) -> torch.Tensor:
    """`x.index_select(dim, which)`. On a CPU, along the last dimension, `gather` gives the same in half of the time or less (of 257 tokens
    of 384 channels, forward and backward); graphs keep `index_select`, which other runtimes have a fast form of."""
    if torch.jit.is_scripting() or torch.compiler.is_compiling():
        return x.index_select(dim, which)
    if x.device.type != "cpu" or dim % x.ndim != x.ndim - 1:
        return x.index_select(dim, which)
    return x.gather(dim, which.expand(*x.shape[:-1], len(which)))


class Split(Ordered):
    """The first `size` channels in an order of the channels of x, and the others.

    Attributes:
        order: (count,) int64, which channel is at each place.
    """

    def __init__(self, count: int, size: int, dim: int, device: torch.device | None = None):
        super().__init__(count, dim, device)
        self.size = size

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, others = self.order[: self.size], self.order[self.size :]
        return channels(x, self.dim, first), channels(x, self.dim, others)


class Join(Ordered):
    """Channels from two layers in one order.

    Attributes:
        order: (count,) int64, where each channel is in the concatenation of both.
    """

    def forward(self, first: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return channels(torch.cat((first, others), self.dim), self.dim, self.order)


class Pivoted(Factored):
    """What both pivoted forms share: the weight is zero where both layers are."""

    @torch.no_grad()
    def reset_zero(self) -> None:
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.up.weight)


class PivotedInputs(Pivoted):
    """`y = up(p + down(q))`, with p r of the inputs and q the others: r·(in + out − r) multiply-accumulates per token.

    `up` (r → out) has those columns of the weight, and the bias; `down` (in − r → r) the coefficients that make the other columns of them.
    Both are plain torch layers, as in a `Factored`, and `split` has the order of the inputs.
    """

    slots: ClassVar[tuple[str, ...]] = ("split", "down", "up")

    if TYPE_CHECKING:
        split: Split

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pivots, others = self.split(x)
        return self.up(pivots + self.down(others))

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`up` (out, r), which shares memory with the layer, and `down` (r, in), new, with a column of the identity for every pivot."""
        coefficients = self.down.weight.flatten(1)
        both = torch.cat([identity_like(coefficients), coefficients], dim=1)
        return self.up.weight.flatten(1), both[:, self.split.order.argsort()]

    @torch.no_grad()
    def set_factors(self, up: torch.Tensor, down: torch.Tensor) -> None:
        """Make the weight `up @ down`, of (out, r) and (r, in), in this form."""
        found = pivoted(down.mT, up.mT)  # the rows of the transpose
        self.split.order.copy_(found.order.argsort())
        copy_(self.up, found.rows.mT)
        copy_(self.down, found.coefficients.mT)


class PivotedOutputs(Pivoted):
    """`p = down(x)`, and y is p and `up(p)` in one order: r·(in + out − r) multiply-accumulates per token.

    `down` (in → r) has r rows of the weight, `up` (r → out − r) the coefficients that make the other rows of them. Where the layer that
    they replace has a bias, both have one. Both are plain torch layers, as in a `Factored`, and `join` has the order of the outputs.
    """

    slots: ClassVar[tuple[str, ...]] = ("down", "up", "join")
    adopted: ClassVar[tuple[str, ...]] = ("down.bias", "up.bias")

    if TYPE_CHECKING:
        join: Join

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pivots = self.down(x)
        return self.join(pivots, self.up(pivots))

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of the equivalent dense layer, (out,): a new tensor, see `set_bias`."""
        pivots, others = self._biases()
        if pivots is None or others is None:
            return None
        return torch.cat([pivots, others + self.up.weight.flatten(1) @ pivots])[self.join.order]

    def whole_bias(self) -> nn.Parameter | None:
        bias = self.bias
        if bias is None:
            return None
        return nn.Parameter(bias.detach(), requires_grad=any(p is not None and p.requires_grad for p in self._biases()))

    def _biases(self) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        return self.down._parameters["bias"], self.up._parameters["bias"]

    def outputs_of(self, part: str) -> slice | torch.Tensor | None:
        places = self.join.order.argsort().cpu()
        return {"down": places[: self.rank], "up": places[self.rank :]}.get(part)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`up` (out, r), new, with a row of the identity for every pivot, and `down` (r, in), which shares memory with the layer."""
        coefficients = self.up.weight.flatten(1)
        return torch.cat([identity_like(coefficients.mT), coefficients])[self.join.order], self.down.weight.flatten(1)

    @torch.no_grad()
    def set_factors(self, up: torch.Tensor, down: torch.Tensor) -> None:
        """Make the weight `up @ down`, of (out, r) and (r, in), in this form; the bias stays."""
        bias = self.bias
        found = pivoted(up, down)
        self.join.order.copy_(found.order)
        copy_(self.down, found.rows)
        copy_(self.up, found.coefficients)
        if bias is not None:
            self.set_bias(bias)

    @torch.no_grad()
    def set_bias(self, bias: torch.Tensor) -> None:
        pivots, others = bias.double()[self.join.order.argsort().to(bias.device)].split(
            [self.rank, len(bias) - self.rank]
        )
        ours = self.down.get_parameter("bias")
        ours.copy_(pivots)
        # from the values as they are stored, so that rounding those does not move the other outputs
        self.up.get_parameter("bias").copy_(others - self.up.weight.flatten(1).to(others) @ ours.to(others))


class PivotedInputsLinear(PivotedInputs, FactoredLinear):
    """Two `nn.Linear`s in place of one: (…, in) → (…, out)."""


class PivotedOutputsLinear(PivotedOutputs, FactoredLinear):
    """Two `nn.Linear`s in place of one: (…, in) → (…, out)."""


class PivotedInputsConv2d(PivotedInputs, FactoredConv2d):
    """Two 1×1 `nn.Conv2d`s in place of one: (B, in, height, width) → (B, out, height, width)."""


class PivotedOutputsConv2d(PivotedOutputs, FactoredConv2d):
    """Two 1×1 `nn.Conv2d`s in place of one: (B, in, height, width) → (B, out, height, width)."""


def is_pivoted(layer: nn.Module) -> bool:
    """Whether a low-rank layer is of this form."""
    return isinstance(layer, Pivoted)


def pivoted_linear(inputs: int, outputs: int, rank: int) -> nn.Module:
    """A pivoted linear layer that computes zero, to be measured."""
    model = nn.ModuleDict({"layer": nn.Linear(inputs, outputs)})
    pivot(model, "layer", rank)
    return model["layer"]


def identity_like(matrix: torch.Tensor) -> torch.Tensor:
    """The identity of as many rows as `matrix` has, of its device and precision."""
    return torch.eye(len(matrix), device=matrix.device, dtype=matrix.dtype)


def copy_(layer: nn.Linear | nn.Conv2d, matrix: torch.Tensor) -> None:
    """Set the weight of a layer to `matrix` (out, in), in place."""
    layer.weight.copy_(matrix.reshape(layer.weight.shape))


def pivot(model: nn.Module, path: str, rank: int) -> None:
    """Replace the linear layer or point-wise convolution at `path` by a pivoted one of this rank, less than the full one, in place.

    The bias is kept, the weight is not.

    Raises:
        UserError: another transform has changed the layer, so it is no longer a plain `nn.Linear` or `nn.Conv2d`.
    """
    layer = model.get_submodule(path)
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    (outputs, inputs), device = weight_shape(layer), layer.weight.device
    assert 0 < rank < min(outputs, inputs)
    is_conv, bias = isinstance(layer, nn.Conv2d), layer.bias
    dim = 1 if is_conv else -1
    kind: type[Factored]
    if inputs <= outputs:
        kind = PivotedInputsConv2d if is_conv else PivotedInputsLinear
        two = two_layers(layer, (inputs - rank, rank, None), (rank, outputs, bias))
        become(model, path, kind, {"split": Split(inputs, rank, dim, device), **two})
        return
    parts: list[nn.Parameter | None] = [None, None]
    if bias is not None:
        split = bias.detach().split([rank, outputs - rank])
        parts = [nn.Parameter(part.clone(), requires_grad=bias.requires_grad) for part in split]
    kind = PivotedOutputsConv2d if is_conv else PivotedOutputsLinear
    two = two_layers(layer, (inputs, rank, parts[0]), (rank, outputs - rank, parts[1]))
    become(model, path, kind, {**two, "join": Join(outputs, dim, device)})
