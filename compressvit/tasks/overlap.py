"""How much the classes of pixels overlap: intersection over union, the mean over classes, and intervals over images.

A class's intersection over union (IoU) is summed over all pictures before it is divided, as in PASCAL VOC and ADE20K: the pixels that are
of the class and were found to be, over those that are or were. Pixels that are ignored count nowhere. Figures have 95 % intervals by the
bootstrap over images: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13 (percentiles).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from compressvit.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compressvit.tasks.base import Result

IGNORED = 255  # of a pixel whose class is not known, or is none: nothing is learned from it, and it is not judged
RESAMPLES = 1000
FIGURES = ("miou", "pixel_accuracy")
ENDS = ("low", "high")
_MOST_VALUES = 2**26  # of logits that are resized at once
_MOST_DRAWN = 2**23  # numbers of images in samples at once


def on_picture(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The likeliest class of every pixel of a picture of height and width `size`, int64: logits (C, h, w) are resized to it first.

    Many classes on a large picture are resized some at a time.
    """
    import torch
    import torch.nn.functional as F

    if tuple(logits.shape[-2:]) == size:
        return logits.argmax(0)
    step = max(1, _MOST_VALUES // (size[0] * size[1]))
    best, chosen = None, torch.zeros(size, dtype=torch.long, device=logits.device)
    for first in range(0, len(logits), step):
        part = F.interpolate(logits[None, first : first + step], size, mode="bilinear", align_corners=False)[0]
        values, classes = part.max(0)
        if best is None:
            best, chosen = values, classes
            continue
        higher = values > best
        best, chosen = torch.where(higher, values, best), torch.where(higher, classes + first, chosen)
    return chosen


class Overlap:
    """What one model found in a set of pictures, by image and class.

    Args:
        classes: their number, C.
    """

    def __init__(self, classes: int):
        self.classes = classes
        self._images: list[
            Tensor
        ] = []  # of each (3, C): pixels of a class that were found, that are, and that were said to be

    def add(self, found: Tensor, truth: Tensor) -> None:
        """Add a picture: classes (H, W) of its pixels, and the true ones, of which those `IGNORED` are left out.

        Raises:
            UserError: the model has not so many classes.
        """
        import torch

        counted = truth != IGNORED
        said, true = found[counted], truth[counted].long()
        if len(true) and int(true.max()) >= self.classes:
            raise UserError(
                f"the data has class {int(true.max())}, but the model has only {self.classes} classes (0 to {self.classes - 1}); use data "
                "of its classes, or a teacher with a head for them (teacher.num_classes and teacher.finetune in a recipe)"
            )
        parts = (true[said == true], true, said)
        self._images.append(torch.stack([torch.bincount(part, minlength=self.classes) for part in parts]).cpu())

    def counts(self) -> Tensor:
        """Of each picture and class pixels that were found, that are, and that were said to be: int64 (images, 3, C)."""
        import torch

        return torch.stack(self._images)

    def by_class(self) -> list[tuple[int, float | None]]:
        """Of every class in how many pictures it is, and its IoU in percent; None where it neither is nor was found."""

        images = self.counts()
        shared, true, said = images.sum(0).double()
        union = 100 * shared / (true + said - shared)
        return list(zip((images[:, 1] > 0).sum(0).tolist(), map(_number, union), strict=True))

    def result(self, theirs: Overlap | None = None) -> Result:
        """`FIGURES` in percent, and the ends of their intervals over images (`miou_low`, …); None where no pixel was judged.

        Args:
            theirs: of the teacher for the same pictures; adds its own figures (`teacher_…`), and by how many points it is above
                (`miou_behind`) with the ends of that interval, which is drawn image by image.
        """

        if not self._images:
            return dict.fromkeys(FIGURES)
        ours = sampled(self.counts())
        found = _as_result("", ours)
        if theirs is None:
            return found
        others = sampled(theirs.counts())
        behind = {f"{key}_behind": others[key] - ours[key] for key in FIGURES}
        return {**found, **_as_result("teacher_", others), **_as_result("", behind)}


def _drawn(images: int) -> Iterator[Tensor]:
    """How often each image is in each sample, some samples at a time, float64 (·, images): of 1 + RESAMPLES, the first of which has every
    image once. The same for every model."""
    import torch

    generator = torch.Generator().manual_seed(0)
    yield torch.ones(1, images, dtype=torch.float64)
    step, left = max(1, _MOST_DRAWN // images), RESAMPLES
    while left:
        chosen = torch.randint(images, (min(step, left), images), generator=generator)
        ones = torch.ones(chosen.shape, dtype=torch.float64)
        yield torch.zeros_like(ones).scatter_add_(1, chosen, ones)
        left -= len(chosen)


def sampled(images: Tensor) -> dict[str, Tensor]:
    """Each figure in percent for every sample of pictures, the first of which has each of them once, NaN where it judges no pixel; of
    `Overlap.counts`. Samples are the same for every model, so that differences of two are drawn picture by picture."""
    import torch

    counts = images.double().flatten(1)
    sums = torch.cat([often @ counts for often in _drawn(len(images))])
    shared, true, said = sums.unflatten(1, images.shape[1:]).unbind(1)  # (samples, C)
    union = true + said - shared
    return {
        "miou": 100 * (shared / union).nanmean(1),  # 0 / 0: a class that neither is nor was found
        "pixel_accuracy": 100 * shared.sum(1) / true.sum(1),
    }


def _as_result(prefix: str, figures: dict[str, Tensor]) -> Result:
    """The figure of the first sample, and the percentiles of the others."""
    found: Result = {}
    for key, values in figures.items():
        found[f"{prefix}{key}"] = _number(values[0])
        rest = values[1:][~values[1:].isnan()].sort().values
        for end, share in zip(ENDS, (0.025, 0.975), strict=True):
            found[f"{prefix}{key}_{end}"] = _number(rest[round(share * (len(rest) - 1))]) if len(rest) else None
    return found


def _number(value: torch.Tensor) -> float | None:
    return None if value.isnan() else float(value)
