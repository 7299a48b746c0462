"""The `prediction` term: the teacher's soft labels."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from compressvit.training import losses
from compressvit.training.terms.base import Batch, LossTerm, Term, TermSetting, loss_term


@loss_term("prediction")
class PredictionTerm(LossTerm):
    """Cross-entropy of the student against the teacher's soft labels, mean over the batch."""

    needs_classes: ClassVar[bool] = True
    compares_logits: ClassVar[bool] = True

    weight: float = Field(1.0, ge=0)
    temperature: float = Field(1.0, gt=0, description="Both models' logits are divided by it; there is no T² factor.")

    def build(self, setting: TermSetting) -> Term:
        def function(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            assert batch.teacher_logits is not None, "only a distillation has this term"
            return losses.prediction(batch.student_logits, batch.teacher_logits, self.temperature), {}

        return Term(self.name, self.weight, function)
