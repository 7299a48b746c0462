"""Resuming a run that is finished: nothing is computed or written again."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from torch import nn

from compressvit.artifacts import artifact
from compressvit.errors import UserError
from compressvit.recipe.recipe import Recipe
from compressvit.runs.files import Results, read_results
from compressvit.runs.folder import RunFolder
from compressvit.runs.merge import read_merge
from compressvit.runs.models import trains_teacher
from compressvit.tasks.qualities import words


@dataclass(frozen=True)
class FinishedRun:
    """What a finished run left in its folder.

    Attributes:
        student: as read back, on the CPU.
        merged: the content of `merge.json` if the recipe ends with a merge, else None.
    """

    folder: RunFolder
    results: Results
    student: nn.Module
    merged: dict[str, Any] | None

    def sentence(self, remaining: str) -> str:
        """When the run was finished, what remains to be done, and the figures of student and teacher."""
        when = datetime.fromtimestamp((self.folder.path / "results.json").stat().st_mtime)
        figures = []
        for whose, found in (("student", self.results.student), ("teacher", self.results.teacher)):
            scores = words(found.model_dump())
            figures.append(f"{whose}: {found.parameters:,} parameters{f', {scores}' if scores else ''}")
        return f"{self.folder.path} was finished on {when:%Y-%m-%d at %H:%M}; {remaining}; its figures: {'; '.join(figures)}"


def finished_run(folder: RunFolder, recipe: Recipe) -> FinishedRun | None:
    """The run in a folder if it is finished; None if one of its results is missing or damaged, so that resuming it makes that again."""
    try:
        results = read_results(folder.path)  # written last, except for a merge
        merged = read_merge(folder.path / "merged", folder.path) if recipe.merges else None
        if trains_teacher(recipe):
            artifact.load(folder.teacher)
        return FinishedRun(folder, results, artifact.load(folder.student), merged)
    except UserError:
        return None
