"""The `feature` term: the tokens after the final norm, a detector's pyramid of maps, or a segmenter's last map."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import nn

from compressvit.errors import UserError
from compressvit.model.outputs import Outputs, tensors_of
from compressvit.training import losses
from compressvit.training.terms.base import Batch, LossTerm, Term, TermSetting, loss_term
from compressvit.training.tokens import differences, resized

if TYPE_CHECKING:
    from compressvit.training.tokens import Layout


@loss_term("feature")
class FeatureTerm(LossTerm):
    """Distance between the tokens after the final norm, to distil a backbone without a classifier; of a detector or segmenter between maps.

    The maps are those of a detector's pyramid, or the one that a segmenter's head reads, compared at every place, mean over levels. The
    teacher may have another width (a linear projection of the student's tokens is trained with the student, and dropped when the phase
    ends), another grid of patches (its map is resized to the student's) and other prefix tokens (class tokens are compared; the mean of the
    patches stands for one that only one of them has; where their distillation and register tokens differ, these are left out).
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
        if setting.absent:
            raise UserError(f"losses.feature: {setting.absent}; set losses.feature.weight=0")
        ours, theirs = setting.layout, setting.teacher_layout
        if (
            ours and theirs and (ours != theirs or ours.grid is None)
        ):  # of maps, the size is known only when they are there
            return self._across(setting, ours, theirs)

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

        return Term(self.name, self.weight, function, ((path, "output"),), ((setting.teacher_features, "output"),))

    def _across(self, setting: TermSetting, ours: Layout, theirs: Layout) -> Term:
        """Between models whose features are arranged otherwise."""
        path, other = setting.features, setting.teacher_features
        project = _projection(ours.width, theirs.width, setting.device) if ours.width != theirs.width else None

        def function(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            student, teacher = batch.student_taps[path]["output"], batch.teacher_taps[other]["output"]
            patches = ours.patches(student)
            others = resized(theirs.patches(teacher), (patches.shape[1], patches.shape[2]))
            each = losses.feature(patches if project is None else project(patches), others, self.form)
            first, wanted = ours.before(student, theirs), theirs.before(teacher, ours)
            if first is None or wanted is None:
                return each, {}
            whole = losses.feature(first if project is None else project(first), wanted, self.form)
            return self.prefix * whole + (1 - self.prefix) * each, {"feature_prefix": whole, "feature_patches": each}

        taps = ((path, "output"),), ((other, "output"),)
        return Term(self.name, self.weight, function, *taps, module=project, note=differences(ours, theirs))

    def _of_maps(self, student: Outputs, teacher: Outputs) -> torch.Tensor:
        """The mean over the maps (B, C, H, W) of a pyramid, whose vectors along C are compared."""
        pairs = zip(tensors_of(student), tensors_of(teacher), strict=True)
        return torch.stack(
            [losses.feature(ours.movedim(1, -1), theirs.movedim(1, -1), self.form) for ours, theirs in pairs]
        ).mean()


def _projection(inputs: int, outputs: int, device: torch.device) -> nn.Linear:
    """A layer that begins with rows, or columns, at right angles, whatever is drawn elsewhere."""
    layer = nn.Linear(inputs, outputs, device=device)
    if device.type != "meta":
        drawn = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            layer.weight.copy_(torch.linalg.qr(drawn)[0] if outputs >= inputs else torch.linalg.qr(drawn.mT)[0].mT)
            layer.bias.zero_()
    return layer
