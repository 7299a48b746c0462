"""The `distill` phase: train a student to behave as its teacher."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from compressvit.training.spec import Training
from compressvit.training.term_specs import Losses


class Distill(Training):
    """Train the student to behave as its teacher (MiniViT's weight distillation by default)."""

    name: ClassVar[str] = "distill"

    losses: Losses = Losses()
    layers: Literal["matched", "auto"] | tuple[tuple[int, int], ...] = Field(
        "matched",
        description="Pairs [student block, teacher block] for the relation losses, counted from 0 over the whole model. "
        "'matched': the last block of every share group (of every stage, where nothing is shared), with the teacher's block "
        "of the same index; needs teacher and student of the same depths. 'auto': the last block of every share group (every block, "
        "where nothing is shared), with the teacher's block that is most like it when the phase begins, by CKA on the calibration "
        "images, in order and within stage, resolution and window shift; depths may differ.",
    )

    @property
    def needs_labels(self) -> bool:
        return self.losses.labels.weight > 0

    @field_validator("losses")
    @classmethod
    def _something_to_learn(cls, losses: Losses) -> Losses:
        terms = [*(getattr(losses, n) for n in type(losses).model_fields if n != "torchdistill"), *losses.torchdistill]
        if not any(term.weight for term in terms):
            raise ValueError("every loss term has weight 0, so there is nothing to learn; give one a weight")
        return losses
