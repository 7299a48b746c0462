"""The task `segmentation`: outputs are logits (B, classes, H, W) of the pixels of images, and targets their classes.

Figures are mean IoU and the accuracy of pixels, in percent, over the pixels of the pictures as they are on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from compressvit.errors import UserError
from compressvit.model.segmenters import SEGMENTERS
from compressvit.tasks.base import Answers, Labels, Metrics, Result, task
from compressvit.tasks.overlap import ENDS, FIGURES, IGNORED, Overlap, on_picture
from compressvit.tasks.own_models import OwnModels
from compressvit.tasks.painting import MEASURES, Paintings
from compressvit.tasks.quality import Curve, Quality

if TYPE_CHECKING:
    from torch import Tensor, nn

MIOU = Quality(
    "miou",
    "mIoU",
    "mean intersection over union",
    "mIoU",
    "%",
    2,
    phrase="{} mIoU",
    curve=Curve(
        "mean_iou",
        "Mean IoU",
        "Intersection over union of the classes of pixels, mean over classes, on held-out images.",
    ),
)
PIXELS = Quality("pixel_accuracy", "pixels", "accuracy of pixels", "accuracy of pixels", "%", 2, detail=True)
AGREEMENT = Quality(
    "pixel_agreement", "same pixels", "pixels of the teacher's class", "agreement of pixels with the teacher", "%", 2
)


@task("segmentation")
class Segmentation(OwnModels):
    """Classes of pixels."""

    qualities = (MIOU, PIXELS, AGREEMENT)
    ranking = ("miou", "pixel_accuracy", "pixel_agreement")
    graded = (*FIGURES, *(f"{key}_{end}" for key in FIGURES for end in ENDS))
    least_classes = 2
    imitates = True
    models = SEGMENTERS
    pipeline = "image-segmentation"
    progress_names: ClassVar[Mapping[str, str]] = {"pixel_accuracy": "pixels", "pixel_agreement": "agreement"}
    measures = MEASURES

    def labels(self, targets: Any) -> Labels:
        return Labels(int(self.known(targets).sum()), -1)

    def check_set(self, targets: Any, classes: int | None, name: str) -> None:
        for mask in targets:
            if classes is None or not mask.ndim:
                continue
            strange = (mask != IGNORED) & ((mask >= classes) | (mask < 0))
            if strange.any():
                raise UserError(
                    f"data.name={name}: a mask has the value {int(mask[strange][0])}, which is no class: there are {classes}, 0 to "
                    f"{classes - 1}, and {IGNORED} is ignored"
                )

    def check_batch(self, targets: Any, images: int, outputs: int, name: str) -> None:
        import torch

        if isinstance(targets, torch.Tensor) and targets.ndim == 1 and (targets < 0).all():
            return
        masks = isinstance(targets, (list, torch.Tensor)) and all(
            isinstance(mask, torch.Tensor) and mask.ndim == 2 and not mask.is_floating_point() for mask in targets
        )
        if masks and len(targets) == images:
            self.check_set(targets, outputs or None, name)
            return
        given = (
            f"{len(targets)} masks for {images} images" if masks else f"a {type(targets).__name__} that holds no masks"
        )
        raise UserError(
            f"{name} gives {given} as targets of a segmenter, which takes a mask (H, W) of whole numbers for each image, classes from 0 "
            f"and {IGNORED} for what is ignored; or give images alone"
        )

    def loss(self, outputs: Tensor, targets: Any, smoothing: float = 0.0) -> Tensor:
        """Cross-entropy, mean over all pixels of the batch but those that are ignored."""
        import torch
        import torch.nn.functional as F

        masks = targets if isinstance(targets, torch.Tensor) else torch.stack(list(targets))
        if masks.shape[1:] != outputs.shape[2:]:
            raise UserError(
                f"masks are {masks.shape[1]}×{masks.shape[2]} and the outputs {outputs.shape[2]}×{outputs.shape[3]}: to train, masks are "
                "of the size of the images"
            )
        total = F.cross_entropy(
            outputs.float(), masks.long(), ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum"
        )
        return total / (masks != IGNORED).sum().clamp(min=1)  # 0 where every pixel is ignored

    def imitation(self, outputs: Tensor, expected: Tensor, temperature: float) -> dict[str, Tensor]:
        """The Kullback-Leibler divergence of the classes of each pixel from the teacher's, mean over pixels; the teacher's logits are
        resized where its images have another size."""
        import torch.nn.functional as F

        theirs = _at(expected.detach().float(), outputs)
        ours, wanted = ((logits / temperature).log_softmax(1) for logits in (outputs.float(), theirs))
        apart = F.kl_div(ours, wanted, log_target=True, reduction="none").sum(1)
        return {"pixels": apart.mean()}

    def metrics(self, model: nn.Module, teacher: nn.Module | None, labelled: bool) -> Metrics:
        return _Metrics(model, teacher, labelled)

    def comparable(self, outputs: Any, expected: Any) -> bool:
        return outputs.shape[1] == expected.shape[1]

    def uncompared(self, model: nn.Module, teacher: nn.Module) -> str | None:
        ours, theirs = model.num_classes, teacher.num_classes
        if ours == theirs:
            return None
        return f"the student has {ours} classes of pixels and the teacher {theirs}, so there is no {AGREEMENT.in_text}"

    def answers(self, model: nn.Module, names: Sequence[str] | None, labelled: bool) -> Answers:
        known = names or ()
        return Paintings([*known, *map(str, range(len(known), cast(int, model.num_classes)))], labelled)

    def graph(self, model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
        return model, ("logits",)


def _at(logits: Tensor, like: Tensor) -> Tensor:
    """Logits (B, C, h, w) at the height and width of others."""
    import torch.nn.functional as F

    size = like.shape[-2:]
    return logits if logits.shape[-2:] == size else F.interpolate(logits, size, mode="bilinear", align_corners=False)


class _Metrics(Metrics):
    """Overlap of a model and of its teacher with the truth, and how many pixels both have of one class."""

    def __init__(self, model: nn.Module, teacher: nn.Module | None, labelled: bool):
        self.labelled = labelled
        self.ours = Overlap(cast(int, model.num_classes))
        self.theirs = None if teacher is None else Overlap(cast(int, teacher.num_classes))
        self.comparable = teacher is not None and teacher.num_classes == model.num_classes
        self.same = self.pixels = 0

    def add(self, outputs: Tensor, targets: Any, expected: Tensor | None) -> None:
        for i, logits in enumerate(outputs):
            truth = targets[i] if self.labelled else None
            height, width = logits.shape[-2:] if truth is None else truth.shape
            found = on_picture(logits, (height, width))
            if truth is not None:
                self.ours.add(found, truth)
            if expected is None or self.theirs is None:
                continue
            other = on_picture(expected[i], (height, width))
            if truth is not None:
                self.theirs.add(other, truth)
            self.same += int((found == other).sum())
            self.pixels += found.numel()

    def result(self) -> Result:
        found = self.ours.result(self.theirs) if self.labelled else {}
        if self.theirs is not None:
            found[AGREEMENT.key] = 100 * self.same / self.pixels if self.comparable and self.pixels else None
        return found
