"""The `labels` term: the ground truth."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field

from compressvit.training.terms.base import Batch, LossTerm, Term, TermSetting, loss_term


@loss_term("labels")
class LabelTerm(LossTerm):
    """Cross-entropy against the ground truth. MiniViT does not use it: soft labels alone do better there."""

    needs_classes: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    weight: float = Field(0.0, ge=0)

    def build(self, setting: TermSetting) -> Term:
        return labels_term(self.weight, setting.smoothing)


def labels_term(weight: float, smoothing: float) -> Term:
    """Cross-entropy against the ground truth; images without a label (target −1) do not count."""

    def function(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits, targets = batch.student_logits.float(), batch.targets
        if targets.ndim == 2:  # mixup has smoothed already
            return F.cross_entropy(logits, targets), {}
        total = F.cross_entropy(logits, targets, label_smoothing=smoothing, ignore_index=-1, reduction="sum")
        return total / (targets >= 0).sum().clamp(min=1), {}  # 0 where no image has a label

    return Term("labels", weight, function)
