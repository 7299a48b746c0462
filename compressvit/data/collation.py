"""From the items of a batch to a batch: images by timm's collation, their targets by the task's."""

from __future__ import annotations

from typing import Any

import torch
from timm.data.loader import fast_collate

from compressvit.tasks.base import Task
from compressvit.tasks.targets import NO_IMAGE, moved


class Targets:
    """Targets that are no tensor, which timm's loader moves to the device as if they were one."""

    def __init__(self, value: Any):
        self.value = value

    def to(self, device: torch.device, non_blocking: bool) -> Targets:
        return Targets(moved(self.value, device))


def collate(items: list[tuple[Any, Any]], task: Task) -> Any:
    """A batch (images, targets) of the items that are images; None when there are none."""
    items = [item for item in items if not (isinstance(item[1], int) and item[1] == NO_IMAGE)]
    if not items:
        return None
    targets = task.collate([target for _, target in items])
    return fast_collate([(image, 0) for image, _ in items])[0], targets
