"""Losses and gradients that are not finite: how many steps a phase leaves out because of them, and where to look first when it stops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compressvit import processes
from compressvit.data.input import Side
from compressvit.errors import UserError
from compressvit.model.outputs import tensors_of
from compressvit.training.meters import Reading
from compressvit.training.phase import Phase

ADVICE = "Try a smaller lr, a longer warm-up, clip_grad, or precision: fp32"


@dataclass
class Skips:
    """Counts the optimiser steps that a phase leaves out.

    Attributes:
        limit: as many may be; with 0 nobody waits for the device to know whether one must.
        count: so many were.
    """

    limit: int
    count: int = 0

    def take(self, finite: torch.Tensor) -> bool:
        """Whether a step with these losses and gradients, all `finite` or not, is left out; then it is counted."""
        if self.limit == 0 or self.count >= self.limit or bool(finite):
            return False
        self.count += 1
        return True

    def words(self, dropped: Sequence[Reading]) -> str:
        """Which step was left out, from the readings of its batches."""
        losses = ", ".join(f"{reading.loss:.4g}" for reading in dropped)
        return (
            f"step {dropped[-1].step} is left out, since its loss ({losses}) or gradient is not finite: {self.count} of at most "
            f"{self.limit}"
        )


def require_finite(
    phase: Phase, readings: Iterable[Reading], where_to_look: Callable[[], str], *, gradients: bool
) -> None:
    """Check what was read of the batches of a phase.

    Args:
        where_to_look: what is wrong with the models or the images, in a sentence; called where a value is not finite.
        gradients: also check the gradients' norms, which mixed precision itself does.

    Raises:
        UserError: a loss or a norm is not finite.
    """
    for reading in readings:
        norm = reading.gradient_norm
        if not math.isfinite(reading.loss):
            raise processes.told_once(diverged(phase, reading, f"the loss is {reading.loss}", where_to_look()))
        if gradients and norm is not None and not math.isfinite(norm):
            raise processes.told_once(diverged(phase, reading, f"the gradient's norm is {norm}", where_to_look()))


def diverged(phase: Phase, reading: Reading, what: str, look: str) -> UserError:
    """The error of a phase in which `what` is not finite, with the terms' values at that step, and where to look first."""
    terms = ", ".join(f"{k} {v:.4g}" for k, v in reading.terms.items())
    kept = f"the last good checkpoint is kept: {phase.checkpoint}" if phase.begun else "no checkpoint had been written"
    return UserError(f"{phase.name}: {what} at step {reading.step} ({terms}); stopped, and {kept}. {look}")


def where_to_look(
    student: Side, teacher: Side | None, batches: Iterable[Any], joined: Callable[[], None] = lambda: None
) -> str:
    """Where a value that is not finite comes from: the weights of the teacher or the student, the images, or what the teacher makes
    of these; where all of them are finite, from the training.

    Args:
        student: the model that is trained, with the weights from before the step.
        batches: (images, targets), of which the first is looked at.
        joined: makes whole models of those in shards.
    """
    joined()
    for whose, side in (("teacher", teacher), ("model that is trained", student)):
        if side is not None and (name := _first_broken(side.model)) is not None:
            return f"{name} of the {whose} is not finite: look at the file of its weights first"
    with suppress(Exception):  # the error that is being told is another one
        images = next(iter(batches))[0]
        if not images.isfinite().all():
            return "An image of the first batch has values that are not finite: look at the data first"
        if teacher is not None and not _outputs_are_finite(teacher, images, student):
            return (
                "The teacher's weights are finite, and its outputs for the first batch are not: look at the file of its weights first, "
                "and at data.mean and data.std"
            )
    return ADVICE


def _outputs_are_finite(teacher: Side, images: torch.Tensor, student: Side) -> bool:
    """Of images that are normalised for the student."""
    device = next(teacher.model.parameters()).device
    with torch.no_grad():
        outputs = teacher.model(teacher.converter(student.input)(images.to(device)))
    return all(bool(value.isfinite().all()) for value in tensors_of(outputs))


def _first_broken(model: nn.Module) -> str | None:
    """The first parameter or buffer that is not finite."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return next((name for name, value in tensors if value.is_floating_point() and not value.isfinite().all()), None)
