"""Asking a teacher for its answers to a batch: its outputs, and what the loss terms read inside it; and the student for its features."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from compressvit.data.input import InputConfig, Side
from compressvit.data.order import View
from compressvit.model.taps import Taps
from compressvit.tasks.base import Mixing
from compressvit.training.terms import Term

Taken = dict[str, dict[str, Any]]  # what taps have recorded, by path


@dataclass(frozen=True)
class Shown:
    """Which images a batch shows.

    Attributes:
        view: that they are shown in.
        places: of the images in the training set, int64 (B,) on the CPU; -1 for an image that is not the one of its place.
        batch: the number of the batch in its epoch.
    """

    view: View
    places: torch.Tensor
    batch: int

    def chosen(self, mixing: Mixing, targets: Any) -> Shown:
        """The same of the part of a batch that can be mixed."""
        return replace(self, places=mixing.choose(self.places, targets)[0])

    @property
    def mixing_seed(self) -> int:
        """With which the images of the batch are mixed."""
        return self.view.seed_of(self.batch, 2)


class Answers(Protocol):
    """Gives a teacher's outputs for images (B, C, H, W) on the device, as its student takes them, and what its taps have seen."""

    def __call__(self, images: torch.Tensor, shown: Shown | None) -> tuple[Any, Taken]: ...

    def close(self) -> None:
        """Let the teacher be as it was."""


class Features(Protocol):
    """Features of the trained model, which are kept."""

    def given(self, shown: Shown | None) -> AbstractContextManager[None]:
        """Within, the model has its features of these images from there."""

    def close(self) -> None:
        """Let the model be as it was."""


class Asked:
    """The teacher itself, which runs for every batch. It comes to the device with the first one.

    Args:
        teacher: in eval mode.
        source: what the student's images look like.
        terms: say what is read inside the teacher.
        compiled: run it by torch.compile.
    """

    def __init__(
        self, teacher: Side, source: InputConfig, terms: Sequence[Term], device: torch.device, *, compiled: bool = False
    ):
        self._model, self._device, self._compiled = teacher.model, device, compiled
        self._taps = Taps(teacher.model, [tap for term in terms for tap in term.teacher_taps])
        self._convert = teacher.converter(source)
        self._answer: Any = None

    @torch.no_grad()  # not inference_mode: a term may save a tensor of the teacher for its backward pass
    def __call__(self, images: torch.Tensor, shown: Shown | None = None) -> tuple[Any, Taken]:
        if self._answer is None:
            self._model.to(self._device)
            self._answer = torch.compile(self._model) if self._compiled else self._model
        return self._answer(self._convert(images)), self._taps.pop()

    def close(self) -> None:
        self._taps.close()
