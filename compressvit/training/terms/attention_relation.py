"""The `attention_relation` term: relations among queries, keys and values of paired layers (MiniViT)."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from compressvit.training import losses
from compressvit.training.terms.base import Batch, LossTerm, Term, TermSetting, loss_term


@loss_term("attention_relation")
class AttentionRelationTerm(LossTerm):
    """MiniViT's attention distillation (β): relations of queries, keys and values of the paired layers."""

    weight: float = Field(1.0, ge=0)
    heads: int = Field(
        1, ge=1, description="Number of relation heads that q, k and v are split into; must divide both widths."
    )

    def build(self, setting: TermSetting) -> Term | None:
        pairs = setting.pairs
        if not pairs:
            return None

        def function(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            values = [
                losses.attention_relation(
                    _qkv(batch.student_taps, p.student.path, p.student_skip),
                    _qkv(batch.teacher_taps, p.teacher.path, p.teacher_skip),
                    self.heads,
                    with_kl=True,
                )
                for p in pairs
            ]
            loss, kl = (torch.stack(v).mean() for v in zip(*values, strict=True))
            # The cross-entropy cannot fall below the teacher's entropy; training can only reduce the difference, the KL divergence.
            return loss, {"attention_relation_kl": kl}

        return Term(
            self.name,
            self.weight,
            function,
            tuple((f"{p.student.path}.attn.qkv", "output") for p in pairs),
            tuple((f"{p.teacher.path}.attn.qkv", "output") for p in pairs),
        )


def _qkv(taps: dict[str, dict[str, Any]], path: str, skip: int) -> tuple[torch.Tensor, ...]:
    return tuple(taps[f"{path}.attn.qkv"]["output"][:, skip:].chunk(3, dim=-1))
