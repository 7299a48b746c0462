"""Tasks whose models are made for them, and say so by `task`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressvit.tasks.base import Task

if TYPE_CHECKING:
    from torch import nn


class OwnModels(Task):
    """Its models are timm's in no case, its head has an output for every class, and it reads its own ground truth alone."""

    needs_class_count = True
    places = True

    def fits(self, model: nn.Module) -> bool:
        return getattr(model, "task", None) == self.name

    def needs_classes(self, classes: int) -> int:
        return classes

    def reads(self, truth: Task) -> bool:
        return truth is self
