"""The interface of a phase, and the registry of phases.

A phase is what a user asks for in a recipe's `steps` to train the student:

    spec.plan(student, setting)    # on the meta device: what it will do; every fault is found here
    spec.run(model, stage)         # trains, and returns the model and what `results.json` keeps of it

Whatever trains is imported when it runs: reading a recipe takes neither timm nor the losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from compressvit.errors import UserError
from compressvit.registry import Registry
from compressvit.training.spec import Training

if TYPE_CHECKING:
    from torch import nn

    from compressvit.data.input import Side
    from compressvit.tasks.base import Task
    from compressvit.training.pairs import Likeness
    from compressvit.training.stage import Stage


@dataclass(frozen=True)
class Setting:
    """The models, data and batch size that a phase will run with, as known to a plan.

    Attributes:
        student: what is trained, on the meta device; the teacher itself in the phase that trains it.
        teacher: None in the phase that trains the teacher.
        batch_size: images of a training batch.
        task: what the student's outputs mean; None: classes where it has a classifier, else features.
        unlabelled: what to call the training images where they have no labels, e.g. "the images of data 'images'"; else None.
    """

    student: Side
    teacher: Side | None
    batch_size: int
    unlabelled: str | None = None
    task: Task | None = None


@dataclass
class PhasePlan:
    """What a phase will do.

    Attributes:
        summary: in a few words.
        layers: pairs of block indices, student before teacher; `layers_rule` says how they came about.
        loss_bytes: what each loss term keeps for the backward pass of a batch, in float32.
    """

    summary: str
    layers: list[tuple[int, int]] = field(default_factory=list)
    layers_rule: str = ""
    loss_bytes: dict[str, int] = field(default_factory=dict)


class PhaseSpec(Training):
    """The options of a phase, as given in a recipe. The base class trains on the ground truth."""

    name: ClassVar[str]
    # False: it also trains a model without a classifier.
    needs_classifier: ClassVar[bool] = True
    # Options that `compare` names in the label of a student, besides the phase's word; None: the phase is not part of the label.
    label_fields: ClassVar[tuple[str, ...] | None] = None

    @property
    def removal_scope(self) -> str | None:
        """Among which neurons a phase that removes some compares, e.g. 'global' or 'local'; None: it removes none.

        One that does logs a `compressvit.rows.WidthsRow` after every removal, and its report has `widths`.
        """
        return None

    def refuse(self, setting: Setting) -> None:
        """Report faults that would otherwise appear only when the phase begins, possibly after hours.

        Raises:
            UserError: nothing can be trained, an optimiser that cannot be built, a model or data without what the phase learns from.
        """
        import torch

        from compressvit.model.backbone import describe
        from compressvit.tasks.base import task_of
        from compressvit.training import optimisation as opt

        model: Any = setting.student.model
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError(
                "there is nothing to train: earlier steps froze every parameter, and the model has no classifier; give it one with "
                "student.head=new, or remove the step that freezes"
            )
        opt.build_optimizer(model, self, setting.batch_size, torch.device("meta"))
        if self.drop_path is not None:
            describe(model)
        if (self.mixup or self.cutmix) and setting.batch_size < 2:
            raise UserError(
                "mixup and cutmix mix the images of a batch in pairs; give data.batch_size of at least 2, or set both to 0"
            )
        task = setting.task or task_of(model)
        if (self.mixup or self.cutmix) and not task.mixes:
            raise UserError(f"mixup and cutmix mix classes, and the task {task.name!r} has none to mix; set both to 0")
        if fault := self.unfit_for(task):
            raise UserError(f"{self.name}.{fault}")
        if self.needs_classifier and not task.supervised:
            raise UserError(
                f"{self.name} learns from labels, but the model has no classifier (num_classes=0); give it one with student.head=new, "
                "or distil it with losses.feature instead"
            )
        if self.needs_labels and setting.unlabelled:
            raise UserError(
                f"the phase learns from labels, but {setting.unlabelled} have none; distil with losses.labels.weight=0"
            )

    def unfit_for(self, task: Task) -> str | None:
        """What of its options does not fit the task, for a recipe's reader and `refuse`; None where all do."""
        return None

    def plan(self, setting: Setting) -> PhasePlan:
        """What the phase will do. One that changes the structure of the student changes that of `setting.student` likewise.

        Raises:
            UserError: as `refuse`, and what else is wrong with it.
        """
        self.refuse(setting)
        return PhasePlan(self.summary(setting.batch_size))

    def preview(self, student: nn.Module, teacher: nn.Module, likeness: Likeness) -> str | None:
        """What the phase would begin with, in words, where only values tell; None where its plan has said everything.

        Args:
            student, teacher: with values.
            likeness: CKA of their blocks.
        """
        return None

    def run(self, model: nn.Module, stage: Stage) -> tuple[nn.Module, dict[str, Any]]:
        """Train, from the phase's checkpoint if there is one.

        Returns:
            The model (possibly another one), and what `results.json` keeps of the phase: at least `start`, the scores it began with,
            and `kept_epoch`, the epoch whose weights it ends with.

        Raises:
            Interrupted: a signal came; a checkpoint was written.
            UserError: it diverged, or cannot be had.
        """
        from compressvit.training.terms import labels_term

        return model, stage.train(model, self, [labels_term(1.0, self.smoothing, stage.task)])

    def summary(self, batch_size: int) -> str:
        """Length, batch, optimiser and precision in a line."""
        length = f"{self.epochs} epoch{'s' * (self.epochs > 1)}" + (
            f", at most {self.max_steps} steps" if self.max_steps else ""
        )
        batch = f"batch {batch_size}" + (f"×{self.accumulate}" if self.accumulate > 1 else "")
        return f"{length}, {batch}, {self.optimizer}, lr {self.peak_lr(batch_size):.3g}, {self.precision}"


PHASES: Registry[type[PhaseSpec]] = Registry("phase", "compressvit.training.phases")
P = TypeVar("P", bound=type[PhaseSpec])


def phase(name: str) -> Callable[[P], P]:
    """Register a phase under the word that recipes use. A second one of the same name is refused at import."""

    def register(spec: P) -> P:
        PHASES.add(name, spec, spec.__module__)
        spec.name = name
        return spec

    return register
