"""Weights & Biases: the curves, findings and results of a run, sent to a server, or kept for later (`WANDB_MODE=offline`).

Where to, under which project and account, is told as everywhere: by `wandb login` and the variables WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE
and WANDB_DIR. No picture of the data and no weights are sent.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compressvit.charts.findings import Finding
from compressvit.errors import UserError
from compressvit.files import write_json
from compressvit.log import log
from compressvit.reading import Unreadable, read_json
from compressvit.recipe.recipe import Recipe
from compressvit.runs.boards.base import Board, board
from compressvit.runs.files import Results
from compressvit.runs.tags import final_figures, hyper_parameters

FILE = "wandb.json"  # the run's id there, so that a resumed run goes on in the same one
PROJECT = "compressvit"  # where WANDB_PROJECT names none


@board("wandb")
class WandB(Board):
    """A run of W&B, named after the run folder."""

    title = "W&B"
    packages = ("wandb",)
    install = "'compressvit[wandb]'"

    def __init__(self, folder: Path, recipe: Recipe | None, *, new: bool):
        import wandb

        self._wandb, self._groups, self._done = wandb, set[str](), False
        self._file = folder / FILE
        self._identity = (None if new else _identity(self._file, folder)) or uuid.uuid4().hex[:12]
        try:
            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or PROJECT,
                name=folder.resolve().name,
                id=self._identity,
                resume="allow",
                config=None if recipe is None else hyper_parameters(recipe),
                settings=wandb.Settings(console="off"),  # run.log has it, and a progress bar is no log
            )
        except Exception as error:  # no account, no server, a wrong setting: the package's own classes
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300].rstrip(".")
            raise UserError(
                f"W&B could not begin a run: {reason}. Log in with `wandb login`, or set WANDB_MODE=offline to send it later"
            ) from error

    def begin(self) -> None:
        write_json(self._file, {"id": self._identity})

    def _send(self, send: Callable[[Any], object]) -> None:
        """Call with the run; what fails is told once, and the run goes on without W&B."""
        if self._run is None:
            return
        try:
            send(self._run)
        except Exception as error:  # of its process or its server
            log.warning("W&B shows no more of this run: %s: %s", type(error).__name__, error)
            self._run = None

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        def send(run: Any) -> None:
            phase = group.partition("/")[0]
            if phase not in self._groups:  # each phase counts its own steps
                self._groups.add(phase)
                run.define_metric(f"{phase}/step", hidden=True)
                run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
            run.log({**{f"{group}/{name}": value for name, value in values.items()}, f"{phase}/step": step})

        self._send(send)

    def finding(self, finding: Finding, folder: Path) -> None:
        image = lambda: self._wandb.Image(str(folder / f"{finding.name}.png"), caption=finding.caption)  # noqa: E731
        self._send(lambda run: run.log({f"diagnostics/{finding.name}": image()}))

    def results(self, recipe: Recipe, results: Results) -> None:
        self._done = True
        self._send(lambda run: run.summary.update(final_figures(results)))

    def close(self) -> None:
        self._send(lambda run: run.finish(exit_code=0 if self._done else 1))
        self._run = None


def _identity(file: Path, folder: Path) -> str | None:
    """The id of the run in `folder`; None where it has none."""
    try:
        content = read_json(file, folder)
    except Unreadable:
        return None
    return str(content["id"]) if isinstance(content, dict) and isinstance(content.get("id"), str) else None
