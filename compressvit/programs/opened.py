"""Loading models and evaluation images, for programs that need both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from compressvit.artifacts import artifact
from compressvit.data.input import Side
from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.recipe.recipe import Recipe, load_recipe
from compressvit.runs.evaluate import artifact_in, data_recipe, trained_side
from compressvit.runs.folder import RESOLVED
from compressvit.runs.models import load_teacher, teacher_architecture
from compressvit.runs.recorder import evaluation_images


@dataclass(frozen=True)
class Opened(Side):
    """A model of a run or an artifact, in eval mode, with its name."""

    label: str


@dataclass(frozen=True)
class OpenedModels:
    """Models, and evaluation images for them.

    Attributes:
        models: student and teacher of a run, or the models in the given order.
        folder: where findings about them are written.
    """

    models: tuple[Opened, ...]
    recipe: Recipe
    device: torch.device
    folder: Path

    def pair(self) -> tuple[Opened, Opened]:
        """The two models to compare.

        Raises:
            UserError: only one artifact was given, which does not record its teacher.
        """
        if len(self.models) == 1:
            raise UserError(
                f"{self.models[0].label} is an artifact, which does not know its teacher; name a second model to compare it with"
            )
        return self.models[0], self.models[1]

    def images(self, count: int) -> Iterator[torch.Tensor]:
        """Batches (B, C, H, W) of about `count` evaluation images, normalised for the first model."""
        for batch, _ in self.labelled(count):
            yield batch

    def labelled(self, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches (images, targets) of the same images as `images`."""
        datasets = open_data(self.recipe.data)
        yield from evaluation_images(datasets, self.recipe.data, self.models[0].input, self.device, count)


def open_models(words: Sequence[str], device: torch.device, *, most: int = 2) -> OpenedModels:
    """Load the models and the data given on a command line.

    Args:
        words: run folders or artifacts, and overrides of the data (data.name=digits). For one run, student and teacher are loaded.
        most: maximum number of models.

    Raises:
        UserError: there is no model at a path, a teacher is not available, there are too many paths, or the data is unknown.
    """
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    paths = [Path(word) for word in words if word not in overrides]
    if not 1 <= len(paths) <= most:
        raise UserError(
            f"{len(paths)} models were named ({', '.join(map(str, paths)) or 'none'}); give one run, or "
            + (f"up to {most} models" if most > 1 else "one artifact")
        )
    folders = [artifact_in(path) for path in paths]
    home = next((f for f in folders if (f.parent / RESOLVED).is_file()), folders[0])
    data = (recipe := data_recipe(home, overrides, "the program")).data
    sides = [trained_side(artifact.load(folder).float(), data, overrides) for folder in folders]
    found = list(zip(map(str, paths), sides, strict=True))
    if len(paths) == 1 and (paths[0] / RESOLVED).is_file():
        found = [("student", sides[0]), ("teacher", teacher_of(paths[0], data, overrides))]
    labels = [label for label, _ in found]
    if len(set(labels)) < len(labels):
        raise UserError(f"{labels[0]} is named twice; give one run for student and teacher, or two different models")
    opened = tuple(Opened(side.model.eval(), side.input, label) for label, side in found)
    return OpenedModels(opened, recipe, device, paths[0] if len(paths) == 1 else paths[0].parent)


def teacher_of(run: Path, data: Data, overrides: Sequence[str]) -> Side:
    """The teacher of a run: the one that it trained, or the one named in its recipe.

    Raises:
        UserError: the weights are not available.
    """
    if (run / "teacher").is_dir():
        return trained_side(artifact.load(run / "teacher").float(), data, overrides)
    recipe = load_recipe(run / RESOLVED)
    known = teacher_architecture(recipe)
    teacher = known.build()
    load_teacher(recipe, teacher)
    if not known.trained:  # a bare file, of which nothing else is known
        return Side.of(teacher, data)
    return trained_side(teacher, data, overrides, recorded="crop_pct" in (known.input or {}))
