"""Run folders as programs read them: what was recorded, and a sentence where it was not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compressvit.errors import UserError
from compressvit.recipe.recipe import Recipe, load_recipe
from compressvit.runs.folder import RESOLVED


@dataclass(frozen=True)
class Run:
    """A run folder, finished or not, under a name that tells it from the others given."""

    path: Path
    label: str

    @property
    def recipe(self) -> Recipe:
        """What it was asked to do.

        Raises:
            UserError: it is damaged, or of another version.
        """
        file = self.path / RESOLVED
        try:
            return load_recipe(file)
        except UserError as error:
            first = str(error).splitlines()[:2][-1].strip()  # a recipe's faults are listed below a headline
            raise UserError(f"{file} is damaged, or was written by another version of compressvit: {first}") from error


def labelled(folders: Sequence[Path]) -> list[Run]:
    """Runs named by as much of the end of their paths as tells them apart."""
    places = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, places)) + 1):
        labels = ["/".join(parts[-depth:]) for parts in places]
        if len(set(labels)) == len(labels):
            break
    return [Run(folder, label) for folder, label in zip(folders, labels, strict=True)]


def not_recorded(run: Run, what: str, how: str) -> UserError:
    """For a run without what a program shows."""
    return UserError(f"{run.path} has no {what}; {how}")
