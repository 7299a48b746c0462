"""TensorBoard: event files in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressvit.charts.findings import Finding
from compressvit.files import disk_faults
from compressvit.recipe.recipe import Recipe
from compressvit.runs.boards.base import ALWAYS, Board, board
from compressvit.runs.files import Results
from compressvit.runs.tags import final_figures, hyper_parameters


@board(ALWAYS)
class TensorBoard(Board):
    """`tensorboard/` in the run folder."""

    title = "TensorBoard"

    def __init__(self, folder: Path, recipe: Recipe | None, *, new: bool):
        self._folder = folder
        self._writer: Any = None

    def begin(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second

        with disk_faults(self._folder):
            self._writer = SummaryWriter(str(self._folder / "tensorboard"))

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def finding(self, finding: Finding, folder: Path) -> None:
        finding.log(self._writer, folder)

    def results(self, recipe: Recipe, results: Results) -> None:
        """Fill the HParams tab: the recipe, and the results as scalars `final/…`. The writer's method `add_hparams` would create a second
        run."""
        from torch.utils.tensorboard import summary

        metrics = final_figures(results)
        for part in summary.hparams(hyper_parameters(recipe), metrics):
            self._writer.file_writer.add_summary(part)
        for tag, value in metrics.items():
            self._writer.add_scalar(tag, value, 0)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
