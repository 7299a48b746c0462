"""`prepare`: resolve everything in a recipe that needs no values: device, data, classes, and the structure of teacher and student.

The stages of a run, each of which uses the results of those before it:

    job = prepare(recipe, device)      this module
    plan = plan_job(job)               compressvit.runs.plan: every refusal that needs no values, and what it will cost
    run = Run(job, plan, folder, log)  compressvit.runs.run: values, then part by part of the recipe
    finish(…)                          compressvit.runs.finish: the student on disk, scores, results.json
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from compressvit.data.annotated import AnnotatedFiles
from compressvit.data.data_set import SETS, briefly, find_set
from compressvit.data.image_transform import refuse_colours
from compressvit.data.input import Side, refuse_other_channels
from compressvit.data.opening import Datasets, open_data
from compressvit.data.pictures import MODES, fits
from compressvit.data.pixels import Pixels
from compressvit.data.samples import Samples
from compressvit.data.spec import Data, known_classes
from compressvit.errors import UserError, option, switch
from compressvit.files import expanded
from compressvit.model import weights
from compressvit.model.backbone import family_of, model_name
from compressvit.model.family import FAMILIES
from compressvit.recipe.recipe import Recipe
from compressvit.runs.deciding import set_aside
from compressvit.runs.folder import RunFolder
from compressvit.runs.heads import is_untold, too_small
from compressvit.runs.models import (
    Architecture,
    build_student,
    copies_teacher,
    head_size,
    teacher_architecture,
    trains_teacher,
)
from compressvit.tasks.base import find_task, task_of
from compressvit.training.phases import PhaseSpec
from compressvit.transforms import Transform

LOOKED_AT = 32  # images, whose headers say their size and channels
PLACEHOLDER_CLASSES = 1000  # for a new classifier, while the number of classes is unknown


@dataclass
class Job:
    """A recipe with everything that follows from it without values.

    Attributes:
        name: name of the recipe in messages.
        device: the device on which models run.
        classes: number of classes of the data; None if it has none, or if that is known only after opening it.
        architecture: that of the teacher.
        teacher, student: their structure, without values; the student before the first step.
        placeholder: whether the student's new classifier has `PLACEHOLDER_CLASSES`, because the number of classes is unknown.
    """

    recipe: Recipe
    name: str
    device: torch.device
    classes: int | None
    architecture: Architecture
    teacher: Side
    student: Side
    placeholder: bool

    @cached_property
    def datasets(self) -> Datasets:
        """The data, opened on first access. Raises as `open_data` does."""
        return set_aside(open_data(self.recipe.data), self.recipe)


def prepare(
    recipe: Recipe,
    device: str = "auto",
    *,
    name: str = "recipe",
    datasets: Datasets | None = None,
    without_data: bool = False,
) -> Job:
    """Resolve a recipe to a job. Models are built without values; data is opened only if its classes are otherwise unknown.

    Args:
        name: name of the recipe in messages.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', …
        datasets: the data, if it is already open.
        without_data: open no data, and assume what only the data determines, as a plan does.

    Raises:
        UserError: the device or the data set is not available, timm cannot build a model, or it is for another task than the data.
    """
    where = pick_device(device)
    classes = known_classes(recipe.data)
    if classes is None and datasets is None and not without_data:
        datasets = open_data(recipe.data)
    if classes is None and datasets is not None:
        classes = datasets.num_classes
    architecture = teacher_architecture(recipe, classes=classes)
    with _support_first(recipe):
        teacher = architecture.build("meta")
    if recipe.student.head == "new" and not recipe.data.labelled:
        raise UserError(_no_classes(recipe))
    placeholder = recipe.student.head == "new" and not head_size(recipe, classes)
    with _support_first(recipe):
        student = build_student(recipe, teacher, classes=PLACEHOLDER_CLASSES if placeholder else classes, meta=True)
    recorded = "crop_pct" in (architecture.input or {})
    sides = (
        Side.of(teacher, recipe.data, trained=architecture.trained, own_crop=recorded),
        Side.of(student, recipe.data, own_crop=recorded and copies_teacher(recipe)),
    )
    if trains_teacher(recipe):
        require_truth(teacher, recipe.data, "teacher")
    require_truth(student, recipe.data, "student" if recipe.student.model else "teacher")
    refuse_other_channels(sides[0].input, sides[1].input)
    job = Job(recipe, name, where, classes, architecture, *sides, placeholder)
    if datasets is not None:
        job.datasets = set_aside(datasets, recipe)
    return job


@contextmanager
def _support_first(recipe: Recipe) -> Iterator[None]:
    """If a model cannot be built, first report whether a step refuses the student's family: arguments for a ViT then make no sense."""
    try:
        yield
    except UserError as error:
        name = recipe.student.model or recipe.teacher.model
        try:
            bare = weights.build(name, device="meta")
        except UserError:
            raise error from None
        for index, entry in enumerate(recipe.steps):
            if isinstance(entry.spec, Transform) and _is_of_other_family(bare, entry.spec):
                try:
                    entry.spec.plan(bare)
                except UserError as refusal:
                    raise UserError(f"steps[{index}].{entry.name}: {refusal}\n  Besides, {error}") from error
        raise


def _is_of_other_family(model: nn.Module, spec: Transform) -> bool:
    """Whether the transform needs something that the model's family does not have."""
    family = family_of(model) or FAMILIES["generic"]
    return any(family.lacks(need) for need in spec.needed())


def pick_device(name: str) -> torch.device:
    """The device of that name; 'auto' is the first available one of cuda, mps and cpu.

    Raises:
        UserError: the device is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kinds = ("cpu", "cuda", "mps", "xpu")
    try:
        device = torch.device(name)
        if device.type not in kinds:
            raise UserError(f"{option('device', name)} is none of {', '.join(kinds)} (cuda:1 names the second GPU)")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"{option('device', name)} cannot be used: {str(error).splitlines()[0]}; {option('device', 'cpu')} always can"
        ) from error
    return device


def refuse_own_inputs(recipe: Recipe, folder: RunFolder) -> None:
    """Raise a `UserError` if overwriting the folder would delete inputs of the run."""
    named = {
        "teacher.weights": recipe.teacher.weights,
        "teacher.adapter": recipe.teacher.adapter,
        "student.weights": recipe.student.weights,
        "data.root": recipe.data.root,
    }
    named |= {
        f"steps[{i}].{s.name}.{field}": getattr(s.spec, field)
        for i, s in enumerate(recipe.steps)
        if isinstance(s.spec, Transform)
        for field in s.spec.reads
    }
    for key, value in named.items():
        if not value:
            continue
        path = expanded(value, key).resolve()
        if path.exists() and folder.path.resolve() in (path, *path.parents):
            raise UserError(
                f"{switch('overwrite')} would delete {value}, which {key} reads; give another {option('output')}"
            )


def refuse_small_heads(job: Job) -> None:
    """Raise a `UserError` where a head has fewer classes than the data, as far as they are known."""
    recipe, have = job.recipe, job.classes
    if not recipe.data.labelled:
        return
    models = {"student": job.student.model}
    if recipe.student.head != "new":
        models = {"teacher": job.teacher.model, **models}
    for whose, model in models.items():
        classes = getattr(model, "num_classes", 0)
        needed = task_of(model, recipe.data.usual_task).needs_classes(have) if have else 0
        if not classes or needed <= classes:
            continue
        untold = whose == "teacher" and is_untold(recipe, job.architecture.args)
        raise UserError(too_small(whose, classes, have or 0, recipe, untold=untold))


def refuse_data(job: Job) -> None:
    """Check before any training what is known only of opened data.

    Raises:
        UserError: the data has no classes for a new head, no masks to learn from, or images of other channels.
    """
    recipe, datasets = job.recipe, job.datasets
    if recipe.student.head == "new" and not head_size(recipe, datasets.num_classes):
        raise UserError(_no_classes(recipe))
    refuse_missing_masks(job)
    refuse_other_pictures(job)


def _no_classes(recipe: Recipe) -> str:
    return f"student.head=new is a classifier of the data's classes, but the images of data '{recipe.data.name}' have none; leave it out"


def require_truth(model: nn.Module, data: Data, whose: str) -> None:
    """Raise a `UserError` where a model cannot be trained or judged by the ground truth of a data set.

    Args:
        whose: what messages call the model.
    """
    word, ours = find_set(data.name).truth, task_of(model, data.usual_task)
    if word is None or ours.reads(truth := find_task(word)):
        return
    models = f" ({', '.join(truth.models)})" if truth.models else ""
    sets = [entry.name for entry in SETS.values() if entry.truth and ours.reads(find_task(entry.truth))]
    raise UserError(
        f"data.name={data.name}: its images have the ground truth of the task '{word}', and the {whose}, {model_name(model)}, is a model "
        f"for '{ours.name}'; take a model for '{word}'{models}, or data for '{ours.name}' ({', '.join(briefly(sets))})"
    )


def refuse_missing_masks(job: Job) -> None:
    """Raise a `UserError` where a model is to learn masks from the ground truth and the training set has none."""
    steps = (entry.spec for entry in job.recipe.steps)
    learns = {"teacher": job.teacher} if trains_teacher(job.recipe) else {}
    learns |= {"student": job.student} if any(isinstance(s, PhaseSpec) and s.needs_labels for s in steps) else {}
    source = getattr(job.datasets.train, "source", None)
    if not isinstance(source, AnnotatedFiles) or source.outlined:
        return
    for whose, side in learns.items():
        if side.input.masks:
            raise UserError(
                f"the {whose} is a {model_name(side.model)}, which learns masks, and no object to train on has a segmentation that gives "
                f"one; set {whose}.model=faster_rcnn to learn boxes alone"
            )


def refuse_other_pictures(job: Job) -> None:
    """Raise a `UserError` where none of the images to train on that are looked at can be given to a model, or augmented as asked."""
    train = job.datasets.train
    clips = isinstance(train, Samples) and train.clips is not None  # whose frames are pictures
    if job.student.input.channels not in MODES and not clips:
        refuse_colours(job.recipe.data.augment, job.student.input.channels)
    for whose, side in (("student", job.student), ("teacher", job.teacher)):
        if side.input.frames is not None and not clips:
            raise UserError(
                f"data.name={job.recipe.data.name} has images, and the {whose}, {model_name(side.model)}, takes clips of "
                f"{side.input.frames} frames; give videos: data.name=videos"
            )
    if not isinstance(train, Samples) or clips:
        return
    for whose, side in (("student", job.student), ("teacher", job.teacher)):
        channels = side.input.channels
        found = [1] if isinstance(train.source, Pixels) else [s[2] for s in train.shapes(LOOKED_AT, channels)]
        if found and not any(fits(given, channels) for given in found):
            have = " or ".join(map(str, sorted({*found})))
            raise UserError(
                f"data.name={job.recipe.data.name}: its images have {have} channel{'s' * (have != '1')}, and the {whose}, "
                f"{model_name(side.model)}, takes {channels}; give images of {channels}, or a model of as many (in_chans)"
            )
