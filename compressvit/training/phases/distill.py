"""The `distill` phase: train a student to behave as its teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from compressvit.training.spec import Training
from compressvit.training.terms.section import LossSection, losses_section

if TYPE_CHECKING:
    Losses = LossSection
else:
    Losses = losses_section()  # a key for every loss term that is installed


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
        return any(term.needs_labels for term in self.losses.terms())

    @field_validator("losses")
    @classmethod
    def _something_to_learn(cls, losses: LossSection) -> LossSection:
        if not losses.terms():
            raise ValueError("every loss term has weight 0, so there is nothing to learn; give one a weight")
        return losses
