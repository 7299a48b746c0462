"""The interface of a diagnostic, and the registry of diagnostics.

Diagnostics are listed under `diagnostics:` in a recipe. There are two kinds, and both produce `Finding`s:

    Measured   measure(context)        at given epochs of every phase (MeasuredOnImages: on evaluation images)
    Watched    watch(model, …)         observes every training step

Neither changes the training: the final weights are the same with and without diagnostics, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
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

FOLDER = "diagnostics"  # subfolder of a run folder
Epochs = tuple[Annotated[int, Field(ge=0)] | Literal["last"], ...]
EPOCHS = (
    "When to measure, as a number of completed epochs of each phase: 0 is before the first, last after the last (with keep: best, the "
    "weights that are kept)."
)


@dataclass(frozen=True)
class Context:
    """The inputs of a diagnostic. Models are on `device` in eval mode, and must not be changed.

    Attributes:
        student: the trained model; the teacher itself in the phase that trains it.
        teacher: None in a phase without one.
        images: `images(n)` yields batches (B, C, H, W) of about n evaluation images without labels, normalised for the student. They are
            always the same, evenly spaced over the set. `teacher.converter(student.input)` converts a batch for the teacher.
        labelled: `labelled(n)` yields the same images as batches (images, targets), with target −1 for no label.
        phase: name of the phase, e.g. '1_distill'.
        epoch: number of completed epochs of the phase; 0 before the first.
        together: around what the processes of a run do together: in the block `processes.count()` is their number, and each measures the
            same with the same models. No error may leave the block: raise it behind, in all of them.
    """

    student: Side
    teacher: Side | None
    images: Callable[[int], Iterator[torch.Tensor]]
    labelled: Callable[[int], Iterator[tuple[torch.Tensor, torch.Tensor]]]
    device: torch.device
    phase: str
    epoch: int
    together: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def sides(self) -> dict[str, Side]:
        """The models by name, 'teacher' and 'student'; only 'teacher' in the phase that trains the teacher."""
        return {"teacher": self.student} if self.teacher is None else {"teacher": self.teacher, "student": self.student}

    @property
    def when(self) -> str:
        """Phase and epoch in words, for the field `when` of records."""
        return f"{self.phase}, epoch {self.epoch}"


class Diagnostic(Spec):
    """The options of a diagnostic, as given in a recipe."""

    name: ClassVar[str]

    def summary(self) -> str:
        """What the diagnostic will do, in a few words for `plan`."""
        raise TypeError(f"{type(self).__name__} does not define summary")

    def refuse(self, phase: Training, student: Side, teacher: Side | None) -> None:
        """Raise a `UserError` if the diagnostic cannot run in a phase. Called by `plan`, with models on the meta device."""

    def note(self, phase: Training) -> str | None:
        """A note for `plan` about the diagnostic in a phase, if there is one."""
        return None


class Measured(Diagnostic):
    """A diagnostic that is measured at given epochs."""

    # True: phases without a teacher (the teacher's own training) are skipped.
    needs_teacher: ClassVar[bool] = False

    epochs: Epochs = Field((0, "last"), min_length=1, description=EPOCHS)

    def measure(self, context: Context) -> list[Finding]:
        """Measure the models. Fields `phase`, `epoch` and `when` (e.g. '1_distill, epoch 0') are added to records that lack them.

        Findings of the same name from several epochs are combined into one, with their records concatenated. If the options of its chart
        use none of the three fields, it is drawn with one panel per `when`.

        Raises:
            UserError: it cannot be measured; the run reports this and continues.
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
        """Whether the diagnostic is measured at this epoch."""
        return epoch in self.epochs or (last and "last" in self.epochs)


class MeasuredOnImages(Measured):
    """A diagnostic that is measured on evaluation images."""

    images: int = Field(512, ge=1, description="Evaluation images, evenly spaced over the set.")

    def summary(self) -> str:
        return f"up to {self.images:,} images, {super().summary()}"


class Watched(Diagnostic):
    """A diagnostic that observes training."""

    def watch(self, model: nn.Module, phase: str, folder: Path) -> Watch:
        """Start observing a phase.

        Args:
            model: the model at the start of the phase.
            phase: name of the phase.
            folder: where rows are written during training. Existing rows of this phase are from before the run was resumed.
        """
        raise TypeError(f"{type(self).__name__} does not define watch")


DIAGNOSTICS: Registry[type[Diagnostic]] = Registry("diagnostic", "compressvit.diagnostics")
_Spec = TypeVar("_Spec", bound=type[Diagnostic])


def diagnostic(name: str) -> Callable[[_Spec], _Spec]:
    """Register a diagnostic under its key in recipes.

    Raises:
        TypeError: at class definition, if the key is taken.
    """

    def register(spec: _Spec) -> _Spec:
        DIAGNOSTICS.add(name, spec, spec.__module__)
        spec.name = name
        return spec

    return register


def refuse_compiled(name: str, phase: Training) -> None:
    """Raise a `UserError` for a compiled phase; for diagnostics that need the uncompiled modules and graph."""
    if phase.compile:
        raise UserError(
            f"{name} reads the graph of the backward pass block by block, and compile=true fuses it; set compile=false, "
            f"or leave {name} out of diagnostics"
        )
