"""The `hidden_relation` term: relations among the output tokens of paired blocks (MiniViT)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from einops import rearrange
from pydantic import Field

from compressvit.training import losses
from compressvit.training.terms.base import Batch, LossTerm, Term, TermSetting, loss_term


@loss_term("hidden_relation")
class HiddenRelationTerm(LossTerm):
    """MiniViT's hidden-state distillation (γ): relations of the output tokens of the paired blocks."""

    weight: float = Field(0.1, ge=0)
    form: Literal["cosine_mse", "softmax_ce"] = Field(
        "cosine_mse", description="cosine_mse: the released code's form; softmax_ce: the paper's."
    )
    scale: float = Field(49.0, gt=0, description="Factor of cosine_mse; the released code's window area.")

    def build(self, setting: TermSetting) -> Term | None:
        pairs = setting.pairs
        if not pairs:
            return None

        def function(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            values = [
                losses.hidden_relation(
                    _tokens(batch.student_taps, p.student.path, p.student_skip),
                    _tokens(batch.teacher_taps, p.teacher.path, p.teacher_skip),
                    self.form,
                    self.scale,
                )
                for p in pairs
            ]
            return torch.stack(values).mean(), {}

        return Term(
            self.name,
            self.weight,
            function,
            tuple((p.student.path, "output") for p in pairs),
            tuple((p.teacher.path, "output") for p in pairs),
        )


def _tokens(taps: dict[str, dict[str, Any]], path: str, skip: int) -> torch.Tensor:
    x = taps[path]["output"]
    return (rearrange(x, "b h w c -> b (h w) c") if x.ndim == 4 else x)[:, skip:]
