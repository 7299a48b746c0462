"""Moving a batch from the loader to the device: its labels are inspected on the CPU, and mixup is applied on the device."""

from __future__ import annotations

import torch
from timm.data import Mixup

from compressvit.tasks.base import Labels


def to_device(
    images: torch.Tensor, targets: torch.Tensor, device: torch.device, mixup: Mixup | None
) -> tuple[torch.Tensor, torch.Tensor, Labels]:
    """Move a batch to the device and mix it there.

    Mixup pairs images, so an odd one is left out, and a batch of one stays as it is. Images without a label (target −1) are left out
    of a batch that has labels, because they have none to mix; a batch without any label keeps its targets.

    Args:
        images: (B, C, H, W).
        targets: (B,) class indices, −1 for an image without a label.
        mixup: timm's mixup or cutmix; None for neither.

    Returns:
        The images, their targets ((B, classes) where they were mixed), and what the labels are.
    """
    labelled = targets >= 0
    count = int(labelled.sum())
    if mixup is not None:
        if 0 < count < len(targets):
            images, targets = images[labelled], targets[labelled]
        even = len(images) // 2 * 2 or 1
        images, targets = images[:even], targets[:even]
        count = min(count, even)
    labels = Labels(count, int(targets.max()))
    images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
    if mixup is not None and len(images) > 1:
        images, mixed = mixup(
            images.clone(), targets.clamp(min=0)
        )  # mixes in place, and the loader may give a batch twice
        targets = mixed if count else targets
    return images, targets, labels
