"""The `finetune` phase: train with the ground truth."""

from __future__ import annotations

from typing import ClassVar

from compressvit.training.spec import Training


class Finetune(Training):
    """Train with the ground truth alone; also how a teacher is trained from scratch."""

    name: ClassVar[str] = "finetune"
