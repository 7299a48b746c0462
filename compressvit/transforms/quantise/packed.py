"""Rounded weights as a model stores them: codes of 2 to 8 bits without a bit between them, and scales in float16.

Codes of 3, 5, 6 and 7 bits are split into parts of 4, 2 and 1 bits, of which a byte holds a whole number: the parts of all codes stand one
after the other, the highest first. Nothing is kept that is computed from them, so a forward pass computes the weight anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressvit.fitting.rounding import Codes, groups_of, nearest
from compressvit.model import surgery

_BYTE = 8


def packed_size(count: int, bits: int) -> int:
    """Bytes of so many codes."""
    return -(-count // _BYTE) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (N,) of uint8 as bytes (⌈N / 8⌉ · bits,)."""
    codes = F.pad(codes, (0, -len(codes) % _BYTE))
    below, found = bits, []
    for width in _parts(bits):
        below -= width
        several = ((codes >> below) & (2**width - 1)).view(_BYTE // width, -1)
        byte = several[0].clone()
        for place, part in enumerate(several[1:], 1):
            byte |= part << (place * width)
        found.append(byte)
    return torch.cat(found)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes (count,) of `pack`, in float32.

    By arithmetic of numbers alone, in which all of them are exact: runtimes of exported graphs lack, or confuse, that of bits.
    """
    eighth, start = -(-count // _BYTE), 0
    found: Tensor | None = None
    for width in _parts(bits):
        left = packed[start : start + eighth * width].float()
        start += eighth * width
        several = []
        for _ in range(_BYTE // width - 1):
            above = (left * 2.0**-width).floor()
            several.append(left - above * 2**width)
            left = above
        part = torch.cat([*several, left]) if several else left
        found = part if found is None else found * 2**width + part
    assert found is not None
    return found[:count]


def _parts(bits: int) -> Iterator[int]:
    """The powers of two whose sum is `bits`, falling."""
    return (width for width in (8, 4, 2, 1) if bits & width)


class Packed(nn.Module):
    """A rounded weight, groups of whose numbers share a scale.

    Args:
        shape: (out, in) of a linear layer, (out, in, height, width) of a convolution, or (1, tokens, width) of embeddings: groups are of
            the inputs of an output, or of the numbers of a token.
        bits: of a code, from 2 to 8.
        group: at most so many numbers share a scale.
        like: device and dtype of the weight that it gives.

    Attributes:
        codes: packed, (bytes,) uint8.
        scales: (out, groups) float16, whatever precision the model is converted to.
        stands_for: of how many parameters it has the place.
    """

    if TYPE_CHECKING:
        codes: Tensor
        scales: Tensor
        like: Tensor

    def __init__(self, shape: tuple[int, ...], bits: int, group: int, **like: Any):
        super().__init__()
        self.shape, self.bits, self.stands_for = tuple(shape), bits, math.prod(shape)
        self.rows = shape[1] if len(shape) == 3 else shape[0]
        self.inputs = self.stands_for // self.rows
        self.groups, self.size = groups_of(self.inputs, group)
        device = like.get("device")
        count = packed_size(self.rows * self.groups * self.size, bits)
        self.register_buffer("codes", torch.zeros(count, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.zeros(self.rows, self.groups, dtype=torch.float16, device=device))
        self.register_buffer("like", torch.empty(0, **like), persistent=False)

    def forward(self) -> Tensor:
        """The weight."""
        codes = unpack(self.codes, self.bits, self.rows * self.groups * self.size)
        values = codes.view(self.rows, self.groups, self.size) - 2 ** (self.bits - 1)
        values = (values * self.scales.float()[..., None]).flatten(1)
        if values.shape[1] != self.inputs:
            values = values[:, : self.inputs]
        return values.reshape(self.shape).to(self.like.dtype)

    @torch.no_grad()
    def set(self, found: Codes) -> None:
        """Set codes and scales."""
        codes = F.pad(found.codes, (0, self.groups * self.size - self.inputs), value=2 ** (self.bits - 1))
        self.codes.copy_(pack(codes.flatten(), self.bits))
        self.scales.copy_(found.scales)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        """What converts a model must not round scales again."""
        self._buffers["scales"] = self.scales.view(torch.int16)
        super()._apply(fn, recurse)
        self._buffers["scales"] = self.scales.view(torch.float16)
        return self

    def extra_repr(self) -> str:
        return f"{'×'.join(map(str, self.shape))}, bits={self.bits}, group={self.size}"


class Rounded(surgery.Mixin):
    """A mixin of layers whose weight is computed from codes."""

    slots = ("rounded",)

    if TYPE_CHECKING:
        rounded: Packed

    @property
    def weight(self) -> Tensor:
        return self.rounded()


class RoundedPositions(surgery.Mixin):
    """A mixin of models whose position embeddings are computed from codes."""

    slots = ("rounded_positions",)

    if TYPE_CHECKING:
        rounded_positions: Packed

    @property
    def pos_embed(self) -> Tensor:
        return self.rounded_positions()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As `set_input_size` of timm assigns them for images of another size: they are rounded again."""
        if name != "pos_embed" or param is None:
            super().register_parameter(name, param)
            return
        bits, group = self.rounded_positions.bits, self.rounded_positions.size
        self.rounded_positions = Packed(tuple(param.shape), bits, group, device=param.device, dtype=param.dtype)
        self.rounded_positions.set(nearest(param.detach().cpu().flatten(0, -2), bits, group))
