"""A recipe's student before any training: apply the transforms of the first steps to the teacher, and evaluate the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from compressvit.data.input import Side
from compressvit.diagnostics.cka_layers import likeness
from compressvit.errors import UserError
from compressvit.fitting.reference import Reference
from compressvit.model import cost, surgery
from compressvit.notes import Note
from compressvit.recipe.recipe import Recipe
from compressvit.runs.evaluate import Scorer
from compressvit.runs.files import Fitted
from compressvit.runs.generalisation import beside, on_fitted
from compressvit.runs.job import prepare
from compressvit.runs.models import build_student, load_teacher
from compressvit.runs.run import Calibration, calibration_images, judge
from compressvit.runs.slowness import slowness
from compressvit.runs.tables import how_measured, ledger_table, ratio_text
from compressvit.tasks.qualities import words
from compressvit.terminal import print_table
from compressvit.training import optimisation as opt
from compressvit.transforms import LedgerEntry, Transform
from compressvit.transforms.applying import transform_


@dataclass(frozen=True)
class Measured:
    """What `plan --measure` adds to a plan.

    Attributes:
        ledger: with the errors of every layer.
        before_training: scores, compared with the teacher.
        fitted: on images that the student was fitted to, beside held-out ones; None where nothing was fitted to images.
        latency_ms: of the teacher and the student.
        latency_ratio: as in `results.json` (`Figures`).
        latency_on: device and threads.
        slower: why the student is slower than its teacher, if it is.
        layers: the choices of the following phase that depend on values, in words.
        broken_images, data_notes: of the images that were read.
        weights_notes: on the teacher's weights.
    """

    ledger: list[LedgerEntry]
    before_training: dict[str, Any]
    fitted: dict[str, Any] | None
    latency_ms: tuple[float, float]
    latency_ratio: tuple[float, float, float]
    latency_on: str
    slower: str | None
    layers: str | None
    broken_images: int
    data_notes: list[Note]
    weights_notes: list[Note]


class OneShot:
    """Teacher, data and calibration images of a recipe, loaded once for any number of students.

    Attributes:
        transforms: those before the recipe's first phase.
        job: the recipe, prepared.
        teacher: in eval mode, on the device.
        weights: what was taken off or left out of the teacher's file.

    Raises:
        UserError: the recipe trains its teacher or begins with a phase, or data or weights are not available.
    """

    def __init__(self, recipe: Recipe, device: str, asker: str):
        if recipe.teacher.weights == "random":
            raise UserError(
                f"{asker} compares the student with its teacher, which teacher.weights=random leaves untrained; give it pretrained, or the "
                "file or artifact of a trained model"
            )
        if recipe.teacher.weights == "train":
            raise UserError(
                f"{asker} trains nothing, so the teacher needs weights: run the recipe once and give teacher.weights=RUN/teacher"
            )
        if recipe.student.head == "new":
            raise UserError(
                f"{asker} evaluates the student before any training, when its new classifier "
                "(student.head=new) is random; apply the recipe"
            )
        self.transforms = leading_transforms(recipe)
        if not self.transforms:
            names = ", ".join(step.name for step in recipe.steps) or "none"
            raise UserError(f"{asker} needs transforms before the first phase; the steps of this recipe are {names}")
        self.recipe = recipe
        self.job = prepare(recipe, device)
        teacher = self.job.architecture.build()
        # as given: without training, no new random head may remain
        as_given = recipe.teacher.model_copy(update={"finetune": None})
        self.weights = load_teacher(recipe.model_copy(update={"teacher": as_given}), teacher)
        opt.seed_everything(recipe.seed, 1)
        self._start = build_student(recipe, teacher)
        self._images = calibration_images(self.job)
        # its moments are reused for every student
        tokens = recipe.calibration.tokens
        self.teacher = Side(teacher.to(self.job.device).eval(), self.job.teacher.input)
        judging = judge(self.job, recipe.parts()[0], self.teacher)
        start = surgery.deep_copy(self._start)
        self._source = Reference(start, Calibration(self.job), tokens, self.job.device, judge=judging)
        self.scorer = Scorer(self.job.datasets.evidence(), recipe.data, self.job.device)

    def student(self, transforms: list[Transform]) -> tuple[Side, list[LedgerEntry]]:
        """The student after `transforms`, and their ledger with the errors."""
        student = surgery.deep_copy(self._start)
        opt.seed_everything(self.recipe.seed, 2, len(self.transforms))  # as in `apply` before the first phase
        ledger = transform_(student, transforms, self._source)
        return Side(student, self.job.student.input), ledger

    def preview(self, student: Side) -> str | None:
        """The choices of the following phase that depend on values, in words (`PhaseSpec.preview`)."""
        phase = self.recipe.parts()[0].phase
        if phase is None:
            return None
        images = self.recipe.calibration.images
        alike = likeness(student, self.teacher, self._images, self.job.device, images=images)
        return phase.preview(student.model, self.teacher.model, alike)

    def scores(self, model: Side) -> dict[str, Any]:
        """Evaluate a model, compared with the teacher."""
        return self.scorer.score(model, self.teacher, search=True)

    def fitted(self, student: Side, scores: dict[str, Any]) -> Fitted | None:
        """How a student that was fitted to images does on them, beside its `scores`."""
        if not any(spec.needs_images for spec in self.transforms):
            return None
        return beside(on_fitted(student, self.teacher, self._images, self.job.device), scores.get("cosine"))

    def times(self, student: Side, batch: int = 1) -> cost.Latencies:
        """Latencies of the teacher and a student, for batches of so many images, measured in turns."""
        sides = (self.teacher, student)
        models = [side.model.to(self.job.device) for side in sides]
        return cost.latencies(models, [side.input.size for side in sides], device=self.job.device, batch=batch)

    def slower(self, student: Side, ratio: tuple[float, float, float]) -> str | None:
        """Why a student of this ratio of latencies is slower than the teacher, if it is."""
        return slowness(student, self.teacher, ratio)

    @property
    def where(self) -> str:
        """Device and threads."""
        return f"{self.job.device}, {cost.threads_text()}"


def measure(recipe: Recipe, device: str) -> Measured:
    """Transform and evaluate a recipe's student once. Raises as `OneShot`."""
    begin = OneShot(recipe, device, "plan --measure")
    student, ledger = begin.student(begin.transforms)
    scores, times = begin.scores(student), begin.times(student)
    teachers, students = times.medians
    fitted = begin.fitted(student, scores)
    layers = begin.preview(student)
    broken = begin.job.datasets.broken
    return Measured(
        ledger,
        scores,
        None if fitted is None else fitted.model_dump(),
        (teachers, students),
        times.ratio(1),
        begin.where,
        begin.slower(student, times.ratio(1)),
        layers,
        broken.count,
        broken.notes(),
        begin.weights,
    )


def print_measured(measured: Measured, console: Console) -> None:
    """For a person; the plan itself has been printed before."""
    print_table(ledger_table(measured.ledger), console)
    lines = [
        f"before training: {words(measured.before_training)}",
        *([Fitted.model_validate(measured.fitted).text] if measured.fitted else []),
        f"latency: {ratio_text(measured.latency_ratio)} of the teacher's {measured.latency_ms[0]:.2f} ms "
        f"({how_measured(measured.latency_on)})",
    ]
    lines += [measured.slower] if measured.slower else []
    lines += [measured.layers] if measured.layers else []
    lines += [f"{measured.broken_images} broken image files were skipped"] if measured.broken_images else []
    lines += [f"data: {note.text}" for note in measured.data_notes]
    for line in [*lines, *(f"weights: {note.text}" for note in measured.weights_notes)]:
        console.print(line, highlight=False, soft_wrap=True)


def leading_transforms(recipe: Recipe) -> list[Transform]:
    """The transforms before the recipe's first phase."""
    parts = recipe.parts()
    return list(parts[0].transforms) if parts else []
