"""What a model gets right, and how close a student is to its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from compressvit.errors import UserError

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Batches,
    device: torch.device,
    *,
    teacher: nn.Module | None = None,
    teacher_input: Callable[[torch.Tensor], torch.Tensor] = lambda images: images,
    labelled: bool = True,
) -> dict[str, float | int | None]:
    """Run a model over an evaluation set, in eval mode and full precision.

    Args:
        model: images (B, C, H, W) → logits, or pooled features (B, width) of a headless backbone.
        batches: (images, targets), as `compressvit.data.eval_loader` yields them.
        device: where the images go.
        teacher: compare with it too.
        teacher_input: turns the student's images into the teacher's.
        labelled: in a labelled set a target below 0 stands for a broken image, which is not counted; in an unlabelled one −1 is
            an image and −2 the stand-in of a broken one.

    Returns:
        `images`, and in percent `top1` and `top5` (None without labels or classes), `loss` (cross-entropy, nats); with a teacher also
        `agreement` (percent of images with the same first class) and `cosine` (mean cosine of the two outputs); None when the outputs
        differ in width.

    Raises:
        UserError: a label is not below the model's number of classes.
    """
    was_training = model.training
    model.eval()
    classes = getattr(model, "num_classes", None)
    seen = 0
    comparable = True
    sums = {"top1": 0.0, "top5": 0.0, "loss": 0.0, "agreement": 0.0, "cosine": 0.0}
    for batch_images, batch_targets in batches:
        counted = batch_targets >= (0 if labelled else -1)
        images, targets = batch_images[counted].to(device), batch_targets[counted].to(device)
        if not len(images):
            continue
        outputs = model(images).float()
        seen += len(images)
        if classes and labelled:
            if int(targets.max()) >= classes:
                raise UserError(
                    f"the data has label {int(targets.max())}, but the model tells only {classes} classes apart (0 to {classes - 1}); "
                    "set teacher.num_classes to the number of classes and train the head with teacher.finetune"
                )
            ranked = outputs.topk(min(5, classes), dim=1).indices == targets[:, None]
            sums["top1"] += ranked[:, 0].sum().item()
            sums["top5"] += ranked.any(dim=1).sum().item()
            sums["loss"] += F.cross_entropy(outputs, targets, reduction="sum").item()
        if teacher is not None:
            expected = teacher(teacher_input(images)).float()
            comparable = expected.shape == outputs.shape
            if comparable:
                sums["agreement"] += (expected.argmax(1) == outputs.argmax(1)).sum().item()
                sums["cosine"] += F.cosine_similarity(outputs, expected, dim=1).sum().item()
    model.train(was_training)
    if seen == 0:
        raise UserError("the evaluation set has no readable image")
    result: dict[str, float | int | None] = {"images": seen}
    scored = classes and labelled
    result["top1"] = 100 * sums["top1"] / seen if scored else None
    result["top5"] = 100 * sums["top5"] / seen if scored else None
    result["loss"] = sums["loss"] / seen if scored else None
    if teacher is not None:
        result["agreement"] = 100 * sums["agreement"] / seen if classes and comparable else None
        result["cosine"] = sums["cosine"] / seen if comparable else None
    return result
