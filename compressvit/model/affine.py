"""The algebra of merging: an affine map `x → R x + c` over channels is folded exactly into the layer before or after it.

The shipped transforms merge into linear layers and point-wise convolutions; the other layers are here for transforms of your own.

R is (M, M) and c is (M,), in float64; the layer keeps its own precision. On the meta device, where there are no values, only
what the structure rules out is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from compressvit.errors import UserError
from compressvit.model import ties


@torch.no_grad()
def merge_before_(
    layer: nn.Module, r: torch.Tensor, c: torch.Tensor, apart: Sequence[nn.Parameter | None] | None = None
) -> None:
    """Change `layer` in place so that its new output for x is its old output for `R x + c`.

    `nn.Linear`: `W' = W R`, `b' = b + W c`. `nn.MultiheadAttention` with one `in_proj`, self-attention: the same on its three thirds.
    `nn.Conv2d` without groups: over its input channels, `b' = b + Σ_positions K c`; one that pads with v (zeros, at first) must pad
    with what is mapped to it, `R⁻¹ (v − c)`, and becomes a `PaddedConv2d`.

    Args:
        apart: of an `nn.Linear` without a bias, the parameters that are added to its output, in order; None: one that nothing depends on,
            whose part of `W c` is dropped.

    Raises:
        UserError: the layer has no bias to take c, is depth-wise or grouped (it would become dense), computes with more than its own
            weight (low-rank factors, an adapter's term), or is of another kind. It is unchanged then.
    """
    prefix = "in_proj_" if isinstance(layer, nn.MultiheadAttention) else ""
    _require_plain(layer, "before", (nn.Linear, nn.Conv2d, nn.MultiheadAttention), prefix)
    if apart is None:
        _require_bias(layer, c, prefix)
    if not isinstance(layer, nn.Conv2d):
        weight = getattr(layer, f"{prefix}weight")
        bias = getattr(layer, f"{prefix}bias")
        if bias is not None:
            bias.copy_(bias.double() + weight.double() @ c)
        elif apart is not None:
            _shift_apart_(apart, weight.double() @ c)
        weight.copy_(weight.double() @ r)
        return
    if layer.groups != 1:
        raise UserError(
            f"merging into a convolution of {layer.groups} groups would make it dense; put the adapter after it instead"
        )
    pads = layer.padding != "valid" if isinstance(layer.padding, str) else any(layer.padding)
    border = layer.pad_value.double() if isinstance(layer, PaddedConv2d) else torch.zeros_like(c)
    # another mode repeats the image at the border, so the map was there already; without c it takes zeros to zeros
    if pads and layer.padding_mode == "zeros" and (_moves(border) or _moves(c)):
        border = _preimage(r, border - c)
        layer.__class__ = PaddedConv2d
        layer.register_buffer("pad_value", border.to(layer.weight.dtype))
    kernel = layer.weight.double()
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.double() + torch.einsum("oihw,i->o", kernel, c))
    layer.weight.copy_(torch.einsum("oihw,ij->ojhw", kernel, r))


def _shift_apart_(parameters: Sequence[nn.Parameter | None], shift: torch.Tensor) -> None:
    """Add to each parameter its part of a shift."""
    known = sum(parameter.numel() for parameter in parameters if parameter is not None)
    dropped = (len(shift) - known) // max(1, sum(parameter is None for parameter in parameters))
    sizes = [dropped if parameter is None else parameter.numel() for parameter in parameters]
    for parameter, part in zip(parameters, shift.split(sizes), strict=True):
        if parameter is not None:
            parameter.copy_(parameter.double() + part)


@torch.no_grad()
def merge_after_(layer: nn.Module, r: torch.Tensor, c: torch.Tensor) -> None:
    """Change `layer` in place so that it returns `R y + c` where it returned y: `W' = R W`, `b' = R b + c` (linear, convolution).

    Raises:
        UserError: the layer has no bias to take c, is grouped and R is dense, computes with more than its own weight, or is of another
            kind. It is unchanged then.
    """
    _require_plain(layer, "after", (nn.Linear, nn.Conv2d))
    _require_bias(layer, c)
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    weight = layer.weight.double()
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        if not r.is_meta and not torch.equal(r, torch.diag(r.diagonal())):
            raise UserError(
                f"merging a dense map after a convolution of {layer.groups} groups would make it dense; only a scale and shift fits"
            )
        weight = weight * r.diagonal()[:, None, None, None]
    else:
        weight = torch.einsum("po,o...->p...", r, weight)
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(r @ layer.bias.double() + c)


class PaddedConv2d(nn.Conv2d):
    """A convolution that pads its input with a value per channel, (in,), instead of zeros."""

    pad_value: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.bias is not None  # `merge_before_` would have had nowhere to put the shift
        value = self.pad_value[:, None, None]
        # zeros around x − v are v around x
        spread = F.conv2d(x - value, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        constant = torch.einsum("oihw,i->o", self.weight, self.pad_value)
        return spread + (constant + self.bias)[:, None, None]


# The forwards that compute with the layer's own weight and bias and nothing else.
_PLAIN = {nn.Linear.forward, nn.Conv2d.forward, PaddedConv2d.forward, nn.MultiheadAttention.forward}


def owns_weight(layer: nn.Module) -> bool:
    """Whether a layer computes with one weight parameter: neither a product of low-rank factors, nor one with an added low-rank term."""
    return layer._parameters.get("weight") is not None and getattr(layer, "low_rank", None) is None


def refuse_tied(model: nn.Module, step: str, names: Iterable[str]) -> None:
    """Raise a `UserError` if one of the parameters is shared (a private change of it would change the others, too), or low rank."""
    shared = {name: group for group in ties.tied_groups(model) for name in group}
    for name in names:
        path = name.rpartition(".")[0]
        if not owns_weight(model.get_submodule(path)):
            raise UserError(
                f"{step} cannot be folded: {path} is low rank, so it has no dense weight to absorb the change. "
                "Fold the low-rank step first, as compressvit.materialise does, or keep it unmerged"
            )
        if name in shared:
            size = model.get_parameter(name).numel()
            raise UserError(
                f"{step} cannot be folded: {name} is shared by {len(shared[name])} layers, and each has an adapter of its own. "
                f"Keep it unmerged, merge it before sharing, or untie the layers first (+ {size:,} parameters for each of the others)"
            )


def _require_plain(layer: nn.Module, where: str, kinds: tuple[type[nn.Module], ...], prefix: str = "") -> None:
    """Raise unless the layer is of one of these kinds, and computes as they do, with a weight of its own."""
    name = type(layer).__name__
    if not isinstance(layer, kinds) and not hasattr(layer, "effective_weight"):  # two factors are a linear layer, too
        raise UserError(f"merging {where} a {name} is not defined; it is for linear layers and convolutions")
    if type(layer).forward not in _PLAIN or layer._parameters.get(f"{prefix}weight") is None:
        raise UserError(
            f"merging {where} a {name} would not be exact: it computes with more, or something else, than one weight of its own (low-rank "
            "factors, an adapter's term, a normalised weight, three projections). Fold those first, or keep the adapter unmerged"
        )


def _require_bias(layer: nn.Module, c: torch.Tensor, prefix: str = "") -> None:
    if getattr(layer, f"{prefix}bias") is None and _moves(c):
        raise UserError(
            f"the {type(layer).__name__} has no bias to absorb the shift, so the merge would not be exact; "
            "build the model with one (e.g. qkv_bias=True), or keep the adapter unmerged"
        )


def _moves(shift: torch.Tensor) -> bool:
    """Whether a shift moves anything, or on the meta device may."""
    return shift.is_meta or bool(shift.any())


def _preimage(r: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What R takes to `value`."""
    try:
        return torch.linalg.solve(r, value)
    except torch.linalg.LinAlgError:
        raise UserError(
            "merging into a convolution that pads with zeros would not be exact: R has no inverse, so no "
            "padding value is mapped to zero; keep the adapter unmerged"
        ) from None
