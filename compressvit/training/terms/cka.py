"""The `cka` term: how alike the tokens of paired blocks are, whatever their widths (CKA)."""

from __future__ import annotations

from pydantic import Field

from compressvit.training import losses
from compressvit.training.terms.base import LossTerm, Term, TermSetting, between_blocks, loss_term


@loss_term("cka")
class CKATerm(LossTerm):
    """1 − linear CKA of what the paired blocks pass on, with every token of the batch as a sample, mean over the pairs.

    It asks for the teacher's representation up to rotation and scale, so that student and teacher may differ in width without a projection;
    also in their grid of patches (both are then on the smaller one) and in tokens before the patches.
    """

    weight: float = Field(0.0, ge=0)

    def build(self, setting: TermSetting) -> Term | None:
        return between_blocks(self, setting, losses.cka)
