"""A recipe's student before any training: the transforms of its first steps on the teacher's values, and how good the result is."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import nn

from compressvit.data.input import InputConfig, input_config, renormalise
from compressvit.data.loaders import calibration_batches, eval_loader
from compressvit.data.opening import open_data
from compressvit.data.spec import known_classes
from compressvit.diagnostics.cka_layers import likeness
from compressvit.errors import UserError
from compressvit.fitting.moments import Source
from compressvit.recipe.recipe import Recipe
from compressvit.runs.models import build_student, build_teacher, load_teacher
from compressvit.runs.preflight import pick_device
from compressvit.training import optimisation as opt
from compressvit.training.evaluate import evaluate
from compressvit.training.pairs import match_layers
from compressvit.training.phases.distill import Distill
from compressvit.transforms import LedgerEntry, Transform
from compressvit.transforms.applying import transform_

QUALITIES = {
    "top1": "top-1 (%)",
    "agreement": "same first class as the teacher (%)",
    "cosine": "cosine of the outputs",
    "cosine_patches": "cosine of the patch tokens",  # of headless models
}


class OneShot:
    """Teacher, data and calibration images of a recipe, loaded once for any number of students.

    Attributes:
        transforms: those before the recipe's first phase.
        teacher: in eval mode, on the device.
        config, teacher_config: what the images of student and teacher look like.

    Raises:
        UserError: the recipe would train its teacher first, begins with a phase, or names data or weights that are not there.
    """

    def __init__(self, recipe: Recipe, device: str, asker: str):
        if recipe.teacher.weights == "train":
            raise UserError(
                f"{asker} trains nothing, so the teacher needs values: run the recipe once and give teacher.weights=RUN/teacher"
            )
        if recipe.student.head == "new":
            raise UserError(
                f"{asker} looks at the student before any training, when its new classifier "
                "(student.head=new) knows nothing; apply the recipe"
            )
        self.transforms = leading_transforms(recipe)
        if not self.transforms:
            names = ", ".join(step.name for step in recipe.steps) or "none"
            raise UserError(
                f"{asker} looks at the transforms before the first phase; the steps of this recipe are {names}"
            )
        self.recipe = recipe
        self.device = pick_device(device)
        self.datasets = open_data(recipe.data)
        self.teacher = _teacher(recipe, self.datasets.num_classes)
        opt.seed_everything(recipe.seed, 1)
        self._start = build_student(recipe, self.teacher)
        self.config, self.teacher_config = (input_config(m, recipe.data) for m in (self._start, self.teacher))
        self._images = partial(
            calibration_batches,
            self.datasets,
            recipe.data,
            self.config,
            self.device,
            images=recipe.calibration.images,
            seed=recipe.seed,
        )
        self._source = Source(copy.deepcopy(self._start), self._images)  # its moments serve every student
        self.teacher.to(self.device).eval()

    def student(self, transforms: list[Transform]) -> tuple[nn.Module, list[LedgerEntry]]:
        """A student that `transforms` make of the recipe's start, and their ledger with its errors."""
        student = copy.deepcopy(self._start)
        opt.seed_everything(self.recipe.seed, 2, len(self.transforms))  # as `apply` does before its first phase
        return student, transform_(student, transforms, self._source)

    def layer_pairs(self, student: nn.Module) -> str | None:
        """Where the phase that follows has `layers: auto`: the pairs it would begin with, in words."""
        following = self.recipe.steps[len(self.transforms) :]
        spec = following[0].spec if following else None
        if not isinstance(spec, Distill) or spec.layers != "auto":
            return None
        alike = likeness(
            student,
            self.teacher,
            self._images,
            self.device,
            images=self.recipe.calibration.images,
            teacher_input=partial(renormalise, source=self.config, target=self.teacher_config),
        )
        pairs, how = match_layers(student, self.teacher, spec.layers, alike)
        return f"layer pairs (student↔teacher): {', '.join(map(str, pairs)) or 'none'}  ({how})"

    def scores(self, model: nn.Module, own: InputConfig) -> dict[str, Any]:
        """`evaluate` of a model, beside the teacher, on images that look like `own`."""
        return evaluate(
            model.to(self.device),
            eval_loader(self.datasets, self.recipe.data, own, self.device),
            self.device,
            teacher=self.teacher,
            teacher_input=partial(renormalise, source=own, target=self.teacher_config),
            labelled=self.datasets.labeled,
        )


def quality_words(scores: dict[str, Any]) -> str:
    """The qualities that were measured, in a few words."""
    return ", ".join(f"{label} {scores[key]:.4g}" for key, label in QUALITIES.items() if scores.get(key) is not None)


def leading_transforms(recipe: Recipe) -> list[Transform]:
    """The transforms before the recipe's first phase."""
    specs: list[Transform] = []
    for step in recipe.steps:
        if not isinstance(step.spec, Transform):
            break
        specs.append(step.spec)
    return specs


def _teacher(recipe: Recipe, classes: int | None) -> nn.Module:
    """The teacher with its values, and no head that would have to be trained first."""
    section = recipe.teacher
    count = section.num_classes
    if count is None and section.finetune is not None:
        count = known_classes(recipe.data) or classes
    as_it_is = section.model_copy(update={"finetune": None, "num_classes": count})
    recipe = recipe.model_copy(update={"teacher": as_it_is})
    teacher = build_teacher(recipe)
    load_teacher(recipe, teacher)
    return teacher
