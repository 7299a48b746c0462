"""The `feature` term: the tokens after the final norm, or a detector's pyramid of maps."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from compressvit.model.outputs import Outputs, tensors_of
from compressvit.training import losses
from compressvit.training.terms.base import Batch, LossTerm, Term, TermSetting, loss_term


@loss_term("feature")
class FeatureTerm(LossTerm):
    """Distance between the tokens after the final norm, to distil a backbone without a classifier; of a detector between its maps.

    The maps are those of its pyramid, compared at every place, mean over levels.
    """

    weight: float = Field(0.0, ge=0)
    form: Literal["cosine", "mse"] = "cosine"
    prefix: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Weight of all prefix tokens (class, registers) together within the term; the other tokens share the rest. With "
        "equal weights a class token would be one of hundreds. Ignored if there are none.",
    )

    def build(self, setting: TermSetting) -> Term:
        path = setting.features
        count = setting.prefix_tokens

        def function(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            student, teacher = (taps[path]["output"] for taps in (batch.student_taps, batch.teacher_taps))
            if not isinstance(student, torch.Tensor):
                return self._of_maps(student, teacher), {}
            if not count or student.shape != teacher.shape:  # the loss itself raises for different shapes
                return losses.feature(student, teacher, self.form), {}
            prefix, patches = (
                losses.feature(student[:, part], teacher[:, part], self.form)
                for part in (slice(count), slice(count, None))
            )
            loss = self.prefix * prefix + (1 - self.prefix) * patches
            return loss, {"feature_prefix": prefix, "feature_patches": patches}

        return Term(self.name, self.weight, function, ((path, "output"),), ((path, "output"),))

    def _of_maps(self, student: Outputs, teacher: Outputs) -> torch.Tensor:
        """The mean over the maps (B, C, H, W) of a pyramid, whose vectors along C are compared."""
        pairs = zip(tensors_of(student), tensors_of(teacher), strict=True)
        return torch.stack(
            [losses.feature(ours.movedim(1, -1), theirs.movedim(1, -1), self.form) for ours, theirs in pairs]
        ).mean()
