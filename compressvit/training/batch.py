"""Moving a batch from the loader to the device: its labels are inspected on the CPU, and mixup is applied on the device."""

from __future__ import annotations

from typing import Any

import torch

from compressvit.tasks.base import Labels, Mixing, Task
from compressvit.tasks.targets import moved


def to_device(
    images: torch.Tensor, targets: Any, device: torch.device, task: Task, mixing: Mixing | None
) -> tuple[torch.Tensor, Any, Labels]:
    """Move a batch to the device and mix it there.

    Args:
        images: (B, C, H, W).
        targets: as the task collates them.
        mixing: of the task; None for none.

    Returns:
        The images, their targets ((B, classes) where classes were mixed), and what the labels are.
    """
    if mixing is not None:
        images, targets = mixing.choose(images, targets)
    labels = task.labels(targets)
    images, targets = images.to(device, non_blocking=True), moved(targets, device)
    if mixing is not None:
        images, targets = mixing.mix(images, targets, labels)
    return images, targets, labels
