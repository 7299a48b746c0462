"""What a diagnostic is, and their registry.

A diagnostic is what a user asks for under `diagnostics:` in a recipe. There are two kinds, and both leave `Finding`s:

    Measured   measure(context)        at stated epochs of every phase (MeasuredOnImages: on evaluation images)
    Watched    watch(model, …)         looks at every step of a training

Neither changes the training: a run ends with the same weights with it and without it, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from torch import nn

from compressvit.charts.findings import Finding
from compressvit.data.input import Side
from compressvit.errors import UserError
from compressvit.registry import Registry
from compressvit.spec import Spec
from compressvit.training.spec import Training
from compressvit.training.watch import Watch

FOLDER = "diagnostics"  # in a run folder
Epochs = tuple[Annotated[int, Field(ge=0)] | Literal["last"], ...]
EPOCHS = (
    "When to measure, as a number of completed epochs of each phase: 0 is before the first, last after the last (with keep: best, the "
    "weights that are kept)."
)


@dataclass(frozen=True)
class Context:
    """What a diagnostic may look at. Models are on `device` and in eval mode, and are not to be changed.

    Attributes:
        student: what is trained; the teacher itself in the phase that trains it.
        teacher: None in a phase without one.
        images: `images(n)` yields batches (B, C, H, W) of about n evaluation images, evenly spaced over the set and always the same,
            without labels, normalised for the student; `teacher.converter(student.input)` makes a batch the teacher's.
        labelled: likewise, batches of (images, targets); −1 for no label.
        phase: its name, e.g. '1_distill'.
        epoch: epochs of it that are done; 0 before the first.
    """

    student: Side
    teacher: Side | None
    images: Callable[[int], Iterator[torch.Tensor]]
    labelled: Callable[[int], Iterator[tuple[torch.Tensor, torch.Tensor]]]
    device: torch.device
    phase: str
    epoch: int

    @property
    def sides(self) -> dict[str, Side]:
        """The models by what they are called, 'teacher' and 'student'; in the phase that trains the teacher there is only that."""
        return {"teacher": self.student} if self.teacher is None else {"teacher": self.teacher, "student": self.student}

    @property
    def when(self) -> str:
        """Phase and epoch in words, as records are stamped with."""
        return f"{self.phase}, epoch {self.epoch}"


class Diagnostic(Spec):
    """A diagnostic as a recipe asks for it."""

    name: ClassVar[str]

    def summary(self) -> str:
        """What it will do, in a few words for `plan`."""
        raise TypeError(f"{type(self).__name__} does not define summary")

    def refuse(self, phase: Training, student: Side, teacher: Side | None) -> None:
        """Raise a `UserError` where it cannot be had in a phase; `plan` asks, with models on the meta device, so nothing has run yet."""

    def note(self, phase: Training) -> str | None:
        """What `plan` should say about it in a phase, if anything."""
        return None


class Measured(Diagnostic):
    """A diagnostic that is measured at stated epochs."""

    # True: phases without a teacher (the teacher's own training) are passed over.
    needs_teacher: ClassVar[bool] = False

    epochs: Epochs = Field((0, "last"), min_length=1, description=EPOCHS)

    def measure(self, context: Context) -> list[Finding]:
        """Look at the models. Records get the fields `phase`, `epoch` and `when` ('1_distill, epoch 0') where they have none.

        Findings of one name from several epochs become one: its records follow one another, and where its chart's options speak of
        none of the three fields it is drawn with a panel for each `when`.

        Raises:
            UserError: it cannot be measured; the run says so and goes on.
        """
        raise TypeError(f"{type(self).__name__} does not define measure")

    def summary(self) -> str:
        return f"at epoch {', '.join(map(str, self.epochs))} of every phase"

    def note(self, phase: Training) -> str | None:
        late = [epoch for epoch in self.epochs if epoch != "last" and epoch > phase.epochs]
        if not late:
            return None
        return f"{self.name} is not measured at epoch {', '.join(map(str, late))}: the phase has {phase.epochs}"

    def due(self, epoch: int, last: bool) -> bool:
        """Whether it is measured now."""
        return epoch in self.epochs or (last and "last" in self.epochs)


class MeasuredOnImages(Measured):
    """A diagnostic that looks at what models make of evaluation images."""

    images: int = Field(512, ge=1, description="Evaluation images, evenly spaced over the set.")

    def summary(self) -> str:
        return f"up to {self.images:,} images, {super().summary()}"


class Watched(Diagnostic):
    """A diagnostic that looks on while a model is trained."""

    def watch(self, model: nn.Module, phase: str, folder: Path) -> Watch:
        """Begin to look at a phase.

        Args:
            model: as the phase begins with it.
            phase: its name.
            folder: for what it writes as it goes. Rows of this phase that are there already are of a run that goes on.
        """
        raise TypeError(f"{type(self).__name__} does not define watch")


DIAGNOSTICS: Registry[type[Diagnostic]] = Registry("diagnostic", "compressvit.diagnostics")
_Spec = TypeVar("_Spec", bound=type[Diagnostic])


def diagnostic(name: str) -> Callable[[_Spec], _Spec]:
    """Register a diagnostic under the word that recipes use.

    Raises:
        TypeError: when the class is defined: another one has that word.
    """

    def register(spec: _Spec) -> _Spec:
        DIAGNOSTICS.add(name, spec, spec.__module__)
        spec.name = name
        return spec

    return register


def refuse_compiled(name: str, phase: Training) -> None:
    """For a diagnostic that needs the modules and the graph as they are written."""
    if phase.compile:
        raise UserError(
            f"{name} reads the graph of the backward pass block by block, and compile=true fuses it; set compile=false, "
            f"or leave {name} out of diagnostics"
        )
