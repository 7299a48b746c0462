"""The `finetune` phase: train with the ground truth."""

from __future__ import annotations

from compressvit.training.phases.base import PhaseSpec, phase


@phase("finetune")
class Finetune(PhaseSpec):
    """Train on the labels only, also used to train a teacher from scratch."""
