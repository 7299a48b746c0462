"""Batches of a caller's own data loader, which are checked one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from compressvit.errors import UserError
from compressvit.tasks.base import Task
from compressvit.tasks.classes import described
from compressvit.tasks.targets import NO_LABEL
from compressvit.training.phases.distill import Distill


def refuse_cache(spec: Distill) -> None:
    """Raise a `UserError` where a caller asks for a cache of the teacher's answers."""
    if spec.cache is not None:
        raise UserError(
            "cache keeps answers by the place of an image in its set, and a loader of your own says no places; leave cache out, or use "
            "compressvit.apply with a recipe"
        )


class LoadedBatches:
    """The caller's batches as pairs (images, targets), with target −1 for every image if there are none.

    Args:
        loader: yields batches and has a length.
        name: name of the loader in messages.
        student: the model whose input and classes the batches must fit.
        task: determines which targets are valid.
        learned: whether the student learns from the targets, so that its head must support them.

    Attributes:
        batch_size: of the first batch.
        shape: (C, H, W) of its images.
        labelled: whether the batches have targets.
    """

    def __init__(self, loader: Iterable[Any], name: str, student: nn.Module, task: Task, learned: bool = False):
        self.loader, self.name, self.task = loader, name, task
        self._outputs = getattr(student, "num_classes", 0) if learned else 0
        try:
            self._length = len(loader)  # type: ignore[arg-type]
        except TypeError:
            raise UserError(
                f"{name} has no length, and the schedule needs the number of batches of an epoch; give a DataLoader of a map-style data "
                "set, or a list of batches"
            ) from None
        first = next(iter(loader), None)
        if not self._length or first is None:
            raise UserError(f"{name} has no batches; with drop_last=True it needs at least one whole batch")
        self.shape: tuple[int, ...] | None = None
        self.first, _ = self._pair(first)
        self.labelled = isinstance(first, (tuple, list)) and len(first) == 2
        self.batch_size, self.shape = len(self.first), tuple(self.first.shape[1:])

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[torch.Tensor, Any]]:
        return map(self._pair, self.loader)

    def _pair(self, batch: Any) -> tuple[torch.Tensor, Any]:
        several = isinstance(batch, (tuple, list)) and len(batch) in (1, 2)  # 1: as from TensorDataset(images)
        images, targets = (*batch, None)[:2] if several else (batch, None)
        if not isinstance(images, torch.Tensor) or images.ndim != 4 or not images.is_floating_point():
            raise UserError(
                f"{self.name} gives {described(batch)}; a batch is images (B, C, H, W) in floating point, normalised for the student, "
                "alone or as a pair (images, targets)"
            )
        if self.shape not in (None, tuple(images.shape[1:])):
            raise UserError(
                f"{self.name} gives images of shape {tuple(images.shape[1:])} after some of {self.shape}; give them one size"
            )
        images = images.float()
        if targets is None:
            return images, torch.full((len(images),), NO_LABEL)
        self.task.check_batch(targets, len(images), self._outputs, self.name)
        return images, targets
