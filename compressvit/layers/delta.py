"""Terms that are added to a frozen projection's weight, kept apart while they are trained.

Shapes: (…, in) → (…, out); a 1×1 convolution's channels come second.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import nn

from compressvit.affine import owns_weight
from compressvit.errors import UserError


class LoRATerm(nn.Module):
    """`scale · up_p down_p` for some of the equal parts of a projection's outputs, such as q and v of a fused qkv.

    Args:
        in_features: of the projection.
        part_features: outputs of one part.
        rank: r.
        parts: which parts have a term, of `num_parts`.
        scale: α / r.
    """

    def __init__(
        self,
        in_features: int,
        part_features: int,
        rank: int,
        parts: tuple[int, ...],
        num_parts: int,
        scale: float,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.down = nn.Parameter(torch.empty(len(parts), rank, in_features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(len(parts), part_features, rank, device=device, dtype=dtype))
        self.parts, self.num_parts, self.scale = parts, num_parts, scale

    @torch.no_grad()
    def reset(self) -> None:
        """`down` Kaiming-uniform, `up` zero."""
        for matrix in self.down:
            nn.init.kaiming_uniform_(matrix, a=5**0.5)
        nn.init.zeros_(self.up)

    def product(self) -> torch.Tensor:  # (out, in)
        return self._spread(self.scale * self.up @ self.down, dim=0).flatten(0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.einsum("...i,pri->...pr", x, self.down)
        out = torch.einsum("...pr,por->...po", hidden, self.up) * self.scale
        return self._spread(out, dim=-2).flatten(-2)

    def _spread(self, parts: torch.Tensor, dim: int) -> torch.Tensor:
        """Zeros for the parts without a term."""
        if len(self.parts) == self.num_parts:
            return parts
        taken = dict(zip(self.parts, parts.unbind(dim), strict=True))
        empty = torch.zeros_like(next(iter(taken.values())))
        return torch.stack([taken.get(p, empty) for p in range(self.num_parts)], dim=dim)


class FacTTerm(nn.Module):
    """`scale · V Σ_j U` for every M×M slot j of a projection: its outputs (fused qkv, fc1) or its inputs (fc2) cut into pieces of M.

    Args:
        width: M; U is (r, M), V is (M, r), both shared by all projections.
        rank: r.
        slots: pieces of the projection.
        on_inputs: whether the inputs are cut instead of the outputs.
        scale: s.
        tucker: Σ_j = Σ_k p_jk C_k with a shared C (r, r, r) and a private p (slots, r) instead of a private Σ (slots, r, r).
    """

    def __init__(
        self, width: int, rank: int, slots: int, on_inputs: bool, scale: float, tucker: bool, device=None, dtype=None
    ):
        super().__init__()
        new = {"device": device, "dtype": dtype}
        self.u = nn.Parameter(torch.empty(rank, width, **new))
        self.v = nn.Parameter(torch.empty(width, rank, **new))
        if tucker:
            self.core = nn.Parameter(torch.empty(rank, rank, rank, **new))
            self.mix = nn.Parameter(torch.empty(slots, rank, **new))
        else:
            self.sigma = nn.Parameter(torch.empty(slots, rank, rank, **new))
        self.on_inputs, self.scale, self.tucker = on_inputs, scale, tucker

    @torch.no_grad()
    def reset(self) -> None:
        """U Xavier, Σ (C, p) uniform as a linear layer's, V zero, so that ΔW is zero."""
        nn.init.xavier_uniform_(self.u)
        nn.init.zeros_(self.v)
        bound = self.u.shape[0] ** -0.5
        for part in (self.core, self.mix) if self.tucker else (self.sigma,):
            nn.init.uniform_(part, -bound, bound)

    def _sigma(self) -> torch.Tensor:  # (slots, r, r)
        return torch.einsum("jk,ksr->jsr", self.mix, self.core) if self.tucker else self.sigma

    def product(self) -> torch.Tensor:  # (out, in)
        slots = self.scale * self.v @ self._sigma() @ self.u
        return rearrange(slots, "j o i -> o (j i)") if self.on_inputs else rearrange(slots, "j o i -> (j o) i")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sigma = self._sigma() * self.scale
        if self.on_inputs:
            inner = rearrange(x, "... (j i) -> ... j i", j=len(sigma)) @ self.u.T
            return torch.einsum("...jr,jsr->...s", inner, sigma) @ self.v.T
        inner = torch.einsum("...r,jsr->...js", x @ self.u.T, sigma)
        return (inner @ self.v.T).flatten(-2)


class WithLoRA:
    """Of a linear layer or 1×1 convolution: `y + lora(x)`."""

    slots = ("lora",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _with_term(super().forward(x), x, self.lora, self)  # type: ignore[misc,attr-defined]


class WithFacT:
    """Of a linear layer or 1×1 convolution: `y + fact(x)`."""

    slots = ("fact",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _with_term(super().forward(x), x, self.fact, self)  # type: ignore[misc,attr-defined]


def _with_term(y: torch.Tensor, x: torch.Tensor, term: nn.Module | None, layer: object) -> torch.Tensor:
    if term is None:
        return y
    if isinstance(layer, nn.Conv2d):
        return y + rearrange(term(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")
    return y + term(x)


@torch.no_grad()
def add_to_weight_(layer: nn.Module, product: torch.Tensor) -> None:
    """`weight += product`, (out, in), of a linear layer or 1×1 convolution, in place.

    Raises:
        UserError: the weight is low rank, so what is added to it would be lost.
    """
    if not owns_weight(layer):
        raise UserError(
            f"nothing can be added to the weight of a {type(layer).__name__}, which is low rank; fold that step first, as "
            "compressvit.materialise does"
        )
    weight: torch.Tensor = layer.weight
    weight.copy_(weight.double() + product.double().reshape(weight.shape))


class ScaleShift(nn.Module):
    """`γ ⊙ z + β` over the channels of z.

    Args:
        channels: their number.
        channels_first: whether they are the second dimension of (B, C, H, W) instead of the last.
    """

    def __init__(self, channels: int, channels_first: bool = False, device=None, dtype=None):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.channels_first = channels_first

    @torch.no_grad()
    def reset(self, std: float) -> None:
        """γ around 1 and β around 0, normal with this deviation; 0 is the identity."""
        nn.init.normal_(self.scale, 1.0, std)
        nn.init.normal_(self.shift, 0.0, std)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if self.channels_first:
            return z * self.scale[:, None, None] + self.shift[:, None, None]
        return z * self.scale + self.shift


class WithScaleShift:
    """Of any layer: a scale and shift of its channels behind it."""

    slots = ("ssf",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = super().forward(x)  # type: ignore[misc]
        return z if self.ssf is None else self.ssf(z)  # type: ignore[attr-defined]
