"""What a run refuses before its folder is touched and anything is trained: devices, labels and folders that will not do."""

from __future__ import annotations

import torch

from compressvit.data.opening import Datasets
from compressvit.errors import UserError
from compressvit.files import expanded
from compressvit.recipe.recipe import Recipe
from compressvit.runs.folder import RunFolder
from compressvit.runs.models import build_student, build_teacher, trains_teacher
from compressvit.training.phases.finetune import Finetune
from compressvit.training.spec import Training
from compressvit.transforms import Transform


def pick_device(name: str) -> torch.device:
    """The device of that name; 'auto' is the first of cuda, mps and cpu that is there.

    Raises:
        UserError: it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kinds = ("cpu", "cuda", "mps", "xpu")
    try:
        device = torch.device(name)
        if device.type not in kinds:
            raise UserError(f"--device {name} is none of {', '.join(kinds)} (cuda:1 names the second GPU)")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"--device {name} cannot be used: {str(error).splitlines()[0]}; --device cpu always can"
        ) from error
    return device


def refuse_own_inputs(recipe: Recipe, folder: RunFolder) -> None:
    """`--overwrite` must not delete what the run reads."""
    named = {
        "teacher.weights": recipe.teacher.weights,
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
            raise UserError(f"--overwrite would delete {value}, which {key} reads; give another --output")


def refuse_labels(recipe: Recipe, datasets: Datasets) -> None:
    """Labels that are missing or that a head cannot tell apart, before anything is trained."""
    if recipe.student.head == "new" and not datasets.num_classes:
        raise UserError(
            f"student.head=new is a classifier of the data's classes, but the images of data '{recipe.data.name}' have none; leave it out"
        )
    if not datasets.labeled:
        phases: dict[str, Training] = {"teacher.finetune": Finetune()} if trains_teacher(recipe) else {}
        for name, spec in (phases | recipe.phases()).items():
            if spec.needs_labels:
                raise UserError(f"{name} learns from labels, but the images of data '{recipe.data.name}' have none")
        return
    have = datasets.num_classes
    teacher = build_teacher(recipe, classes=have, device="meta")
    student = build_student(recipe, teacher, classes=have, meta=True)
    models = {"student": student} if recipe.student.head == "new" else {"teacher": teacher, "student": student}
    for whose, model in models.items():
        classes = getattr(model, "num_classes", 0)
        if have and classes and have > classes:
            advice = (
                " and train the head with teacher.finetune"
                if whose == "teacher"
                else ", or give student.args no num_classes"
            )
            where = "teacher.num_classes" if whose == "teacher" else "student.args.num_classes"
            raise UserError(
                f"the data has {have} classes, and the {whose}'s head tells only {classes} apart; set {where}={have}{advice}"
            )
