"""What a run provides to a phase: its position, the images, the teacher, and the diagnostics."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compressvit import processes
from compressvit.data.input import InputConfig, Side
from compressvit.log import RunLog
from compressvit.tasks.base import Task, task_of
from compressvit.tasks.targets import moved
from compressvit.training.cache.cache import Kept
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
    """The position of a phase in a run, and the objects that the run provides for it.

    Attributes:
        phase: its name, number, seed and checkpoint.
        input: size and normalisation of the trained model's images.
        teacher: None in the phase that trains the teacher itself.
        device: the training device; the phase moves the model there.
        batch_size: images per training batch.
        loader: returns the training batches (images, targets) of one pass, with a length, normalised according to `input`.
        evaluate: scores of a model on the held-out images, compared with the teacher's if labels do not measure its quality.
        likeness: CKA of a model's blocks with those of the teacher, for layer pairs.
        task: what the model's outputs mean; None: classes if it has a classifier, else features.
        start: the result of `evaluate` for the initial model, if it is already known.
        watching: (model, phase name) → context manager of the diagnostics that observe every step.
        measure: called with (phase name, model, epochs done, whether this was the last) for diagnostics at given epochs.
        widths: called with (phase name, scope, widths after every training) by a phase that removes neurons.
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
        """Whether the phase starts now; a resumed phase has already reported its start."""
        return not self.phase.begun

    def train(
        self,
        model: nn.Module,
        spec: Training,
        terms: Sequence[Term],
        *,
        taught: bool = False,
        cache: Callable[[Any], Kept] | None = None,
        phase: Phase | None = None,
        moments: Moments | None = None,
    ) -> dict[str, Any]:
        """Train a model in place; returns the result of `compressvit.training.loop.train`.

        Args:
            spec: the options of the training.
            terms: the loss terms.
            taught: whether the teacher runs too, for terms that read it.
            cache: makes what has the teacher's answers to the images of a loader, or the model's features.
            phase: a cycle of the phase, if not the whole phase is trained.
            moments: initial optimiser state by parameter name, for cycles.
        """
        phase = phase or self.phase
        loader = self.loader()
        assert self.teacher is not None or not taught, "only the teacher itself is trained without one"
        model.to(self.device)
        kept = None if cache is None else cache(loader)
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
                evaluate=self.evaluate if kept is None else kept.evaluating(self.evaluate),
                task=self.task,
                teacher=self.teacher if taught else None,
                cache=kept,
                watches=watches,
                measure=lambda judged, epoch, last: self.measure(phase.name, judged, epoch, last),
            )

    def task_of(self, model: nn.Module) -> Task:
        """What the outputs of a model mean, also if `task` is None."""
        return self.task or task_of(model)

    def labelled_batches(self, model: nn.Module, count: int) -> list[tuple[torch.Tensor, Any]]:
        """The first batches (images, targets) of a pass over the training set, on the device; the model is moved there, too. They are the
        same in every process, which all draw from one state."""
        model.to(self.device)

        def first() -> list[tuple[torch.Tensor, Any]]:
            return [(x.to(self.device), moved(y, self.device)) for x, y in itertools.islice(self.loader(), count)]

        return processes.alone(first)
