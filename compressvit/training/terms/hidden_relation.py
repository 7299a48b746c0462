"""The `hidden_relation` term: relations among the output tokens of paired blocks (MiniViT)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compressvit.training import losses
from compressvit.training.terms.base import LossTerm, Term, TermSetting, between_blocks, loss_term


@loss_term("hidden_relation")
class HiddenRelationTerm(LossTerm):
    """MiniViT's hidden-state distillation (γ): relations of the output tokens of the paired blocks.

    The two may differ in width, in their grid of patches (both are then on the smaller one) and in tokens before the patches.
    """

    weight: float = Field(0.1, ge=0)
    form: Literal["cosine_mse", "softmax_ce"] = Field(
        "cosine_mse", description="cosine_mse: the released code's form; softmax_ce: the paper's."
    )
    scale: float = Field(49.0, gt=0, description="Factor of cosine_mse; the released code's window area.")

    def build(self, setting: TermSetting) -> Term | None:
        return between_blocks(
            self, setting, lambda student, teacher: losses.hidden_relation(student, teacher, self.form, self.scale)
        )
