"""Memory of distillation losses, determined on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from compressvit.data.input import InputConfig
from compressvit.model import surgery
from compressvit.model.bounded import TooMany, counted
from compressvit.model.cost import saved_bytes, taking
from compressvit.model.outputs import tensors_of
from compressvit.model.shapes import RememberedShapes
from compressvit.model.taps import Taps
from compressvit.tasks.base import Task, task_of
from compressvit.training.terms import Batch, Term
from compressvit.training.terms.base import SIDES


def loss_bytes(
    student: nn.Module,
    teacher: nn.Module,
    terms: list[Term],
    batch: int,
    size: InputConfig,
    teacher_size: InputConfig,
    task: Task | None = None,
) -> dict[str, int]:
    """Bytes that each term keeps for the backward pass in float32, in addition to the models' activations; and those of the teacher's taps.

    Measured on the meta device, by running the terms and adding up what autograd saves.

    Raises:
        UserError: a model does not take images of its size.
    """
    models, device = [surgery.skeleton(student).train(), surgery.skeleton(teacher).eval()], torch.device("meta")
    taps = [Taps(m, [t for term in terms for t in side(term)]) for m, side in zip(models, SIDES, strict=True)]
    images = [torch.empty(batch, c.channels, c.height, c.width, device=device) for c in (size, teacher_size)]
    with RememberedShapes():
        with taking(student, (size.channels, size.height, size.width)):
            student_logits = models[0](images[0])
        with torch.no_grad(), taking(teacher, (teacher_size.channels, teacher_size.height, teacher_size.width)):
            teacher_logits = models[1](images[1])
    seen = [tap.pop() for tap in taps]
    alive = [[t for taps in side.values() for value in taps.values() for t in _tensors(value)] for side in seen]
    targets = (task or task_of(student)).placeholder(batch)
    example = Batch(student_logits, teacher_logits, seen[0], seen[1], targets)
    known = [*tensors_of(student_logits), *tensors_of(teacher_logits), *alive[0], *alive[1]]
    sizes = {}
    for term in terms:
        # A loss that looks at values has no size on the meta device, and one of ten thousands of small products takes minutes there.
        with suppress(NotImplementedError, TooMany), counted(15_000), RememberedShapes():
            sizes[term.name] = saved_bytes(partial(term.function, example), known)
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in alive[1]}
    return {**sizes, "teacher taps": sum(storages.values())}


def _tensors(seen: Any) -> list[torch.Tensor]:
    """The tensors of what a tap recorded: of a module's input or output, which may be anything."""
    if not isinstance(seen, (torch.Tensor, Sequence, Mapping)):
        return []
    return [value for value in tensors_of(seen) if isinstance(value, torch.Tensor)]
