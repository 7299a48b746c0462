"""Whether a student that was fitted to images does as well on others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from compressvit.data.input import Side
from compressvit.runs.files import Fitted
from compressvit.tasks.targets import NO_LABEL
from compressvit.training.evaluate import evaluate

IMAGES = 64  # of those that the student was fitted to, at most
# Beyond both, more images would help: of what the student lost on others, a third it did not lose on its own, and it is no rounding.
TIMES, LEAST = 1.5, 0.005


def on_fitted(
    student: Side, teacher: Side, images: Callable[[], Iterable[torch.Tensor]], device: torch.device
) -> Fitted | None:
    """The cosine of a student's outputs to its teacher's on images that it was fitted to; None where there is none.

    Args:
        student, teacher: on `device`.
        images: batches (B, C, H, W), normalised for the student.
    """

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        left = IMAGES
        for batch in images():
            yield batch[:left], torch.full((len(batch[:left]),), NO_LABEL)
            left -= len(batch)
            if left <= 0:
                return

    found = evaluate(student, batches(), device, teacher=teacher, labelled=False)
    if found.get("cosine") is None:
        return None
    return Fitted(images=int(found["images"] or 0), cosine=found["cosine"])


def beside(fitted: Fitted | None, held_out: float | None) -> Fitted | None:
    """The same, with the cosine on held-out images, if it has none yet; None where that is not known."""
    if fitted is None or fitted.held_out is not None:
        return fitted
    if held_out is None:
        return None
    lost, lost_on_others = 1 - fitted.cosine, 1 - held_out
    more = lost_on_others >= TIMES * lost and lost_on_others - lost >= LEAST
    return fitted.model_copy(update={"held_out": held_out, "more_would_help": more})
