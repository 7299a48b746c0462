"""What a student loses on images that are held out, by which the size of one is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn

from compressvit.errors import UserError
from compressvit.tasks.base import task_of

# Figures, each with whether a larger one is better; all drops are points of accuracy below the teacher's.
FIGURES = {"cosine": True, "top1_drop": False, "worst_class_drop": False, "worst_domain_drop": False}


class Judge(Protocol):
    """Judges students.

    Attributes:
        images: by which images, in words.
    """

    images: str

    def refuse(self, figures: list[str]) -> None:
        """Raise a `UserError` if one of these figures cannot be measured; as far as possible before an image is read."""

    def figures(self, student: nn.Module, wanted: list[str]) -> dict[str, float]:
        """Those of a student, by name (see `FIGURES`)."""


class Source(Protocol):
    """The teacher, and its calibration images (`compressvit.fitting.reference.Reference`)."""

    model: nn.Module

    def batches(self) -> Iterator[torch.Tensor]: ...
    def held_out(self) -> torch.Tensor: ...


class OnCalibration:
    """Judges by the cosine of outputs on those calibration images that are held out of fits, where there are no others."""

    images = "the calibration images that are held out of the fit, and choose its ridge as well"

    def __init__(self, reference: Source):
        self.reference = reference

    def refuse(self, figures: list[str]) -> None:
        if other := next((name for name in figures if name != "cosine"), None):
            raise UserError(
                f"shrink.keep.{other} needs images with labels, which calibration images are without; give keep={{'cosine': 0.98}}, or use "
                "`compressvit.shrink` with a folder of them"
            )

    @torch.inference_mode()
    def figures(self, student: nn.Module, wanted: list[str]) -> dict[str, float]:
        teacher = self.reference.model.eval()
        task = task_of(teacher)
        batches = list(self.reference.batches())
        held_out = self.reference.held_out()
        if not held_out.any():
            raise UserError(
                "shrink.keep: none of the calibration images is held out, so none can say what is lost; give more of them, or a budget"
            )
        student = student.to(batches[0].device, torch.float32).eval()
        metrics = task.metrics(student, teacher, False)
        for images, chosen in zip(batches, held_out.split([len(batch) for batch in batches]), strict=True):
            if chosen.any():
                seen = images[chosen.to(images.device)]
                nothing = torch.full((len(seen),), -1, device=seen.device)
                metrics.add(task.run(student, seen), nothing, task.run(teacher, seen))
        cosine = metrics.result().get("cosine")
        if cosine is None:
            raise UserError(
                f"shrink.keep.cosine compares outputs, which are none of a model for '{task.name}'; give a budget"
            )
        return {"cosine": cosine}
