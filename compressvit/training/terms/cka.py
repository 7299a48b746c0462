"""The `cka` term: how alike the tokens of paired blocks are, whatever their widths (CKA)."""

from __future__ import annotations

import torch
from pydantic import Field

from compressvit.training import losses
from compressvit.training.terms.base import Batch, LossTerm, Term, TermSetting, loss_term


@loss_term("cka")
class CKATerm(LossTerm):
    """1 − linear CKA of what the paired blocks pass on, with every token of the batch as a sample, mean over the pairs.

    It asks for the teacher's representation up to rotation and scale, so that student and teacher may differ in width without a projection;
    also in their grid of patches (both are then on the smaller one) and in tokens before the patches.
    """

    weight: float = Field(0.0, ge=0)

    def build(self, setting: TermSetting) -> Term | None:
        pairs = setting.pairs
        if not pairs:
            return None

        def function(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            values = [losses.cka(*pair.tokens(batch.student_taps, batch.teacher_taps, "losses.cka")) for pair in pairs]
            return torch.stack(values).mean(), {}

        return Term(
            self.name,
            self.weight,
            function,
            tuple((pair.student.path, "output") for pair in pairs),
            tuple((pair.teacher.path, "output") for pair in pairs),
        )
