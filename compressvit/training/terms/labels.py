"""The `labels` term: the ground truth."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from compressvit.tasks.base import TASKS, Task
from compressvit.training.terms.base import Batch, LossTerm, Term, TermSetting, loss_term


@loss_term("labels")
class LabelTerm(LossTerm):
    """Cross-entropy against the ground truth. MiniViT does not use it: soft labels alone do better there."""

    needs_classes: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    weight: float = Field(0.0, ge=0)

    def build(self, setting: TermSetting) -> Term:
        return labels_term(self.weight, setting.smoothing, setting.task)


def labels_term(weight: float, smoothing: float, task: Task | None = None) -> Term:
    """The task's loss against the ground truth; that of a classification where none is given."""
    task = task or TASKS["classification"]

    def function(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if batch.targets is None:  # in a plan, of a task whose targets cannot be made up
            raise NotImplementedError
        return task.loss(batch.student_logits, batch.targets, smoothing), {}

    return Term("labels", weight, function)
