"""iRPE: contextual relative position encoding on keys, private to each layer, as Mini-DeiT uses it.

Paper: Rethinking and Improving Relative Position Encoding for Vision Transformer, ICCV 2021, https://arxiv.org/abs/2107.14222

Product method, shared over heads: `q_n · E[:, bucket(n, m)]` is added to the logit of query n and key m, with q already scaled. The
table E (head width, buckets) is initialised to zero, so a pretrained function is kept.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.fx import wrap

from compressvit.errors import UserError
from compressvit.fitting.reference import Reference
from compressvit.model import surgery, ties
from compressvit.model.backbone import describe
from compressvit.model.calls import layers_for
from compressvit.model.family import Need
from compressvit.model.linear import weight_shape
from compressvit.model.modules import module_at
from compressvit.transforms.base import LedgerEntry, Plan, Transform, transform
from compressvit.transforms.claims import Claim, grid, slot


def piecewise_index(distance: int, ratio: float) -> int:
    """Bucket of a signed distance in tokens along one axis (iRPE, eq. 18): exact up to α, logarithmic beyond, at most β.

    α = ratio, β = 2·ratio, γ = 8·ratio. With ratio 1.9 the result lies in −3…3.
    """
    alpha, beta, gamma = ratio, 2 * ratio, 8 * ratio
    size = abs(distance)
    if size <= alpha:
        return distance  # an exact number of tokens already
    index = min(beta, round(alpha + math.log(size / alpha) / math.log(gamma / alpha) * (beta - alpha)))
    return int(math.copysign(int(index), distance))


@lru_cache(maxsize=16)
def bucket_ids(height: int, width: int, num_prefix_tokens: int, ratio: float) -> torch.Tensor:
    """(N, N) int64 table of buckets, N = prefix + height·width. Pairs with a prefix token share the extra last bucket."""
    reach = int(2 * ratio)
    side = 2 * reach + 1
    # Explicitly on the CPU: a table created under torch.device("meta") would be cached without values.
    rows, cols = (
        torch.tensor([[piecewise_index(i - j, ratio) for j in range(n)] for i in range(n)], device="cpu") + reach
        for n in (height, width)
    )
    grid = rows[:, None, :, None] * side + cols[None, :, None, :]
    grid = grid.reshape(height * width, height * width)
    ids = torch.full((num_prefix_tokens + height * width,) * 2, side * side, device="cpu")
    ids[num_prefix_tokens:, num_prefix_tokens:] = grid
    return ids


@wrap  # torch.fx does not trace its condition
def by_token(per_bucket: torch.Tensor, bucket_ids: torch.Tensor) -> torch.Tensor:
    """Values of buckets (B, H, N, buckets) at the bucket of every pair of tokens (N, N): (B, H, N, N).

    Raises:
        UserError: the table was built for another number of tokens.
    """
    tokens = per_bucket.shape[-2]
    if tokens != bucket_ids.shape[0]:
        raise UserError(
            f"iRPE was built for {bucket_ids.shape[0]} tokens and got {tokens}; build the model with the input size you use"
        )
    return per_bucket.gather(-1, bucket_ids.expand(*per_bucket.shape[:2], -1, -1))


class ContextualKeyPosition(nn.Module):
    """The position term of one layer: scaled queries (B, H, N, D) → addition to the logits (B, H, N, N).

    Args:
        head_width: D.
        grid: height and width in tokens.
        num_prefix_tokens: tokens that are not on the grid; if there are any, the table has one more bucket for pairs with them.
        ratio: α of the bucketing.
    """

    def __init__(
        self, head_width: int, grid: tuple[int, int], num_prefix_tokens: int, ratio: float, device=None, dtype=None
    ):
        super().__init__()
        buckets = (2 * int(2 * ratio) + 1) ** 2 + (num_prefix_tokens > 0)
        self.table = nn.Parameter(torch.zeros(head_width, buckets, device=device, dtype=dtype))
        self.bucketing = (*grid, num_prefix_tokens, ratio)
        self.register_buffer("bucket_ids", bucket_ids(*self.bucketing).to(self.table.device), persistent=False)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay (timm's convention): position tables."""
        return {"table"}

    def init_non_persistent_buffers(self) -> None:
        """Fill the buffers that no checkpoint contains, after `to_empty()` (timm's convention)."""
        self.bucket_ids = bucket_ids(*self.bucketing).to(self.table.device)

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return by_token(q @ self.table, self.bucket_ids)


class IRPEPlan(Plan):
    """A resolved `IRPE`: every block of the model gets a table."""

    ratio: float
    blocks: tuple[str, ...]

    def claims(self, model: nn.Module) -> list[Claim]:
        paths = [f"{path}.attn" for path in self.blocks]
        return [claim for path in paths for claim in (slot(path, "rpe_k"), grid(path))]

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        backbone = describe(model, "slotted_attention")
        infos = {info.path: info for info in backbone.blocks}
        paths = [f"{path}.attn" for path in self.blocks]
        before = ties.count_at_paths(model, paths)
        ledger = []
        for path in self.blocks:
            attention = model.get_submodule(f"{path}.attn")
            surgery.specialise(model, f"{path}.attn", backbone.slotted_attention(attention))
            names = layers_for(model.get_submodule(path), "attn.qkv")
            queries = model.get_submodule(f"{path}.{names[0]}")
            weight = next(queries.parameters())
            position = ContextualKeyPosition(
                weight_shape(queries)[0] // ((3 if len(names) == 1 else 1) * infos[path].heads),
                infos[path].resolution,
                backbone.num_prefix_tokens,
                self.ratio,
                device=weight.device,
                dtype=weight.dtype,
            )
            surgery.fill_slot(model, f"{path}.attn", "rpe_k", position)
            change = f"+ iRPE table {tuple(position.table.shape)}"
            count = before[f"{path}.attn"]
            ledger.append(LedgerEntry(f"{path}.attn", change, count, count + position.table.numel()))
        return ledger

    @torch.no_grad()
    def initialise(self, student: nn.Module, reference: Reference) -> None:
        for path in self.blocks:
            module_at(student, f"{path}.attn.rpe_k", ContextualKeyPosition).table.zero_()

    def fold(self, model: nn.Module) -> None:
        raise UserError(
            "irpe cannot be folded: its term depends on the query, so no fixed weight equals it. Ship the artifact as it is"
        )


@transform("irpe", IRPEPlan)
class IRPE(Transform):
    """Contextual relative position encoding on keys, one table per layer, shared over heads (iRPE; Mini-DeiT)."""

    needs: ClassVar[tuple[Need, ...]] = ("slotted_attention", "no_position_table", "keys_at_queries")

    ratio: float = Field(
        1.9, gt=1.0, description="α of the piecewise bucketing, in tokens; β = 2α, γ = 8α. 1.9 gives 49 buckets."
    )

    def plan(self, model: nn.Module, reference: Reference | None = None) -> IRPEPlan:
        paths = tuple(info.path for info in self.backbone(model).blocks)
        if getattr(getattr(model, "patch_drop", None), "prob", 0):
            raise UserError(
                "irpe needs every token at its place on the grid, but the model drops patches in training; "
                "build it with patch_drop_rate=0"
            )
        return IRPEPlan(ratio=self.ratio, blocks=paths)
