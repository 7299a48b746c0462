"""The `feature` term: the tokens after the final norm."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from compressvit.training import losses
from compressvit.training.terms.base import Batch, LossTerm, Term, TermSetting, loss_term

_TAP = ("norm", "output")


@loss_term("feature")
class FeatureTerm(LossTerm):
    """Distance between the tokens after the final norm; used to distil a backbone without a classifier."""

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
        path, io = _TAP
        count = setting.prefix_tokens

        def function(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            student, teacher = batch.student_taps[path][io], batch.teacher_taps[path][io]
            if not count or student.shape != teacher.shape:  # the loss itself raises for different shapes
                return losses.feature(student, teacher, self.form), {}
            prefix, patches = (
                losses.feature(student[:, part], teacher[:, part], self.form)
                for part in (slice(count), slice(count, None))
            )
            loss = self.prefix * prefix + (1 - self.prefix) * patches
            return loss, {"feature_prefix": prefix, "feature_patches": patches}

        return Term(self.name, self.weight, function, (_TAP,), (_TAP,))
