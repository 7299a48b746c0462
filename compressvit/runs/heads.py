"""Whether the classifiers of a recipe's models have enough outputs for the data's classes, as far as that is known without building one."""

from __future__ import annotations

from compressvit.data.classes import ORDERS, read_names
from compressvit.data.input import class_mismatch
from compressvit.data.notes import counted
from compressvit.data.sets.folder import class_folders
from compressvit.data.spec import Data, known_classes
from compressvit.errors import UserError
from compressvit.files import expanded
from compressvit.model.detectors import DETECTORS
from compressvit.model.hub import HUB
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


def too_small(whose: str, outputs: int, classes: int, recipe: Recipe) -> str:
    """What to say of a head with fewer outputs than the data has classes.

    Args:
        whose: 'teacher' or 'student'.
    """
    advice = f"set student.args.num_classes={classes}, or leave it out"
    if whose == "teacher":
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
    if found is None and teacher.weights == "pretrained" and teacher.model.partition(".")[0] not in DETECTORS:
        from timm.models import get_pretrained_cfg

        config = get_pretrained_cfg(teacher.model, allow_unregistered=False)
        found = None if config is None else config.num_classes
    return found if isinstance(found, int) else None
