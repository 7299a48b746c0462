"""Planning a recipe: what it will do and cost, determined on the meta device without weights, and of images by headers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial

from torch import nn

from compressvit.artifacts.merge import growth, left_by_merge, merged_copy
from compressvit.data.classes import other_classes
from compressvit.data.data_set import find_set
from compressvit.data.input import Side
from compressvit.data.notes import notes_of_channels, notes_of_sizes
from compressvit.data.opening import Datasets, open_data
from compressvit.data.samples import Samples
from compressvit.data.spec import Data
from compressvit.diagnostics.base import Watched
from compressvit.errors import UnmetBudget, UserError
from compressvit.files import expanded
from compressvit.model import surgery, ties
from compressvit.model.backbone import body_of, describe, family_of
from compressvit.model.cost import cost
from compressvit.model.weights import copy_matching
from compressvit.notes import Note
from compressvit.recipe.recipe import Merge, Recipe
from compressvit.runs.files import (
    CachePlan,
    Costs,
    DataPlan,
    LedgerRow,
    NoteRow,
    PlannedTeacher,
    RecipePlan,
    StagePlan,
    StepPlan,
)
from compressvit.runs.job import LOOKED_AT, PLACEHOLDER_CLASSES, Job, prepare, refuse_data, refuse_small_heads
from compressvit.runs.keep import is_comparable, refuse_figures, refuse_judged
from compressvit.runs.models import (
    check_file,
    require_pretrained,
    student_body,
    trains_teacher,
    untrained,
)
from compressvit.runs.plan_cache import count_answers, refuse_cached_data
from compressvit.runs.plan_notes import (
    average_notes,
    break_even_notes,
    chain_notes,
    figures,
    phase_notes,
    provisional_steps,
    teacher_notes,
)
from compressvit.tasks.base import TASKS, find_task, task_of
from compressvit.training.phases import PhaseSpec, Setting
from compressvit.training.phases.finetune import Finetune
from compressvit.transforms import Transform
from compressvit.transforms.applying import apply_plans
from compressvit.transforms.record import compression_of, require_open, trained_parameters


def plan_recipe(recipe: Recipe, name: str = "recipe") -> RecipePlan:
    """Plan a recipe without weights or training; `name` is its name in messages. Data that consists of files is counted if it is there.

    Raises:
        UserError: timm cannot build the teacher or the student.
    """
    datasets, fault = _listed(recipe.data)
    job = prepare(recipe, "cpu", name=name, datasets=datasets, without_data=True)
    plan = plan_job(job)
    found = untrained(recipe)
    with _collected(plan.conflicts):
        found += check_file(recipe, job.teacher.model)
    plan.weights = [NoteRow(**asdict(note)) for note in found]
    if datasets is not None:
        plan.data = plan_data(job)
        plan.notes += average_notes(recipe, plan.data.train) if plan.data.train else []
        with _collected(plan.conflicts):
            count_answers(recipe, plan)
        with _collected(plan.conflicts):
            refuse_data(job)
        with _collected(plan.conflicts):
            refuse_judged(job)
    if fault is not None and _is_here(recipe.data):
        plan.conflicts.append(str(fault))
    elif fault is not None:
        plan.notes.append(f"data not found here, so not counted: {str(fault).partition('; expected')[0]}")
    return plan


@contextmanager
def _collected(conflicts: list[str]) -> Iterator[None]:
    """Inside, an error of the user's is a conflict, unless it is one already."""
    try:
        yield
    except UserError as error:
        conflicts += [] if str(error) in conflicts else [str(error)]


def _listed(data: Data) -> tuple[Datasets | None, Exception | None]:
    """The data, if it consists of files that can be listed here; else None, with what is amiss if it should."""
    if not find_set(data.name).listed:
        return None, None
    try:
        return open_data(data), None
    except (UserError, OSError) as error:
        return None, error


def _is_here(data: Data) -> bool:
    return data.root is not None and expanded(data.root, "data.root").is_dir()


def plan_data(job: Job) -> DataPlan:
    """How many images there are, and what was passed over or guessed about them so far."""
    datasets = job.datasets
    datasets.found += [note for note in (*_teacher_classes(job), *_sizes(job)) if note not in datasets.found]
    parts = (datasets.train, datasets.validation, datasets.test)
    train, validation, test = (len(part) if isinstance(part, Sized) else 0 for part in parts)
    return DataPlan(
        train=train,
        validation=validation,
        test=None if datasets.test is None else test,
        classes=datasets.num_classes,
        fingerprint=datasets.fingerprint(),
        notes=[NoteRow(**asdict(note)) for note in datasets.notes()],
    )


def _sizes(job: Job) -> list[Note]:
    """Notes where the images to train on, or to fit to, are smaller than the model's, or some have other channels."""
    train, config = job.datasets.train, job.student.input
    if not isinstance(train, Samples):
        return []
    shapes = train.shapes(LOOKED_AT, config.channels)
    sizes = [(width, height) for height, width, _ in shapes]
    return [*notes_of_sizes(sizes, config.height, config.width), *notes_of_channels(shapes, config.channels)]


def _teacher_classes(job: Job) -> list[Note]:
    """A note where the teacher keeps the classes it was trained on, and they have another order or other names than the data's."""
    names, theirs = job.datasets.class_names, job.architecture.label_names
    if names is None or theirs is None or trains_teacher(job.recipe) or job.recipe.student.head == "new":
        return []
    return other_classes(names, theirs, "the teacher")


def plan_job(job: Job) -> RecipePlan:
    """Plan a prepared job: find every error that can be found without values, and compute the costs.

    Conflicts between steps are collected in the result; a step that cannot be applied is skipped in the rest of the plan.
    """
    recipe, teacher = job.recipe, job.teacher
    theirs = cost(teacher.model, teacher.input.size).as_dict()  # first: refuses images that the model does not take
    student = Side(surgery.skeleton(job.student.model), job.student.input)
    planned = _Steps(recipe, teacher, student)
    with _collected(planned.conflicts):
        require_pretrained(recipe, teacher.model, student.model)
    with _collected(planned.conflicts):
        refuse_small_heads(job)
    with _collected(planned.conflicts):
        refuse_cached_data(recipe)
    for step in recipe.steps:
        with _collected(planned.conflicts):
            refuse_figures(getattr(step.spec, "judged", ()), job.student, recipe.data, comparable=is_comparable(recipe))
    if recipe.student.weights == "teacher":
        with _collected(planned.conflicts):
            copy_matching(student_body(recipe, teacher.model, meta=True), teacher.model)
    if recipe.data.task is not None and not find_task(recipe.data.task).fits(student.model):
        planned.conflicts.append(
            f"data.task={recipe.data.task}: the student's outputs cannot be read as those of that task; leave it out, or name another: "
            f"{', '.join(name for name, task in TASKS.items() if task.fits(student.model))}"
        )
    notes = teacher_notes(job)
    planned.teacher()
    planned.all()
    if any(isinstance(entry.spec, Transform) for entry in recipe.steps):
        notes += chain_notes(student.model)
    notes += phase_notes(recipe) + break_even_notes(student.model)
    notes += planned.training_notes()
    if job.placeholder:
        notes.append(
            f"the new classifier is counted with {PLACEHOLDER_CLASSES:,} classes here; it gets those of the data, which are known "
            "only once it is opened"
        )
    if any(group[0] not in surgery.added_parameters(student.model) for group in compression_of(student.model).ties):
        notes.append("sharing cuts parameters and disk, not MACs or latency: every block still runs")
    return RecipePlan(
        recipe=job.name,
        teacher=PlannedTeacher(model=recipe.teacher.model, **theirs),
        student=Costs(**cost(student.model, student.input.size).as_dict()),
        input_size=student.input.size,
        inputs={
            whose: {**side.input.as_dict(), "frames": side.input.frames}
            for whose, side in (("teacher", teacher), ("student", student))
        },
        stages=_stages(student.model),
        steps=planned.steps,
        notes=notes,
        provisional=provisional_steps(recipe),
        conflicts=planned.conflicts,
        figures=figures(job),
        diagnostics={entry.name: entry.spec.summary() for entry in recipe.diagnostics},
    )


@dataclass
class _Steps:
    """Plans the steps of a recipe one after the other; each changes the structure of the student."""

    recipe: Recipe
    teacher_side: Side
    student: Side
    steps: list[StepPlan] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    failed: bool = False  # whether a step could not be applied
    trained: dict[str, int] = field(default_factory=dict)  # at the start of the last phase, before it removes any

    def __post_init__(self) -> None:
        self.trained = trained_parameters(self.student.model)

    def teacher(self) -> None:
        """Plan the training of the teacher, if there is one."""
        if not trains_teacher(self.recipe):
            return
        spec = self.recipe.teacher.finetune or Finetune()
        setting = self._setting(self.teacher_side, None)
        kept = None
        try:
            self._refuse_headless_teacher(spec, setting)
            spec.refuse(setting)
            kept = spec.kept(setting)
        except UserError as error:
            self.conflicts.append(f"teacher.finetune: {error}")
        self._refuse_diagnostics("teacher.finetune", spec, setting)
        text = spec.summary(self.recipe.data.batch_size)
        given = self.recipe.teacher.finetune is not None
        text = text if given else f"{text} (defaults)"
        self.steps.append(StepPlan(step="teacher.finetune", summary=text, cache=kept and CachePlan(**kept)))

    def _refuse_headless_teacher(self, spec: Finetune, setting: Setting) -> None:
        """Its own classifier is left out by request, for which the phase itself has the advice of a student."""
        supervised = setting.task is not None and setting.task.supervised
        if self.recipe.teacher.num_classes == 0 and spec.needs_classifier and not supervised:
            raise UserError(
                "it learns from labels, but teacher.num_classes=0 is no classifier; leave that out, and there is one as large as the data "
                "needs"
            )

    def all(self) -> None:
        """Plan every step of the recipe, including a final merge."""
        for part in self.recipe.parts():
            for index, spec in enumerate(part.transforms, part.start):
                self._try(
                    f"steps[{index}].{spec.name}", partial(_plan_transform, spec=spec, student=self.student.model)
                )
            if part.phase is not None:
                self._phase(f"steps[{part.end}].{part.phase.name}", part.phase)
        if self.recipe.merges:
            where = f"steps[{len(self.recipe.steps) - 1}].{Merge.name}"
            self._try(where, partial(_plan_merge, student=self.student.model))

    def _phase(self, where: str, spec: PhaseSpec) -> None:
        self.trained = trained_parameters(self.student.model)
        setting = self._setting(self.student, self.teacher_side)
        if self._try(where, lambda where: StepPlan(step=where, **vars(spec.plan(setting)))):
            self._refuse_diagnostics(where, spec, setting)

    def _try(self, where: str, plan: Callable[[str], StepPlan]) -> bool:
        try:
            self.steps.append(plan(where))
        except UserError as error:
            smaller = self.failed and isinstance(
                error, UnmetBudget
            )  # what the failed step would leave may be small enough
            self.conflicts += [] if smaller else [f"{where}: {error}"]
            self.failed = True
            return False
        return True

    def _setting(self, student: Side, teacher: Side | None) -> Setting:
        data = self.recipe.data
        unlabelled = None if data.labelled else f"the images of data '{data.name}'"
        return Setting(student, teacher, data.batch_size, unlabelled, task_of(student.model, data.usual_task))

    def _refuse_diagnostics(self, where: str, spec: PhaseSpec, setting: Setting) -> None:
        for entry in self.recipe.diagnostics:
            if spec.sharded and isinstance(entry.spec, Watched):
                told = f"{entry.spec.name} reads gradients, of which sharded=true leaves no process whole ones; leave one of them out"
                self.conflicts.append(f"{where}: {told}")
            try:
                entry.spec.refuse(spec, setting.student, setting.teacher)
            except UserError as error:
                self.conflicts.append(f"{where}: {error}")

    def training_notes(self) -> list[str]:
        """Notes on what the last phase trains, if not everything."""
        model, counts = self.student.model, self.trained
        end = trained_parameters(model)
        if sum(end.values()) >= ties.count_parameters(model):
            return []
        left = "" if end == counts else f" (in the end {end['trained_adapter']:,}, if every adapter loses equally)"
        return [
            f"the last phase trains {counts['trained_adapter']:,} parameters{left} and {counts['trained_head']:,} of the classifier; "
            "the others are frozen"
        ]


def require_no_conflicts(plan: RecipePlan) -> None:
    """Raise a `UserError` that lists all conflicts of a plan, if there are any."""
    if plan.conflicts:
        count = len(plan.conflicts)
        raise UserError(f"{plan.recipe}: {count} conflict{'s' * (count > 1)}\n  " + "\n  ".join(plan.conflicts))


def _plan_transform(where: str, *, spec: Transform, student: nn.Module) -> StepPlan:
    require_open(student, spec.name)
    plan = spec.plan(student)
    ledger = apply_plans(student, [plan])
    before, after = sum(e.before for e in ledger), sum(e.after for e in ledger)
    summary = f"{len(ledger)} modules, {before:,} → {after:,} parameters" if ledger else "no structure"
    return StepPlan(step=where, summary=summary, ledger=[LedgerRow(**asdict(entry)) for entry in ledger])


def _plan_merge(where: str, *, student: nn.Module) -> StepPlan:
    """Merge the skeleton, to find transforms that cannot be merged before anything is trained."""
    merged = merged_copy(student)
    kind = left_by_merge(plan.transform for plan in compression_of(merged).plans) or (
        "a plain timm model" if body_of(merged) is None else "plain layers"
    )
    undone = ""
    if (found := growth(student, merged)) is not None:
        unit, before, after = found
        undone = f" ({after / before:.1f} times the student's {unit}, which undoes its compression)"
    return StepPlan(step=where, summary=f"merged/, {ties.count_parameters(merged):,} parameters{undone}: {kind}")


def _stages(student: nn.Module) -> list[StagePlan]:
    """The parameters by stage of the backbone; of a detector, also by its other parts."""
    family = family_of(student)
    if family is None:
        return []
    tied = {name for group in ties.tied_groups(student) for name in group}
    try:
        owner = {f"{info.path}.": str(info.stage) for info in describe(student).blocks}
    except UserError:  # a detector's backbone may be of no family
        owner = {}
    detector = family.body is not None

    def row_of(name: str) -> str:
        stage = next((stage for path, stage in owner.items() if name.startswith(path)), None)
        if not detector:
            return stage or "embedding, downsampling, head"
        part = name.partition(".")[0]
        return f"{part}, stage {stage}" if stage else part

    rows: dict[str, list[int]] = {}
    for name, numbers in ties.named_sizes(student):
        shared = name in tied or f"{name}.codes" in tied  # a weight that was rounded
        rows.setdefault(row_of(name), [0, 0])[0 if shared else 1] += numbers
    ordered = sorted(rows, key=lambda row: (not row.isdigit(), row) if not detector else (False, ""))
    return [
        StagePlan(stage=row, parameters=sum(rows[row]), shared=rows[row][0], private=rows[row][1]) for row in ordered
    ]
