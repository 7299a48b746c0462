"""Moving a batch to the device. Its labels are inspected on the CPU first; mixup is applied on the device."""

from __future__ import annotations

from typing import Any

import torch

from compressvit.data.samples import seeded
from compressvit.tasks.base import Labels, Mixing, Task
from compressvit.tasks.targets import moved
from compressvit.training.asking import Shown


def to_device(
    images: torch.Tensor,
    targets: Any,
    device: torch.device,
    task: Task,
    mixing: Mixing | None,
    shown: Shown | None = None,
) -> tuple[torch.Tensor, Any, Labels, Shown | None]:
    """Move a batch to the device and apply mixup or cutmix there.

    Args:
        images: (B, C, H, W).
        targets: as the task collates them.
        mixing: from the task; None: no mixing.
        shown: which images they are, where that decides how they are mixed.

    Returns:
        The images, their targets ((B, classes) after mixing), what was found out about the labels, and which images they are.
    """
    if mixing is not None:
        shown = shown and shown.chosen(mixing, targets)
        images, targets = mixing.choose(images, targets)
    labels = task.labels(targets)
    images, targets = images.to(device, non_blocking=True), moved(targets, device)
    if mixing is not None:
        with seeded(None if shown is None else shown.mixing_seed):
            images, targets = mixing.mix(images, targets, labels)
    return images, targets, labels, shown
