"""Building the teacher and the student of a recipe, with values or (on the meta device) without."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressvit.artifacts import artifact
from compressvit.artifacts.artifact import is_plain
from compressvit.data.spec import known_classes
from compressvit.errors import UserError
from compressvit.files import expanded, near
from compressvit.model import surgery, weights
from compressvit.model.backbone import body_of, head_names, model_name
from compressvit.model.hub import HUB, weights_path
from compressvit.model.local_dir import LocalDir, read_local_dir
from compressvit.model.modules import as_timm
from compressvit.model.peft import merge_peft_, read_peft
from compressvit.model.stored import Manifest, expect_images, is_artifact, read_manifest
from compressvit.notes import Note
from compressvit.recipe.recipe import Recipe
from compressvit.tasks.base import find_task


def trains_teacher(recipe: Recipe) -> bool:
    """Whether the run first trains the teacher."""
    return recipe.teacher.weights == "train" or recipe.teacher.finetune is not None


def has_own_head(recipe: Recipe) -> bool:
    """Whether the teacher has a new head, as large as `teacher.num_classes` says, or else as the data needs."""
    return trains_teacher(recipe) or recipe.teacher.weights == "random"


@dataclass(frozen=True)
class Architecture:
    """A timm model, fully specified: everything needed to build it, with or without values, any number of times.

    Attributes:
        name: name in timm, with or without a tag.
        args: further arguments of timm.create_model.
        input: size and normalisation of its images, if the file with its weights records them.
        trained: whether its weights are already trained for a certain preprocessing, so that options of the data must not change it.
        label_names: of its classes, in target order, if the file with its weights records them.
    """

    name: str
    args: dict[str, Any]
    input: dict[str, Any] | None = None
    trained: bool = False
    label_names: list[str] | None = None

    def build(self, device: str | None = None) -> nn.Module:
        """Build the model with newly initialised values; 'meta' for a skeleton.

        Raises:
            UserError: timm cannot build it.
        """
        model = weights.build(self.name, self.args, device=device)
        if self.input is not None:
            expect_images(model, self.input)
        return model


def teacher_architecture(recipe: Recipe, *, classes: int | None = None) -> Architecture:
    """The architecture of the teacher, from the recipe and from the artifact that `teacher.weights` names, if it does.

    Args:
        recipe: its `teacher` section.
        classes: number of classes of the opened data set, if the recipe does not determine it; the size of the head of a teacher to train.

    Raises:
        UserError: the artifact has another architecture, or is a student.
    """
    stored = _stored_teacher(recipe)
    args = _teacher_args(recipe, stored)
    count = recipe.teacher.num_classes
    if count is None and has_own_head(recipe):
        known = known_classes(recipe.data) or classes
        count = head_size(recipe, known)
    elif count is None:
        count = _classes_of_adapter(recipe) or (_classes_of_file(recipe, args) if stored is None else None)
    if count is not None:
        args["num_classes"] = count
    trained = stored is not None or recipe.teacher.weights == "pretrained"
    if stored is None:
        return Architecture(recipe.teacher.model, args, trained=trained)
    return Architecture(recipe.teacher.model, args, stored.input, trained, stored.label_names)


def head_size(recipe: Recipe, classes: int | None) -> int | None:
    """Number of outputs of a new head for data with that many classes; None if unknown."""
    return find_task(recipe.data.usual_task).head_size(classes)


def _stored_teacher(recipe: Recipe) -> Manifest | LocalDir | None:
    """The description of the model in the artifact or timm folder that `teacher.weights` names; None for a file."""
    asked = recipe.teacher
    if asked.weights in ("pretrained", "train", "random"):
        return None
    folder = weights_path(asked.weights, "teacher.weights")
    manifest = read_manifest(folder) if is_artifact(folder) else read_local_dir(folder)
    if manifest is None:
        return None
    if manifest.architecture.partition(".")[0] != asked.model.partition(".")[0]:
        raise UserError(
            f"teacher.weights: {asked.weights} is a {manifest.architecture}, and teacher.model says {asked.model}; set "
            f"teacher.model={manifest.architecture}, or give the weights of another model"
        )
    if isinstance(manifest, Manifest) and not is_plain(folder):
        steps = ", ".join(step.transform for step in manifest.transforms)
        raise UserError(
            f"teacher.weights: {asked.weights} is the result of {steps} on a {manifest.architecture}, no model of timm's own. Give the "
            "teacher of that run; or, if `compressvit merge` can make a plain model of it, RUN/merged. To go on training it, also on other "
            "classes, repeat its transforms as steps, and then `load_weights`"
        )
    return manifest


def _teacher_args(recipe: Recipe, manifest: Manifest | LocalDir | None) -> dict[str, Any]:
    """Arguments of timm.create_model: those of the artifact, overridden by those of the recipe."""
    return {**(manifest.args if manifest else {}), **recipe.teacher.args}


def load_teacher(recipe: Recipe, teacher: nn.Module) -> list[Note]:
    """Load the values that `teacher.weights` names into the teacher; for 'train' and 'random' it keeps its initial values. Returns what was
    taken off or left out of a file, and that the teacher is untrained if it is."""
    found = untrained(recipe)
    if recipe.teacher.backbone is not None:
        found += _load_backbone(recipe.teacher.backbone, teacher, "teacher")
    new_head = brings_head(recipe)
    if recipe.teacher.weights == "pretrained":
        weights.load_pretrained(teacher, "teacher.weights", new_head=new_head)
    elif recipe.teacher.weights not in ("train", "random"):
        found += weights.load_file(teacher, recipe.teacher.weights, "teacher.weights", new_head=new_head)
    if recipe.teacher.adapter is not None:
        found += merge_peft_(teacher, recipe.teacher.adapter, "teacher.adapter")
    return found


def brings_head(recipe: Recipe) -> bool:
    """Whether the teacher's classifier need not be that of `teacher.weights`: it is trained, or the adapter's."""
    asked = recipe.teacher
    if asked.finetune is not None:
        return True
    return _classes_of_adapter(recipe) is not None


def _classes_of_adapter(recipe: Recipe) -> int | None:
    """Of the classifier that `teacher.adapter` brings; None without one, or where the folder is not there yet."""
    given = recipe.teacher.adapter
    if given is None or not expanded(given, "teacher.adapter").exists():
        return None
    return read_peft(given, "teacher.adapter").classes


def _file(recipe: Recipe) -> Path | None:
    """The file that `teacher.weights` names, where it is here; None of a folder, and of a word."""
    asked = recipe.teacher.weights
    if asked in ("pretrained", "train", "random") or asked.startswith(HUB):
        return None
    path = weights_path(asked, "teacher.weights")
    return path if path.is_file() else None


def _classes_of_file(recipe: Recipe, args: dict[str, Any]) -> int | None:
    """Of the classifier in the file that `teacher.weights` names, where nothing else says how many; None without one."""
    path = _file(recipe)
    if path is None or "num_classes" in args:
        return None
    built: Any = weights.build(recipe.teacher.model, args, device="meta")
    own, heads = built.state_dict(), sorted(head_names(built))
    if heads and len(own[heads[0]]) != built.num_classes:  # of a detector, which has more outputs than classes
        return None
    return weights.classes_in_file(built, path, "teacher.weights") or None


def check_file(recipe: Recipe, teacher: nn.Module) -> list[Note]:
    """Compare names and shapes in the file that `teacher.weights` names, where it is here, with a teacher on the meta device.

    Raises:
        UserError: as `load_teacher` will.
    """
    if (path := _file(recipe)) is None:
        return []
    return weights.load_file(teacher, path, "teacher.weights", new_head=brings_head(recipe))


def missing_yet(recipe: Recipe) -> list[str]:
    """Of files that the teacher needs and that are not there: what a plan without them does not know. The Hub is not asked."""
    asked, notes = recipe.teacher, []
    elsewhere = asked.weights in ("train", "pretrained", "random") or asked.weights.startswith(HUB)
    if not elsewhere and not weights_path(asked.weights, "teacher.weights").exists():
        notes.append(
            f"{_absent('teacher.weights', asked.weights)} Until it is there, a plan goes by the recipe alone; an artifact would also say "
            "with which arguments and classes the teacher is built"
        )
    if asked.adapter is not None and not expanded(asked.adapter, "teacher.adapter").exists():
        notes.append(
            f"{_absent('teacher.adapter', asked.adapter)} It is needed, and it may bring a classifier of other classes"
        )
    return notes


def _absent(where: str, given: str) -> str:
    return f"{where}: there is no {given}{near(Path(given)) or '.'}"


def missing_data(recipe: Recipe) -> str | None:
    """What to tell where the folder of the data is not there."""
    root = recipe.data.root
    if root is None or (path := expanded(root, "data.root")).exists():
        return None
    return f"data.root: there is no {root}{near(path)}"


def untrained(recipe: Recipe) -> list[Note]:
    """A note where the teacher is not trained at all."""
    if recipe.teacher.weights != "random":
        return []
    text = "the teacher is untrained (teacher.weights=random): its figures, agreement with it, and what is learned from it, mean nothing"
    return [Note("untrained_teacher", 1, text)]


def _load_backbone(source: str, detector: nn.Module, whose: str) -> list[Note]:
    """Give the backbone of a detector or segmenter the values that `teacher.backbone` or `student.backbone` names."""
    backbone, where = _backbone(detector, source, whose), f"{whose}.backbone"
    if source != "pretrained":
        return weights.load_file(backbone, source, where, new_head=True)
    weights.load_pretrained(backbone, where, new_head=True)
    return []


def _backbone(detector: nn.Module, source: str, whose: str) -> nn.Module:
    """That of a detector or segmenter, which is to be read from `source`."""
    backbone = body_of(detector)
    if backbone is None:
        raise UserError(
            f"{whose}.backbone={source}: {model_name(detector)} is no detector or segmenter, so it is a backbone "
            f"itself; give {whose}.weights={source}"
        )
    return backbone


def require_pretrained(recipe: Recipe, teacher: nn.Module, student: nn.Module) -> None:
    """Check that timm has what the recipe calls pretrained; only the structure of both models is used.

    Raises:
        UserError: it does not, or a backbone is named for a model that has none.
    """
    for whose, asked, model in (("teacher", recipe.teacher, teacher), ("student", recipe.student, student)):
        if asked.backbone is not None:
            backbone = _backbone(model, asked.backbone, whose)
            if asked.backbone == "pretrained":
                weights.require_pretrained(backbone, f"{whose}.backbone", new_head=True)
        if asked.weights == "pretrained":
            # the student's head is trained by the steps
            new_head = whose == "student" or brings_head(recipe)
            weights.require_pretrained(model, f"{whose}.weights", new_head=new_head)


def require_student_file(recipe: Recipe, teacher: nn.Module) -> list[Note]:
    """Raise a `UserError` before the teacher is trained if the file of `student.weights` is missing or does not fit.

    Args:
        recipe: its `student` section.
        teacher: only its structure is used.

    Returns:
        What was taken off or left out of the file.
    """
    asked = recipe.student.weights
    if asked in ("teacher", "pretrained", "random"):
        return []
    if not weights_path(asked, "student.weights").exists():
        raise UserError(
            f"student.weights: there is no file {asked}; it can be teacher, pretrained, random, or the path of a file or of an artifact"
        )
    if (folder := _made_before(recipe)) is not None:
        artifact.load(folder)
        return []
    return weights.load_file(_empty_student(recipe, teacher), asked, "student.weights")


def build_student(recipe: Recipe, teacher: nn.Module, *, classes: int | None = None, meta: bool = False) -> nn.Module:
    """The model before the first step: a copy of the teacher, or the model of the recipe's `student` section.

    Args:
        recipe: its `student` section.
        teacher: loaded (or on the meta device).
        classes: number of classes of the opened data set, if the recipe does not determine it; the size of a new head.
        meta: build a skeleton without values.
    """
    student = student_body(recipe, teacher, meta=meta)
    size = head_size(recipe, known_classes(recipe.data) or classes)
    if recipe.student.head == "new" and size:
        with torch.device("meta" if meta else "cpu"):
            as_timm(student).reset_classifier(size)
    return student


def copies_teacher(recipe: Recipe) -> bool:
    """Whether the student starts as the teacher itself, its input included."""
    asked = recipe.student
    return asked.model is None and not asked.args and asked.weights == "teacher"


def student_body(recipe: Recipe, teacher: nn.Module, *, meta: bool) -> nn.Module:
    """The student of `build_student` before it gets a new head: with the teacher's classifier, or one of the same size."""
    asked = recipe.student
    if copies_teacher(recipe):
        return surgery.skeleton(teacher) if meta else surgery.deep_copy(teacher)
    if (folder := _made_before(recipe)) is not None:
        made = artifact.load(folder)
        return surgery.skeleton(made) if meta else made
    student = _empty_student(recipe, teacher, device="meta" if meta else None)
    if meta:
        return student
    if asked.weights == "teacher":
        weights.copy_matching(student, teacher)
    elif asked.weights == "pretrained":
        weights.load_pretrained(student, "student.weights", new_head=True)  # trained by the steps
    elif asked.weights != "random":
        weights.load_file(student, asked.weights, "student.weights")
    elif asked.backbone is not None:
        _load_backbone(asked.backbone, student, "student")
    return student


def _made_before(recipe: Recipe) -> Path | None:
    """The artifact that `student.weights` names, where it is the result of transforms: the student begins as it is, transforms and all.

    Raises:
        UserError: the recipe says besides which model it is.
    """
    asked = recipe.student
    if asked.weights in ("teacher", "pretrained", "random") or asked.weights.startswith(HUB):
        return None
    folder = weights_path(asked.weights, "student.weights")
    if not is_artifact(folder) or is_plain(folder):
        return None
    said = next((name for name, value in (("model", asked.model), ("args", asked.args)) if value), None)
    if said is not None:
        raise UserError(
            f"student.{said}: {asked.weights} was made by transforms and says itself which model it is; leave student.{said} out"
        )
    return folder


def _empty_student(recipe: Recipe, teacher: nn.Module, device: str | None = None) -> nn.Module:
    """The model of the recipe's `student` section with newly initialised values, and a classifier of the teacher's size."""
    asked = recipe.student
    args = {} if asked.model else _teacher_args(recipe, _stored_teacher(recipe))
    args |= {"num_classes": getattr(teacher, "num_classes", None), **asked.args}
    return weights.build(asked.model or recipe.teacher.model, args, device=device)
