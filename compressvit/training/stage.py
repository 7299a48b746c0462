"""What a run gives to one of its phases: its position, the images, the teacher, and the diagnostics."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compressvit.data.input import InputConfig, Side
from compressvit.log import RunLog
from compressvit.tasks.base import Task, task_of
from compressvit.tasks.targets import moved
from compressvit.training.loop import Phase, train
from compressvit.training.pairs import Likeness
from compressvit.training.spec import Training
from compressvit.training.state import Moments
from compressvit.training.terms import Term
from compressvit.training.watch import Watch


def _nobody(model: nn.Module, phase: str) -> AbstractContextManager[Sequence[Watch]]:
    return nullcontext(())


def _nothing(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Stage:
    """One phase's position in a run, and the objects that the run provides for it.

    Attributes:
        phase: its name, number, seed and checkpoint.
        input: what the images of the trained model look like.
        teacher: None in the phase that trains the teacher itself.
        device: where it trains; the phase moves the model there.
        batch_size: images of a training batch.
        loader: makes the training batches (images, targets) of one pass, with a length, normalised as `input` says.
        evaluate: scores of a model on the held-out images; beside the teacher where labels do not say how good it is.
        likeness: CKA of a model's blocks with those of the teacher, for layer pairs.
        task: what the model's outputs mean; None: classes where it has a classifier, else features.
        start: what `evaluate` says of the model as it is given, where that is known.
        watching: (model, phase name) → the diagnostics that look on at every step, closed at the end.
        measure: (phase name, model, epochs done, whether they are the last): diagnostics at stated epochs.
        widths: (phase name, scope, widths after every training): where a phase that removes neurons left them.
    """

    phase: Phase
    input: InputConfig
    teacher: Side | None
    device: torch.device
    log: RunLog
    batch_size: int
    loader: Callable[[], Any]
    evaluate: Callable[[nn.Module], dict[str, Any]]
    likeness: Callable[[nn.Module], Likeness]
    task: Task | None = None
    start: dict[str, Any] | None = None
    watching: Callable[[nn.Module, str], AbstractContextManager[Sequence[Watch]]] = _nobody
    measure: Callable[[str, nn.Module, int, bool], None] = _nothing
    widths: Callable[[str, str, list[dict[str, int]]], None] = _nothing

    @property
    def fresh(self) -> bool:
        """Whether the phase begins; a resumed one has reported its beginning before."""
        return not self.phase.checkpoint.is_file()

    def train(
        self,
        model: nn.Module,
        spec: Training,
        terms: Sequence[Term],
        *,
        taught: bool = False,
        phase: Phase | None = None,
        moments: Moments | None = None,
    ) -> dict[str, Any]:
        """Train a model in place; returns what `compressvit.training.loop.train` does.

        Args:
            spec: the options of the training.
            terms: the loss terms.
            taught: whether the teacher runs beside the model, for terms that read it.
            phase: where it is not the whole phase that is trained, but one of its cycles.
            moments: the optimiser's state by parameter name to begin with, for cycles.
        """
        phase = phase or self.phase
        loader = self.loader()
        assert self.teacher is not None or not taught, "only the teacher itself is trained without one"
        model.to(self.device)
        with self.watching(model, phase.name) as watches:
            return train(
                Side(model, self.input),
                spec,
                phase,
                terms,
                loader,
                start=self.start,
                moments=moments,
                batch_size=self.batch_size,
                device=self.device,
                log=self.log,
                evaluate=self.evaluate,
                task=self.task,
                teacher=self.teacher if taught else None,
                watches=watches,
                measure=lambda judged, epoch, last: self.measure(phase.name, judged, epoch, last),
            )

    def task_of(self, model: nn.Module) -> Task:
        """What the outputs of a model mean, where `task` says nothing too."""
        return self.task or task_of(model)

    def labelled_batches(self, model: nn.Module, count: int) -> list[tuple[torch.Tensor, Any]]:
        """The first batches (images, targets) of a pass over the training set, on the device, where the model goes too."""
        loader = self.loader()
        model.to(self.device)
        return [(x.to(self.device), moved(y, self.device)) for x, y in itertools.islice(loader, count)]
