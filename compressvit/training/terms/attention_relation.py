"""The `attention_relation` term: relations among queries, keys and values of paired layers (MiniViT).

Queries and keys are compared as their projections give them, before rotary positions turn them: those are the same in student and teacher
and learn nothing, and turned ones of two tokens would agree or not by how far apart the tokens are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from compressvit.model.taps import qkv_taps, tapped_qkv
from compressvit.training import losses
from compressvit.training.terms.base import Batch, LossTerm, Term, TermSetting, deepest_first, loss_term

if TYPE_CHECKING:
    from compressvit.training.pairs import LayerPair


@loss_term("attention_relation")
class AttentionRelationTerm(LossTerm):
    """MiniViT's attention distillation (β): relations of queries, keys and values of the paired layers."""

    weight: float = Field(1.0, ge=0)
    heads: int = Field(
        1, ge=1, description="Number of relation heads that q, k and v are split into; must divide both widths."
    )

    def build(self, setting: TermSetting) -> Term | None:
        pairs = [pair for pair in setting.pairs if pair.attends_alike]
        if not pairs:
            return None

        def function(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            values = []
            for pair in deepest_first(pairs):
                values.append(losses.attention_relation(*_projections(pair, batch), self.heads, with_kl=True))
                batch.used(qkv_taps(pair.student), qkv_taps(pair.teacher))
            loss, kl = (torch.stack(v).mean() for v in zip(*values[::-1], strict=True))
            # The cross-entropy cannot fall below the teacher's entropy; training can only reduce the difference, the KL divergence.
            return loss, {"attention_relation_kl": kl}

        return Term(
            self.name,
            self.weight,
            function,
            tuple(tap for p in pairs for tap in qkv_taps(p.student)),
            tuple(tap for p in pairs for tap in qkv_taps(p.teacher)),
        )


def _projections(pair: LayerPair, batch: Batch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Queries, keys and values (B, N, ·) of student and teacher."""
    ours, theirs = tapped_qkv(batch.student_taps, pair.student), tapped_qkv(batch.teacher_taps, pair.teacher)
    both = [pair.beside(s, t, "losses.attention_relation") for s, t in zip(ours, theirs, strict=True)]
    return [s for s, _ in both], [t for _, t in both]
