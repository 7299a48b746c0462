"""The diagnostics of a run: when they run, and where their findings are written. They leave training unchanged, bit for bit.

In the run folder: `diagnostics/NAME.json`, `.csv`, `.png`, `.svg` for every finding, `diagnostics/measured.jsonl` (what was measured when,
and how long it took), and files that `Watched` diagnostics write during training.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressvit import processes
from compressvit.charts.findings import Finding, merged, read
from compressvit.data.input import InputConfig, Side
from compressvit.data.loaders import eval_loader
from compressvit.data.opening import Datasets
from compressvit.data.samples import Samples
from compressvit.data.spec import Data
from compressvit.diagnostics.allocation import History, allocation_finding
from compressvit.diagnostics.base import FOLDER, Context, Measured, Watched
from compressvit.log import RunLog, warn_and_continue
from compressvit.model.modes import evaluating
from compressvit.recipe.recipe import Recipe
from compressvit.rows import append_row, read_rows
from compressvit.runs.files import MEASURED, MeasuredRow
from compressvit.tasks.targets import NO_LABEL, at_least, take
from compressvit.training.optimisation import random_state, restore_random_state
from compressvit.training.sharding import divided as sharding
from compressvit.training.watch import Watch


class Recorder:
    """Runs the diagnostics of a recipe.

    Args:
        recipe: specifies the diagnostics and the data.
        run: the run folder. Findings recorded before the run was resumed are kept.
        run_log: shows charts on its boards.
    """

    def __init__(self, recipe: Recipe, run: Path, datasets: Datasets, device: torch.device, run_log: RunLog):
        wanted = [entry.spec for entry in recipe.diagnostics]
        self._measured = [spec for spec in wanted if isinstance(spec, Measured)]
        self._watched = [spec for spec in wanted if isinstance(spec, Watched)]
        self._folder = run / FOLDER
        self._data, self._datasets, self._device, self._run_log = recipe.data, datasets, device, run_log
        self._allocations: dict[str, tuple[str, History]] = {}

    @contextmanager
    def watching(self, model: nn.Module, phase: str) -> Iterator[list[Watch]]:
        """Context of the watches of a phase, in the leader; their findings are written at its end, also after an error or a signal."""
        watches = [spec.watch(model, phase, self._folder) for spec in self._watched if processes.leads()]
        try:
            yield watches
        finally:
            for watch in watches:
                watch.close()
                with warn_and_continue(f"{phase}: the recordings were not drawn"):
                    for finding in watch.findings():
                        self.keep(finding)

    def measure(self, phase: str, teacher: Side | None, student: Side, epoch: int, last: bool) -> None:
        """Run the diagnostics that are due at this epoch and were not run before, in the leader, which the other processes help where a
        diagnostic asks for it. Failures are reported, and training continues."""
        if not any(spec.due(epoch, last) for spec in self._measured):
            return
        helping = partial(self._help, phase, teacher, student, epoch)
        with sharding.whole(student.model, None if teacher is None else teacher.model):
            processes.led(lambda: self._measure(phase, teacher, student, epoch, last), helping)

    def _help(self, phase: str, teacher: Side | None, student: Side, epoch: int, name: str) -> None:
        """In the others: measure the same as the leader, which alone keeps what is found and tells what failed."""
        models = [side.model for side in (student, teacher) if side is not None]
        with undisturbed(*models), suppress(Exception):
            self._of(name).measure(self._context(phase, teacher, student, epoch, name))

    def _of(self, name: str) -> Measured:
        return next(spec for spec in self._measured if spec.name == name)

    def _measure(self, phase: str, teacher: Side | None, student: Side, epoch: int, last: bool) -> None:
        due = [
            spec
            for spec in self._measured
            if spec.due(epoch, last)
            and not (spec.needs_teacher and teacher is None)
            and not self._has(spec.name, phase, epoch)
        ]
        if not due:
            return
        models = [side.model for side in (student, teacher) if side is not None]
        with undisturbed(*models):
            for model in models:
                model.to(self._device)
            for spec in due:
                began = time.monotonic()
                context = self._context(phase, teacher, student, epoch, spec.name)
                with warn_and_continue(f"{phase}, epoch {epoch}: {spec.name} was not measured"):
                    found = [stamped(finding, phase, epoch) for finding in spec.measure(context)]
                    for finding in found:
                        self.keep(_with_earlier(finding, self._folder))
                    seconds = round(time.monotonic() - began, 2)
                    names = [finding.name for finding in found]
                    row = MeasuredRow(diagnostic=spec.name, phase=phase, epoch=epoch, findings=names, seconds=seconds)
                    append_row(self._folder / MEASURED, row)
                    self._run_log.say(f"{phase}, epoch {epoch}: {spec.name} measured in {seconds:.1f} s")

    def allocation(self, phase: str, scope: str, history: History) -> None:
        """Record the numbers of neurons that a `prune` phase left; always done, because it costs nothing."""
        if not processes.leads():
            return
        self._allocations[phase] = (scope, history)
        with warn_and_continue(f"{phase}: the allocation of neurons was not drawn"):
            finding = allocation_finding(self._allocations)
            self.keep(finding)
            finding.picture(self._folder.parent / "widths.png")  # where users look first

    def keep(self, finding: Finding) -> None:
        """Write a finding to the run folder, replacing an earlier one of the same name, and show it on the boards."""
        finding.write(self._folder)
        if finding.records:
            self._run_log.show_on_boards(lambda board: board.finding(finding, self._folder))

    def _has(self, name: str, phase: str, epoch: int) -> bool:
        path = self._folder / MEASURED
        rows: list[MeasuredRow] = []
        with warn_and_continue("earlier measurements cannot be read, so they are repeated"):
            rows = read_rows(path, MeasuredRow) if path.is_file() else []
        return any((row.diagnostic, row.phase, row.epoch) == (name, phase, epoch) for row in rows)

    def _context(self, phase: str, teacher: Side | None, student: Side, epoch: int, name: str) -> Context:
        labelled = partial(evaluation_images, self._datasets, self._data, student.input, self._device)
        return Context(
            student=student,
            teacher=teacher,
            images=lambda count: (batch for batch, _ in labelled(count)),
            labelled=labelled,
            device=self._device,
            phase=phase,
            epoch=epoch,
            together=partial(processes.together, name),
        )


def evaluation_images(
    datasets: Datasets, data: Data, config: InputConfig, device: torch.device, count: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of about `count` normalised evaluation images (B, C, H, W), on the device, and labels (B,), evenly spaced over the set.

    Their order is random but fixed: data sets are often sorted by class, and an estimate from batches (CKA) cannot capture differences
    between classes if each batch has only one. A streaming data set yields its first images, in its own order. Broken files are skipped.
    The global random generators are not used. Every process of a run has all of them.
    """
    subset: Any = datasets.validation
    if isinstance(subset, Samples):
        count = min(count, len(subset))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
        subset = subset.part([i * len(subset) // count for i in order])
    left = count
    for images, targets in eval_loader(dataclasses.replace(datasets, validation=subset), data, config, device):
        whole = at_least(targets, NO_LABEL).cpu()  # smaller targets mark a broken file
        whole &= whole.cumsum(0) <= left
        kept = images[whole], take(targets, whole)
        if len(kept[0]):
            yield kept
        left -= len(kept[0])
        if left <= 0:
            return


def stamped(finding: Finding, phase: str, epoch: int) -> Finding:
    """The finding with the fields `phase`, `epoch` and `when` added to records that lack them."""
    place = {"phase": phase, "epoch": epoch, "when": f"{phase}, epoch {epoch}"}
    return dataclasses.replace(finding, records=[{**place, **record} for record in finding.records])


def _with_earlier(finding: Finding, folder: Path) -> Finding:
    path = folder / f"{finding.name}.json"
    return merged(read(path), finding) if path.is_file() else finding


@contextmanager
def undisturbed(*models: nn.Module | None) -> Iterator[None]:
    """Context in eval mode that afterwards restores the random state, the mode of every module, and gradients, even after an error."""
    known = [model for model in models if model is not None]
    state = random_state()
    gradients = [(parameter, parameter.grad) for model in known for parameter in model.parameters()]
    kept = [None if gradient is None else gradient.clone() for _, gradient in gradients]
    try:
        with evaluating(*known):
            yield
    finally:
        restore_random_state(state)
        for (parameter, _), gradient in zip(gradients, kept, strict=True):
            parameter.grad = gradient
