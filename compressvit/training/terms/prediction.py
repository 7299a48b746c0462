"""The `prediction` term: what the teacher predicts."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from compressvit.training import losses
from compressvit.training.terms.base import Batch, LossTerm, Term, TermSetting, loss_term


@loss_term("prediction")
class PredictionTerm(LossTerm):
    """Cross-entropy against the teacher's soft labels, mean over the batch; of detectors and segmenters how far apart they are.

    Detectors are compared query by query (adamixer), or on anchors and the teacher's proposals (faster_rcnn, mask_rcnn), by the divergence
    of classes and the distance of boxes, per object of the teacher or mean over anchors; segmenters by the
    divergence of the classes of each pixel, mean over pixels; see `Task.imitation`.
    """

    needs_classes: ClassVar[bool] = True
    compares_logits: ClassVar[bool] = True

    weight: float = Field(1.0, ge=0)
    temperature: float = Field(1.0, gt=0, description="Both models' logits are divided by it; there is no T² factor.")

    def build(self, setting: TermSetting) -> Term:
        task = setting.task

        def function(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            assert batch.teacher_logits is not None, "only a distillation has this term"
            if task is None or task.outputs_are_logits:
                return losses.prediction(batch.student_logits, batch.teacher_logits, self.temperature), {}
            parts = task.imitation(batch.student_logits, batch.teacher_logits, self.temperature)
            named = {f"prediction_{name.removeprefix('loss_')}": value for name, value in parts.items()}
            return torch.stack(list(parts.values())).sum(), named

        return Term(self.name, self.weight, function)
