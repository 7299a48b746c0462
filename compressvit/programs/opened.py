"""Models on disk and the images to look at them with, for the programs that need both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from compressvit.artifacts import artifact
from compressvit.data.input import Side, input_config
from compressvit.data.opening import open_data
from compressvit.errors import UserError
from compressvit.recipe.recipe import Recipe, load_recipe
from compressvit.runs.evaluate import artifact_in, data_recipe
from compressvit.runs.folder import RESOLVED
from compressvit.runs.models import build_teacher, load_teacher
from compressvit.runs.recorder import evaluation_images


@dataclass(frozen=True)
class Opened(Side):
    """A model of a run or an artifact, in eval mode, with what it is called."""

    label: str


@dataclass(frozen=True)
class OpenedModels:
    """Models, and evaluation images for them.

    Attributes:
        models: the student before its teacher, or as they were named.
        folder: where what is found about them belongs.
    """

    models: tuple[Opened, ...]
    recipe: Recipe
    device: torch.device
    folder: Path

    def pair(self) -> tuple[Opened, Opened]:
        """The two that are compared.

        Raises:
            UserError: one artifact was named, which does not know its teacher.
        """
        if len(self.models) == 1:
            raise UserError(
                f"{self.models[0].label} is an artifact, which does not know its teacher; name a second model to compare it with"
            )
        return self.models[0], self.models[1]

    def images(self, count: int) -> Iterator[torch.Tensor]:
        """Batches (B, C, H, W) of about `count` evaluation images as the first model takes them."""
        for batch, _ in self.labelled(count):
            yield batch

    def labelled(self, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Likewise, with labels."""
        datasets = open_data(self.recipe.data)
        yield from evaluation_images(datasets, self.recipe.data, self.models[0].input, self.device, count)


def open_models(words: Sequence[str], device: torch.device, *, most: int = 2) -> OpenedModels:
    """Load what is named.

    Args:
        words: run folders or artifacts, and overrides of the data (data.name=digits). Of one run, student and teacher are opened.
        most: how many models at most.

    Raises:
        UserError: nothing to open at a path, a teacher that cannot be had, too many paths, or no data known.
    """
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    paths = [Path(word) for word in words if word not in overrides]
    if not 1 <= len(paths) <= most:
        raise UserError(
            f"{len(paths)} models were named ({', '.join(map(str, paths)) or 'none'}); give one run, or "
            + (f"up to {most} models" if most > 1 else "one artifact")
        )
    folders = [artifact_in(path) for path in paths]
    found = [(str(path), artifact.load(folder)) for path, folder in zip(paths, folders, strict=True)]
    home = next((f for f in folders if (f.parent / RESOLVED).is_file()), folders[0])
    recipe = data_recipe(home, overrides, "the program")
    if len(paths) == 1 and (paths[0] / RESOLVED).is_file():
        found = [("student", found[0][1]), ("teacher", teacher_of(paths[0]))]
    labels = [label for label, _ in found]
    if len(set(labels)) < len(labels):
        raise UserError(f"{labels[0]} is named twice; give one run for student and teacher, or two different models")
    opened = tuple(Opened(model.float().eval(), input_config(model, recipe.data), label) for label, model in found)
    return OpenedModels(opened, recipe, device, paths[0] if len(paths) == 1 else paths[0].parent)


def teacher_of(run: Path) -> nn.Module:
    """The teacher of a run: the one that it trained, or the one that its recipe names.

    Raises:
        UserError: the weights cannot be had.
    """
    if (run / "teacher").is_dir():
        return artifact.load(run / "teacher")
    recipe = load_recipe(run / RESOLVED)
    teacher = build_teacher(recipe)
    load_teacher(recipe, teacher)
    return teacher
