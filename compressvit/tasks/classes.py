"""Targets that are classes: int64 (B,), or probabilities (B, classes) after mixup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compressvit.errors import UserError
from compressvit.tasks.base import Labels, Mixing, Task
from compressvit.tasks.targets import NO_LABEL

if TYPE_CHECKING:
    from torch import Tensor


class ClassTargets(Task):
    """A task whose images have a class each, or none."""

    mixes = True

    def reads(self, truth: Task) -> bool:
        return isinstance(truth, ClassTargets)

    def collate(self, targets: Sequence[Any]) -> Tensor:
        from torch.utils.data import default_collate

        batch: Tensor = default_collate(list(targets))
        return batch.long() if batch.ndim == 1 else batch

    def labels(self, targets: Tensor) -> Labels:
        return Labels(int((targets >= 0).sum()), int(targets.max()))

    def placeholder(self, images: int) -> Tensor:
        import torch

        return torch.empty(images, dtype=torch.int64, device="meta")

    def mixing(self, mixup: float, cutmix: float, smoothing: float, outputs: int) -> Mixing:
        return ClassMixing(mixup, cutmix, smoothing, outputs)

    def check_set(self, targets: Any, classes: int | None, name: str) -> None:
        import torch

        targets = torch.as_tensor(targets)
        if targets.ndim != 1:
            raise UserError(
                f"data.name={name}: each image must have one class, not a target of shape {targets.shape[1:]}"
            )
        highest = int(targets.max()) if targets.numel() else NO_LABEL
        if classes is not None and highest >= classes:
            raise UserError(
                f"data.name={name}: label {highest} is out of range for {classes} classes (0 to {classes - 1}); "
                f"set data.num_classes to {highest + 1} or more, or correct the labels"
            )

    def check_batch(self, targets: Any, images: int, outputs: int, name: str) -> None:
        import torch

        if not isinstance(targets, torch.Tensor) or targets.shape != (images,) or targets.is_floating_point():
            raise UserError(
                f"{name} gives targets of {described(targets)} with {images} images; targets are class indices, one per image "
                "(−1 for none)"
            )
        if outputs and int(targets.max()) >= outputs:
            raise UserError(
                f"{name} has label {int(targets.max())}, but the student has only {outputs} classes "
                f"(0 to {outputs - 1}); give it a head of the data's classes, or set losses={{'labels': {{'weight': 0}}}}"
            )


class ClassMixing(Mixing):
    """timm's mixup and cutmix.

    They pair images, so an odd one is left out, and a batch of one stays as it is. Images without a label are left out of a batch that
    has labels, because they have none to mix; a batch without any label keeps its targets.

    Args:
        mixup, cutmix: their α; 0 for none.
        smoothing: of the labels.
        outputs: how many classes the model tells apart; 0 for a backbone without a classifier, whose images alone are mixed.
    """

    def __init__(self, mixup: float, cutmix: float, smoothing: float, outputs: int):
        from timm.data import Mixup

        # timm wants at least one class
        self._mixup = Mixup(
            mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=smoothing, num_classes=max(1, outputs)
        )

    def choose(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        labelled = targets >= 0
        if 0 < int(labelled.sum()) < len(targets):
            images, targets = images[labelled], targets[labelled]
        even = len(images) // 2 * 2 or 1
        return images[:even], targets[:even]

    def mix(self, images: Tensor, targets: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        if len(images) < 2:
            return images, targets
        # timm mixes in place, and the loader may give a batch twice
        images, mixed = self._mixup(images.clone(), targets.clamp(min=0))
        return images, mixed if labels.count else targets


def described(value: Any) -> str:
    """What a value is, in a few words for a message."""
    import torch

    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, (tuple, list)):
        return f"{len(value)} values ({', '.join(described(v) for v in value[:3])})"
    return f"a {type(value).__name__}"
