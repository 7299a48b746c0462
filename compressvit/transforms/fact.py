"""FacT: the weight updates of all projections of a frozen ViT as one factored tensor.

Paper: FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer, AAAI 2023, https://arxiv.org/abs/2212.03145

The projections of a block are cut into M×M slots: q, k, v, the output, and as many of fc1 and of fc2 as the hidden width holds M (12
in all at 4M). `ΔW_j = s·V Σ_j U` with U (r, M) and V (M, r) shared by all blocks of one width; in the tensor-train form (TT) Σ_j is
free, in the Tucker form (TK) `Σ_j = Σ_k p_jk C_k` with a shared C (r, r, r). V is zero at the start; in training, dropout before V.
TK of rank 16 on ViT-B: 30,976. It merges exactly.

The released code of TK scrambles the slots of fc1 and fc2 by a reshape; here slot j of a projection is its own piece j, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from pydantic import Field
from torch import nn
from torch.fx import wrap

from compressvit.errors import UserError
from compressvit.fitting.reference import Reference
from compressvit.model import surgery, ties
from compressvit.model.backbone import projection
from compressvit.model.calls import layers_for
from compressvit.model.family import Need
from compressvit.model.linear import weight_shape
from compressvit.transforms.base import LedgerEntry, record, transform
from compressvit.transforms.on_blocks import OnBlocks
from compressvit.transforms.record import made_narrower
from compressvit.transforms.term import TermPlan, add_to_weight_, new_like, with_term

wrap("rearrange")  # torch.fx records the call: einops does not take its proxies

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


class FacTTerm(nn.Module):
    """`scale · V Σ_j U` for every M×M slot j of a projection: its outputs (fused qkv, fc1) or its inputs (fc2) cut into pieces of M.

    Args:
        width: M; U is (r, M), V is (M, r), both shared by all projections.
        rank: r.
        slots: pieces of the projection.
        on_inputs: whether the inputs are cut instead of the outputs.
        scale: s.
        tucker: Σ_j = Σ_k p_jk C_k with a shared C (r, r, r) and a private p (slots, r) instead of a private Σ (slots, r, r).
        dropout: of what V reads, in training.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        slots: int,
        on_inputs: bool,
        scale: float,
        tucker: bool,
        dropout: float = 0.0,
        device=None,
        dtype=None,
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
        self.slots, self.on_inputs, self.scale, self.tucker = slots, on_inputs, scale, tucker
        self.dropout = nn.Dropout(dropout)

    @torch.no_grad()
    def reset(self, slots: int) -> None:
        """Start as the paper's code does: U and Σ as linear layers, C and p Xavier-uniform, V zero, so that ΔW is zero.

        Args:
            slots: of all terms that share U and V. In the code p is one matrix (slots, r), and its spread depends on them.
        """
        rank, width = self.u.shape
        nn.init.uniform_(self.u, -(width**-0.5), width**-0.5)
        nn.init.zeros_(self.v)
        if self.tucker:
            nn.init.xavier_uniform_(self.core)
            bound = (6 / (slots + rank)) ** 0.5
            nn.init.uniform_(self.mix, -bound, bound)
        else:
            inputs = rank * (len(self.sigma) if self.on_inputs else 1)
            nn.init.uniform_(self.sigma, -(inputs**-0.5), inputs**-0.5)

    def _sigma(self) -> torch.Tensor:  # (slots, r, r)
        return torch.einsum("jk,ksr->jsr", self.mix, self.core) if self.tucker else self.sigma

    def product(self) -> torch.Tensor:  # (out, in)
        slots = self.scale * self.v @ self._sigma() @ self.u
        return rearrange(slots, "j o i -> o (j i)") if self.on_inputs else rearrange(slots, "j o i -> (j o) i")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sigma = self._sigma() * self.scale
        if self.on_inputs:
            inner = rearrange(x, "... (j i) -> ... j i", j=self.slots) @ self.u.T
            return self.dropout(torch.einsum("...jr,jsr->...s", inner, sigma)) @ self.v.T
        inner = self.dropout(torch.einsum("...r,jsr->...js", x @ self.u.T, sigma))
        return (inner @ self.v.T).flatten(-2)


class WithFacT(surgery.Mixin):
    """Mixin for a linear layer or 1×1 convolution: `y + fact(x)`."""

    slots = ("fact",)

    fact: nn.Module | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return with_term(super().forward(x), x, self.fact, self)


class FacTPlan(TermPlan):
    """A resolved `FacT`: the layers of each width, which share U and V (and C)."""

    mixin = WithFacT
    slot = "fact"

    groups: tuple[tuple[str, ...], ...]
    form: Literal["tt", "tk"]
    rank: int
    scale: float
    dropout: float = 0.0  # of artifacts that do not say

    @property
    def sites(self) -> Iterable[str]:
        return tuple(path for group in self.groups for path in group)

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        return record(model, self.sites, lambda path: self.add(model, path), then=lambda: self._share(model))

    def _share(self, model: nn.Module) -> None:
        shared = ("u", "v", "core") if self.form == "tk" else ("u", "v")
        ties.tie(model, [[f"{path}.fact.{name}" for path in group] for group in self.groups for name in shared])

    def term(self, module: nn.Module, path: str) -> tuple[nn.Module, str]:
        shape = weight_shape(module)
        width, longer = min(shape), max(shape)
        on_inputs, tucker = shape[1] > width, self.form == "tk"
        options = (width, self.rank, longer // width, on_inputs, self.scale, tucker, self.dropout)
        return FacTTerm(
            *options, **new_like(next(module.parameters()))
        ), f"+ FacT-{self.form.upper()} of rank {self.rank}"

    @torch.no_grad()
    def initialise(self, student: nn.Module, reference: Reference) -> None:
        terms = self.terms(student)
        for group in self.groups:
            slots = sum(terms[path].slots for path in group)
            for path in group:
                terms[path].reset(slots)

    def fold_term(self, module: nn.Module, term: Any, path: str) -> None:
        """`weight += s·V Σ U`, slot by slot."""
        add_to_weight_(module, term.product())


@transform("fact", FacTPlan)
class FacT(OnBlocks):
    """Low-rank updates of all projections, with shared outer factors; the backbone is frozen (FacT)."""

    freezes = True
    needs: ClassVar[tuple[Need, ...]] = ("attention", "alike_blocks")
    blind_at_start: ClassVar[dict[str, str]] = dict.fromkeys(
        ("fact.u", "fact.core", "fact.mix", "fact.sigma"), "V starts at zero"
    )

    form: Literal["tt", "tk"] = Field(
        "tk",
        description="tt: tensor train (a free Σ per slot); tk: Tucker. In tk the released code mixes up the slots of fc1 and fc2 by a "
        "reshape; here every slot has its own Σ, as in the paper.",
    )
    rank: int = Field(16, ge=1, description="Rank r.")
    scale: float = Field(1.0, gt=0, description="Scale s; the paper chooses it per task from 0.01, 0.1, 1, 10, 100.")
    dropout: float = Field(
        0.1, ge=0, lt=1, description="Dropout of what V reads, in training; 0.1 in the released code."
    )

    @classmethod
    def examples(cls) -> Sequence[FacT]:
        return (FacT(rank=3), FacT(rank=2, form="tt", scale=0.5))

    def plan(self, model: nn.Module, reference: Reference | None = None) -> FacTPlan:
        groups = []
        chosen = self.chosen(model)
        for stage in self.backbone(model).stages:
            adapted = [info for info in stage if info in chosen]
            for info in adapted:
                for name in _layers(model, info.path):
                    path = f"{info.path}.{name}"
                    shape = weight_shape(projection(model, path, "fact"))
                    if min(shape) != info.width or max(shape) % info.width:
                        raise UserError(
                            f"fact cuts projections into {info.width}×{info.width} slots, which {path}, {shape}"
                            f"{made_narrower(model, path)}, is not made of; use lora, which takes any shape"
                        )
                    if self.rank > info.width:
                        raise UserError(f"fact.rank={self.rank} is more than the width {info.width} of {info.path}")
            if adapted:
                groups.append(tuple(f"{info.path}.{name}" for info in adapted for name in _layers(model, info.path)))
        settings = self.model_dump(include={"form", "rank", "scale", "dropout"})
        return FacTPlan(groups=tuple(groups), **settings)


def _layers(model: nn.Module, path: str) -> list[str]:
    """The projections of a block."""
    block = model.get_submodule(path)
    return [name for whole in LAYERS for name in layers_for(block, whole)]
