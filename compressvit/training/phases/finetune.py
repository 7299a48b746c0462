"""The `finetune` phase: train with the ground truth."""

from __future__ import annotations

from compressvit.training.phases.base import PhaseSpec, phase


@phase("finetune")
class Finetune(PhaseSpec):
    """Train with the ground truth alone; also how a teacher is trained from scratch."""
