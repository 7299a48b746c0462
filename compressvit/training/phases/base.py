"""The interface of a phase, and the registry of phases.

A phase is a step of a recipe that trains the student:

    spec.plan(student, setting)    # on the meta device: what it will do; every error is raised here
    spec.run(model, stage)         # trains, and returns the model and its entry in `results.json`

Training code is imported only when a phase runs: reading a recipe needs neither timm nor the losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from compressvit import processes
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
        student: the model to train, on the meta device; the teacher itself in the phase that trains it.
        teacher: None in the phase that trains the teacher.
        batch_size: images per training batch.
        task: what the student's outputs mean; None: classes if it has a classifier, else features.
        unlabelled: how messages call the training images if they have no labels, e.g. "the images of data 'images'"; else None.
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
        summary: a short description.
        layers: pairs of block indices, (student, teacher); `layers_rule` says how they were chosen.
        loss_bytes: bytes that each loss term keeps for the backward pass of a batch, in float32.
        cache: `of` what, by default the teacher's answers, `views`, and `answer_bytes` for an image in each; None without one.
    """

    summary: str
    layers: list[tuple[int, int]] = field(default_factory=list)
    layers_rule: str = ""
    loss_bytes: dict[str, int] = field(default_factory=dict)
    cache: dict[str, Any] | None = None


class PhaseSpec(Training):
    """The options of a phase, as given in a recipe. The base class trains on the ground truth."""

    name: ClassVar[str]
    # False: the phase can also train a model without a classifier.
    needs_classifier: ClassVar[bool] = True
    # Options that `compare` shows in a student's label after the phase's key; None: the phase is not part of the label.
    label_fields: ClassVar[tuple[str, ...] | None] = None

    @property
    def removal_scope(self) -> str | None:
        """The scope in which a phase that removes neurons compares them, e.g. 'global' or 'local'; None: it removes none.

        A phase that removes neurons logs a `compressvit.rows.WidthsRow` after every removal, and its report has `widths`.
        """
        return None

    def refuse(self, setting: Setting) -> None:
        """Raise errors that would otherwise appear only when the phase starts, possibly hours later.

        Raises:
            UserError: there is nothing to train, the optimiser cannot be built, or model or data lack what the phase learns from.
        """
        import torch

        from compressvit.model.backbone import describe
        from compressvit.tasks.base import task_of
        from compressvit.training import optimisation as opt
        from compressvit.transforms.record import require_open

        model: Any = setting.student.model
        require_open(model, self.name)
        frozen = {id(p) for module in opt.frozen_modules(model, self) for p in module.parameters()}
        if not any(p.requires_grad and id(p) not in frozen for p in model.parameters()):
            raise UserError(
                "there is nothing to train: earlier steps, or `frozen`, froze every parameter, and the model has no classifier; give it "
                "one with student.head=new, or freeze less"
            )
        opt.build_optimizer(model, self, setting.batch_size, torch.device("meta"))
        if self.drop_path is not None:
            describe(model, "blocks", asker="drop_path")
        if self.activation_checkpointing:
            describe(model, "blocks", asker="activation_checkpointing")
        if self.sharded:
            from compressvit.training.sharding.refusals import refuse

            sides = {"student": setting.student, "teacher": setting.teacher}
            models = {whose: side.model for whose, side in sides.items() if side is not None}
            refuse(self, models, setting.task or task_of(model))
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
        """Which of its options does not fit the task, as a message for recipe validation and `refuse`; None if all do."""
        return None

    def plan(self, setting: Setting) -> PhasePlan:
        """Plan the phase. If the phase changes the structure of the student, that of `setting.student` is changed in the same way.

        Raises:
            UserError: as `refuse`, or any other error that can be found without values.
        """
        self.refuse(setting)
        return PhasePlan(self.summary(setting.batch_size), cache=self.kept(setting))

    def kept(self, setting: Setting) -> dict[str, Any] | None:
        """What is known of the files of a cache, as `PhasePlan.cache`; None without one.

        Raises:
            UserError: what is asked for cannot be kept.
        """
        return None

    def preview(self, student: nn.Module, teacher: nn.Module, likeness: Likeness) -> str | None:
        """Choices of the phase that depend on values (such as layer pairs), in words; None if the plan is complete without values.

        Args:
            student, teacher: models with values.
            likeness: CKA of their blocks.
        """
        return None

    def run(self, model: nn.Module, stage: Stage) -> tuple[nn.Module, dict[str, Any]]:
        """Train, resuming from the phase's checkpoint if there is one.

        Returns:
            The model (possibly another object), and the phase's entry in `results.json`: at least `start`, the scores before training,
            and `kept_epoch`, the epoch whose weights were kept.

        Raises:
            Interrupted: a signal was received; a checkpoint was written.
            UserError: the training diverged, or the phase cannot run.
        """
        from compressvit.training.terms import labels_term

        return model, stage.train(model, self, [labels_term(1.0, self.smoothing, stage.task)])

    def summary(self, batch_size: int) -> str:
        """Length, batch size, optimiser and precision in one line. `batch_size` is that of each process."""
        count = processes.launched()
        length = f"{self.epochs} epoch{'s' * (self.epochs > 1)}" + (
            f", at most {self.max_steps} steps" if self.max_steps else ""
        )
        batch = f"batch {batch_size}" + (f"×{self.accumulate}" if self.accumulate > 1 else "")
        batch += f" in each of {count} processes" if count > 1 else ""
        shards = (", in shards" if count > 1 else ", sharded passed over in one process") if self.sharded else ""
        return (
            f"{length}, {batch}, {self.optimizer}, lr {self.peak_lr(batch_size * count):.3g}, {self.precision}{shards}"
        )


PHASES: Registry[type[PhaseSpec]] = Registry("phase", "compressvit.training.phases")
P = TypeVar("P", bound=type[PhaseSpec])


def phase(name: str) -> Callable[[P], P]:
    """Register a phase under its key in recipes. A duplicate key raises at import."""

    def register(spec: P) -> P:
        PHASES.add(name, spec, spec.__module__)
        spec.name = name
        return spec

    return register
