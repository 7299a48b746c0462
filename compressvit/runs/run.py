"""Executing a job: load the models' values, then run the parts of the recipe (consecutive transforms and the following phase)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressvit import processes
from compressvit.artifacts import artifact
from compressvit.charts.plots import ranks_finding
from compressvit.data.input import Side
from compressvit.data.loaders import CALIBRATION_BATCH, calibration_batches, train_loader
from compressvit.data.photographs import Photographed
from compressvit.data.samples import Samples
from compressvit.diagnostics.cka_layers import likeness
from compressvit.errors import UserError, switch
from compressvit.files import disk_faults, write_json
from compressvit.fitting.choices import Choices
from compressvit.fitting.kept import forget
from compressvit.fitting.reference import Reference
from compressvit.fitting.shares import Asks, unasked
from compressvit.log import RunLog
from compressvit.model import stored, surgery
from compressvit.model.linear import weight_shape
from compressvit.model.old import current_word
from compressvit.notes import Note
from compressvit.reading import read_json
from compressvit.recipe.recipe import Part
from compressvit.runs.evaluate import Scorer
from compressvit.runs.files import Fitted, PhaseReport
from compressvit.runs.folder import RunFolder
from compressvit.runs.generalisation import beside, on_fitted
from compressvit.runs.job import Job
from compressvit.runs.keep import OnHeldOut
from compressvit.runs.listed import remove_models
from compressvit.runs.models import build_student, load_teacher, require_student_file, trains_teacher
from compressvit.runs.recorder import Recorder
from compressvit.runs.tables import ledger_table
from compressvit.tasks.qualities import words
from compressvit.terminal import print_table
from compressvit.training import optimisation as opt
from compressvit.training.loop import Phase
from compressvit.training.pairs import Likeness
from compressvit.training.phases.finetune import Finetune
from compressvit.training.stage import Stage
from compressvit.transforms import LedgerEntry
from compressvit.transforms.applying import transform_
from compressvit.transforms.record import compression_of
from compressvit.transforms.shares import Shares


@dataclass
class Trained:
    """The result of the parts of a recipe.

    Attributes:
        phases: by name, the scores before each phase and the epoch whose weights it kept.
        fitted: how a student that was fitted to images does on them; `held_out` is not known yet if nothing trained it afterwards.
    """

    teacher: Side
    student: Side
    phases: dict[str, PhaseReport] = field(default_factory=dict)
    fitted: Fitted | None = None


def fill_teacher(job: Job, folder: RunFolder, *, resume: bool) -> tuple[nn.Module, bool, list[Note]]:
    """The teacher with the values that the recipe names, whether it was already trained before the run was resumed, and what was taken
    off or left out of weights files.

    Raises:
        UserError: weights of the teacher or the student are missing or do not fit.
    """
    opt.seed_everything(job.recipe.seed)
    teacher = job.architecture.build()
    notes = require_student_file(job.recipe, teacher)
    if resume and folder.teacher.is_dir():
        try:
            return trained_teacher(folder), True, notes
        except UserError:
            if not folder.checkpoint("teacher").is_file():
                raise
    return teacher, False, load_teacher(job.recipe, teacher) + notes


def trained_teacher(folder: RunFolder) -> nn.Module:
    """The teacher that was trained before the run was resumed.

    Raises:
        UserError: it is damaged. Where its checkpoint is there, `train_teacher` writes it again from that.
    """
    try:
        return artifact.load(folder.teacher)
    except UserError as error:
        raise UserError(
            f"{switch('resume')}: {error}\n  There is no {folder.checkpoint('teacher')} from which it could be written again. Remove "
            f"{folder.teacher}, and {switch('resume')} trains the teacher again, or start a new run"
        ) from error


class Run:
    """Executes a job in a run folder.

    Args:
        measured: what was measured for its first part (`measure_first`).
    """

    def __init__(self, job: Job, folder: RunFolder, log: RunLog, measured: Choices | None = None):
        self.measured = measured or Choices()
        self.job, self.folder, self.log = job, folder, log
        self.recipe, self.device = job.recipe, job.device
        self.scorer = Scorer(job.datasets, job.recipe.data, job.device, job.recipe.student.head == "new")
        self.diagnostics = Recorder(job.recipe, folder.path, job.datasets, job.device, log)

    def train_teacher(self, teacher: nn.Module) -> nn.Module:
        """Train the teacher before the steps; the result is an artifact of its own, not part of the student's. Returns the model as read
        back from disk, as a resumed run does, because training changes the module itself, e.g. its drop path."""
        spec = self.recipe.teacher.finetune or Finetune()
        phase = Phase("teacher", 0, self.recipe.seed, self.folder.checkpoint("teacher"))
        side = Side(teacher, self.job.teacher.input)
        teacher, _ = spec.run(teacher, self._stage(phase, side, None))
        stored.name_classes(teacher, self.job.datasets.class_names)

        def save() -> None:
            if self.folder.teacher.is_dir():  # `fill_teacher` could not read it
                self.log.say(f"{self.folder.teacher} is damaged, and is written again from its checkpoint")
                remove_models(self.folder.path, ["teacher"])
            with disk_faults(self.folder.teacher):
                artifact.save(teacher, self.folder.teacher, input_config=side.input.as_dict())

        processes.led(save)
        return trained_teacher(self.folder)

    def parts(self, teacher: nn.Module) -> Trained:
        """Execute the parts of the recipe in order."""
        done = Trained(Side(teacher.to(self.device).eval(), self.job.teacher.input), self.job.student)
        opt.seed_everything(self.recipe.seed, 1)
        model = build_student(self.recipe, teacher, classes=self.job.classes)
        for part in self.recipe.parts():
            if part.transforms:
                model = self._transform(model, part, done.teacher)
                done.fitted = self._on_fitted(model, part, done.teacher) or done.fitted
            if part.phase is None:
                self._end(part, model, done.teacher)
                continue
            phase = Phase(part.name, part.end + 1, self.recipe.seed, self.folder.checkpoint(part.name))
            side = Side(model, self.job.student.input)
            start = self._start(part, phase, side, done.teacher) if part.transforms else None
            done.fitted = self._told(done.fitted, start or {})
            model, report = part.phase.run(model, self._stage(phase, side, done.teacher, start))
            reported = done.phases[part.name] = PhaseReport.model_validate(report)
            # a resumed run has its start from the checkpoint
            done.fitted = beside(done.fitted, (reported.start or {}).get("cosine"))
        done.student = Side(model, self.job.student.input)
        return done

    def _on_fitted(self, model: nn.Module, part: Part, teacher: Side) -> Fitted | None:
        side = Side(model.to(self.device), self.job.student.input)
        if not any(spec.needs_images for spec in part.transforms) or self.scorer.comparable(teacher) is None:
            return None
        return processes.led(lambda: on_fitted(side, teacher, calibration_images(self.job), self.device))

    def _told(self, fitted: Fitted | None, start: dict[str, Any]) -> Fitted | None:
        """Tell it beside the score on held-out images before a phase, where that was measured."""
        if fitted is None or fitted.held_out is not None or start.get("cosine") is None:
            return fitted
        found = beside(fitted, start["cosine"])
        assert found is not None, "both are known"
        self.log.say(found.text)
        return found

    def _start(self, part: Part, phase: Phase, student: Side, teacher: Side) -> dict[str, Any] | None:
        """Report the scores after transforms and before training, unless a resumed run has already done so."""
        if processes.told(phase.begun):
            return None
        start = self.scorer.score(student, self.scorer.comparable(teacher))
        self.log.scalars(part.transformed, "evaluate", 0, start)
        self.log.say(f"before training: {words(start)}")
        return start

    def _end(self, part: Part, model: nn.Module, teacher: Side) -> None:
        """Record the scores of transforms that no phase follows, where the figures at the end are of a test: who chooses among runs, as a
        sweep does, has to choose on the images held out for validation."""
        if self.job.datasets.test is None or processes.told(self.log.recorded(part.transformed, "evaluate", 0)):
            return
        scores = self.scorer.in_training(Side(model, self.job.student.input), teacher)
        self.log.scalars(part.transformed, "evaluate", 0, scores)
        self.log.say(f"on the images held out for validation: {words(scores)}")

    def _stage(self, phase: Phase, model: Side, teacher: Side | None, start: dict[str, Any] | None = None) -> Stage:
        """The stage for a phase; `model` is the model before the phase."""
        data = self.recipe.data
        return Stage(
            phase=phase,
            input=model.input,
            teacher=teacher,
            device=self.device,
            log=self.log,
            batch_size=data.batch_size,
            loader=partial(train_loader, self.job.datasets, data, model.input, self.device),
            evaluate=lambda m: self.scorer.in_training(Side(m, model.input), teacher),
            likeness=lambda m: self._likeness(Side(m, model.input), teacher),
            task=self.scorer.task(model),
            start=start,
            watching=self.diagnostics.watching,
            measure=lambda name, m, epoch, last: self.diagnostics.measure(
                name, teacher, Side(m, model.input), epoch, last
            ),
            widths=self.diagnostics.allocation,
        )

    def _likeness(self, student: Side, teacher: Side | None) -> Likeness:
        assert teacher is not None, "layers are paired with those of a teacher"
        images = self.recipe.calibration.images
        return likeness(student, teacher, calibration_images(self.job), self.device, images=images)

    def _transform(self, student: nn.Module, part: Part, teacher: Side) -> nn.Module:
        """Apply consecutive transforms. The result of data-driven ones is stored: it takes long to compute, and with another order of
        summation (threads, a GPU) a resumed run could choose other ranks, which would not fit its checkpoint."""
        opt.seed_everything(self.recipe.seed, 2, part.end)
        student.cpu()
        kept = self.folder.transformed(part.transformed)
        if processes.told(stored.is_artifact(kept)):
            student, ledger = _read_transformed(kept)
            self.log.say(f"{kept.name}: read from {kept}, as it was before the run stopped")
        elif processes.count() > 1:  # one choice of ranks and widths for all
            images = Calibration(self.job)
            shares = Shares(student, images, self.recipe.calibration.tokens, self.device)
            asks = shares.asked if images.divided else unasked
            made = partial(self._made, surgery.deep_copy(student), part, kept, teacher, keep=True, asks=asks)
            processes.led_for(lambda: len(made()), 0, shares.help)
            student, ledger = _read_transformed(kept)
        else:
            ledger = self._made(student, part, kept, teacher, keep=any(spec.needs_images for spec in part.transforms))
        if ledger:
            self.log.show(partial(print_table, ledger_table(ledger)))
        if processes.leads():
            self._draw_ranks(student)
        return student

    def _made(
        self, student: nn.Module, part: Part, kept: Path, teacher: Side, *, keep: bool, asks: Asks = unasked
    ) -> list[LedgerEntry]:
        """Apply the transforms to the student itself, and `keep` it as `kept`, for who resumes or takes part in the run; returns the
        ledger."""
        reference = Reference(
            surgery.deep_copy(student),
            Calibration(self.job),
            self.recipe.calibration.tokens,
            self.device,
            Choices(_choices(kept), self.measured if part.start == 0 else None),
            judge(self.job, part, teacher),
            asks,
        )
        ledger = transform_(student, part.transforms, reference)
        if keep:
            _keep_transformed(student, ledger, kept, self.job.student.input.as_dict())
        if (values := reference.choices.folder) is not None:
            forget(values)
        return ledger

    def _draw_ranks(self, student: nn.Module) -> None:
        """Draw a bar chart of the rank of every low-rank layer, if there are any."""
        ranks: dict[str, int | None] = {}
        for plan in compression_of(student).plans:
            ranks |= getattr(plan, "ranks", {}) | dict.fromkeys(getattr(plan, "dense", ()))
        if ranks:
            full = {path: min(weight_shape(student.get_submodule(path))) for path in ranks}
            order = [path for path, _ in student.named_modules() if path in ranks]
            self.folder.keep(ranks_finding({path: ranks[path] for path in order}, full))


def measure_first(job: Job, teacher: nn.Module, folder: RunFolder, *, resume: bool) -> Choices:
    """What the first step has to know of the device, measured before anything is written, unless the run that is resumed has done so.

    Raises:
        UserError: the step cannot be done on that device.
    """
    part = next(iter(job.recipe.parts()), None)
    if part is None or not part.transforms or trains_teacher(job.recipe):
        return Choices()
    kept = folder.transformed(part.transformed)
    measured = Choices(_choices(kept) if resume else None)
    if not (resume and stored.is_artifact(kept)):
        student = build_student(job.recipe, teacher, classes=job.classes)
        of_teacher = Side(teacher, job.teacher.input)
        reference = Reference(student, device=job.device, choices=measured, judge=judge(job, part, of_teacher))
        part.transforms[0].refuse_by_device(student, reference)
    return measured


def judge(job: Job, part: Part, teacher: Side) -> OnHeldOut | None:
    """What judges students, where a transform of this part needs it."""
    if not any(spec.judged for spec in part.transforms):
        return None
    return OnHeldOut.of(job, teacher)


def _choices(kept: Path) -> Path:
    """The file of what was chosen for transforms whose result is stored as `kept`."""
    return kept.with_suffix(".choices.json")


class Calibration:
    """Called, it returns batches of a recipe's calibration images, normalised for the student, with their photographs."""

    def __init__(self, job: Job):
        self._job = job

    def __call__(self) -> Iterator[Photographed]:
        job, recipe = self._job, self._job.recipe
        wanted = {"images": recipe.calibration.images, "seed": recipe.seed}
        return calibration_batches(job.datasets, recipe.data, job.student.input, job.device, **wanted)

    @property
    def divided(self) -> bool:
        """Whether every process of the run gets a batch of its own."""
        return isinstance(self._job.datasets.train, Samples) and len(self) >= processes.count()

    def __len__(self) -> int:
        """The number of batches; there are fewer where a stream ends before, or where files are broken."""
        images, train = self._job.recipe.calibration.images, self._job.datasets.train
        return -(-(min(images, len(train)) if isinstance(train, Samples) else images) // CALIBRATION_BATCH)


def calibration_images(job: Job) -> Callable[[], Iterator[torch.Tensor]]:
    """The same images alone, (B, C, H, W)."""
    batches = Calibration(job)
    return lambda: (batch.images for batch in batches())


def _keep_transformed(student: nn.Module, ledger: list[LedgerEntry], path: Path, config: dict[str, Any]) -> None:
    write_json(path.with_suffix(".ledger.json"), [asdict(entry) for entry in ledger])
    with disk_faults(path):  # last: where it is, the ledger is
        artifact.save(student, path, input_config=config)


def _read_transformed(path: Path) -> tuple[nn.Module, list[LedgerEntry]]:
    """The transformed student stored before the run was resumed, with its ledger and errors, which an artifact does not contain."""
    try:
        student = artifact.load(path)
        ledger = [LedgerEntry(**e) for e in read_json(path.with_suffix(".ledger.json"))]
    except (UserError, OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{switch('resume')}: {error}\n  Remove {path}: {switch('resume')} then makes it again"
        ) from error
    done = compression_of(student)
    words = {plan.transform for plan in done.plans}
    ledger = [replace(entry, step=current_word(entry.step, words)) for entry in ledger]
    done.ledger[len(done.ledger) - len(ledger) :] = ledger
    return student, ledger
