"""Whether the classifiers of a recipe's models have enough outputs for the data's classes, as far as that is known without building one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressvit.data.classes import ORDERS, read_names
from compressvit.data.input import class_mismatch
from compressvit.data.notes import counted
from compressvit.data.sets.folder import class_folders
from compressvit.data.spec import Data, known_classes
from compressvit.errors import UserError
from compressvit.files import expanded
from compressvit.model.hub import HUB
from compressvit.model.names import COMPOSED
from compressvit.recipe.recipe import Recipe
from compressvit.runs.models import has_own_head, teacher_architecture
from compressvit.tasks.base import find_task


def require_enough_outputs(recipe: Recipe, name: str) -> str | None:
    """Compare the heads with the classes of the data, where the folder is here: no image is listed, no model built, nothing downloaded.

    Args:
        name: the recipe's name in messages.

    Returns:
        A sentence where the teacher's head tells more classes apart than there are, else None.

    Raises:
        UserError: a head has fewer outputs than there are classes, or `data.val_fraction` cannot be used.
    """
    try:
        have = _classes_by_name(recipe.data)
        needed = find_task(recipe.data.usual_task).needs_classes(have) if have else 0
        if not have or not needed or not recipe.data.labelled:
            return None
        heads = {"student": recipe.student.args.get("num_classes")}
        if recipe.student.head != "new":
            heads = {"teacher": _teacher_outputs(recipe), **heads}
        for whose, outputs in heads.items():
            if isinstance(outputs, int) and 0 < outputs < needed:
                raise UserError(too_small(whose, outputs, have, recipe))
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    outputs = heads.get("teacher")
    return class_mismatch(needed, outputs, new_head=has_own_head(recipe)) if isinstance(outputs, int) else None


def is_untold(recipe: Recipe, args: Mapping[str, Any]) -> bool:
    """Whether nothing but the file of the teacher's weights says how many classes its classifier has, and a plan goes by timm's number.

    Args:
        args: with which the teacher is built.
    """
    return not ("num_classes" in args or recipe.teacher.weights == "pretrained" or has_own_head(recipe))


def untold_note(recipe: Recipe, classes: int, needed: int, outputs: int) -> str | None:
    """What to tell of a teacher that `is_untold`, where timm's number is another than the data's. (Fewer outputs are refused.)

    Args:
        classes: of the data, 0 where they are not known.
        needed: outputs for these, in the teacher's task.
        outputs: of the head that timm builds; 0 without one.
    """
    if not classes or (outputs and outputs <= needed):
        return None
    begin = f"the data has {counted(classes, 'class')}, and as teacher.num_classes is not given, timm builds {recipe.teacher.model}"
    if not outputs:
        return f"{begin} without a classifier; if the file has one, give the number of its classes, e.g. teacher.num_classes={classes}"
    return (
        f"{begin} with {outputs}; set it to the number of classes of the file's classifier, e.g. teacher.num_classes={classes}, or 0 if it "
        f"has none. With {outputs}, accuracy is meaningless unless class 0, 1, … are the same"
    )


def too_small(whose: str, outputs: int, classes: int, recipe: Recipe, *, untold: bool = False) -> str:
    """What to say of a head with fewer outputs than the data has classes.

    Args:
        whose: 'teacher' or 'student'.
        untold: it is a teacher's that `is_untold`.
    """
    advice = f"set student.args.num_classes={classes}, or leave it out"
    if whose == "teacher" and untold:
        advice = (
            f"that is timm's number, as teacher.num_classes is not given: set teacher.num_classes={classes} if the file's classifier has "
            "as many, or train a new one with teacher.finetune={}"
        )
    elif whose == "teacher":
        advice = f"set teacher.num_classes={classes} and train the head with teacher.finetune"
        if has_own_head(recipe):
            advice = "leave teacher.num_classes out: the teacher then has as many"
    return f"the data has {counted(classes, 'class')}, and the {whose}'s head has only {outputs}; {advice}"


def _classes_by_name(data: Data) -> int | None:
    """The number of classes as the recipe, the set or the names of class folders say it; None where none does."""
    if known := known_classes(data):
        return known
    if data.name != "folder" or data.root is None or not (root := expanded(data.root, "data.root")).is_dir():
        return None
    if data.classes is not None and data.classes not in ORDERS:
        return len(read_names(data.classes))
    if any(root.glob("*.tar")):  # its index takes long to read
        return None
    found = class_folders(data)
    return None if found is None else len(found[0])


def _teacher_outputs(recipe: Recipe) -> int | None:
    """The size of the teacher's head, as the recipe says it, the folder with its weights, or timm of a pretrained model."""
    teacher = recipe.teacher
    if teacher.weights.startswith(HUB):  # may have to be downloaded
        return teacher.num_classes
    found = teacher_architecture(recipe).args.get("num_classes")
    if has_own_head(recipe):  # as many as the data has, where nothing else is said
        return found if isinstance(found, int) else None
    if found is None and teacher.weights == "pretrained" and teacher.model.partition(".")[0] not in COMPOSED:
        from timm.models import get_pretrained_cfg

        config = get_pretrained_cfg(teacher.model, allow_unregistered=False)
        found = None if config is None else config.num_classes
    return found if isinstance(found, int) else None
