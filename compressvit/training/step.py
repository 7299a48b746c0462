"""The forward pass of a training step: student and teacher on a batch, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from compressvit import processes
from compressvit.data.input import Side
from compressvit.model.taps import Taps
from compressvit.tasks.base import Labels, Task
from compressvit.training.asking import Answers, Features, Shown
from compressvit.training.optimisation import Buffers
from compressvit.training.recompute import Recomputed
from compressvit.training.sharding.divided import enter_by, is_divided, unwarned
from compressvit.training.spec import Training
from compressvit.training.terms import Batch, Term, total_of, unread_by

Values = dict[str, torch.Tensor]


class Pass(nn.Module):
    """Student and teacher on a batch, and the loss, as one module: what torch's `DistributedDataParallel` wraps has to have everything that
    the loss depends on as its outputs, and the terms look into the student.

    Args:
        student: its taps are attached here, and then it is compiled, because the graph must contain their hooks.
        answers: of the teacher; None where no term reads them.
        autocast: the precision of student, teacher and loss.
        spec: says whether the student is compiled, and whether its blocks compute their activations again.
        features: of the student, where they are kept.
    """

    def __init__(
        self,
        student: Side,
        answers: Answers | None,
        terms: Sequence[Term],
        task: Task,
        autocast: torch.autocast,
        spec: Training,
        features: Features | None = None,
    ):
        super().__init__()
        self.model = student.model
        self._terms, self._task, self._autocast = terms, task, autocast
        self._taps = Taps(self.model, [tap for term in terms for tap in term.student_taps])
        self._recomputed = Recomputed(self.model) if spec.activation_checkpointing else None
        self._run: Callable[[torch.Tensor], Any] = _hidden(torch.compile(self.model) if spec.compile else self.model)
        self._answers, self._features = answers, features

    def forward(
        self, images: torch.Tensor, targets: Any, labels: Labels, shown: Shown | None = None
    ) -> tuple[torch.Tensor, Values, Values]:
        """The loss of images (B, C, H, W), its weighted terms by name, and what the task logs of a batch, the last two without gradient."""
        with self._autocast:
            # the teacher first, while no activation of the student is kept
            expected, theirs = (None, {}) if self._answers is None else self._answers(images, shown)
            with nullcontext() if self._features is None else self._features.given(shown):
                outputs = self._run(images)
            ours = self._taps.pop()
            if is_divided(self.model):
                enter_by(self.model, ours)
            batch = Batch(outputs, expected, ours, theirs, targets, unread_by(self._terms))
            loss, parts = total_of(self._terms, batch)
        figures = self._task.batch_figures(outputs, expected, targets, labels)
        return loss, _without_gradient(parts), _without_gradient(figures)

    def close(self) -> None:
        """Take the taps off, and let the student be as it was."""
        if self._recomputed is not None:
            self._recomputed.close()
        self._taps.close()
        for kept in (self._answers, self._features):
            if kept is not None:
                kept.close()


class Step:
    """A `Pass` and the backward pass after it, whose gradients are the means over the processes of the run.

    With several, every process has the parameters and buffers of the leader before its first pass. The gradients of a model in shards are
    averaged after every pass, so that no process has whole ones of all its batches.
    """

    def __init__(self, whole: Pass):
        self._pass = whole
        self._divided: DistributedDataParallel | None = None

    def __call__(
        self,
        images: torch.Tensor,
        targets: Any,
        labels: Labels,
        backward: Callable[[torch.Tensor], Any],
        *,
        last: bool,
        shown: Shown | None = None,
    ) -> tuple[torch.Tensor, Values, Values]:
        """What `Pass.forward` returns, after `backward(loss)`.

        Args:
            last: an optimiser step follows, for which the gradients of all processes are needed.
        """
        whole: nn.Module = self._pass
        apart: AbstractContextManager[Any] = nullcontext()
        if is_divided(self._pass.model):
            apart = unwarned()
        elif processes.count() > 1:
            whole = self._divided = self._divided or self._divide(images, targets, labels, shown)
            apart = nullcontext() if last else self._divided.no_sync()
        with apart:
            loss, parts, figures = whole(images, targets, labels, shown)
            backward(loss)
        return loss.detach(), parts, figures

    def _divide(
        self, images: torch.Tensor, targets: Any, labels: Labels, shown: Shown | None
    ) -> DistributedDataParallel:
        """The pass for several processes. A loss need not depend on all that is trained: a student without a loss of prediction does
        not use its head. torch looks for such parameters in every step, unless it is told that there are none."""
        devices = [images.device] if images.device.type == "cuda" else []
        buffers = Buffers(self._pass.model)  # of batch norms; in eval mode some models have no losses
        buffers.remember()
        with torch.random.fork_rng(devices):
            loss, *_ = self._pass(images, targets, labels, shown)
        buffers.put_back_unless(torch.zeros((), dtype=torch.bool, device=images.device))
        used = _leaves(loss)
        unused = any(p.requires_grad and id(p) not in used for p in self._pass.parameters())
        return DistributedDataParallel(self._pass, find_unused_parameters=bool(processes.any_of(int(unused))))

    def close(self) -> None:
        """Take the taps off."""
        self._pass.close()


def _hidden(model: Any) -> Callable[[torch.Tensor], Any]:
    """Calls a module without being one, so that its parameters are not counted twice."""
    return lambda images: model(images)


def _without_gradient(values: Values) -> Values:
    return {name: value.detach() for name, value in values.items()}


def _leaves(loss: torch.Tensor) -> set[int]:
    """The ids of the parameters that a loss depends on."""
    found, seen, waiting = set[int](), set[Any](), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            found.add(id(variable))
        waiting += [child for child, _ in node.next_functions]
    return found
