"""Evaluation of a model against labels, and of a student against its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from compressvit.data.input import Side
from compressvit.errors import UserError
from compressvit.tasks.base import Task, task_of
from compressvit.tasks.targets import NO_LABEL, at_least, moved, take

Batches = Iterable[tuple[torch.Tensor, Any]]
Watch = Callable[[torch.Tensor, Any, Any, Any], None]


@torch.inference_mode()
def evaluate(
    student: Side,
    batches: Batches,
    device: torch.device,
    *,
    teacher: Side | None = None,
    labelled: bool = True,
    task: Task | None = None,
    watch: Watch | None = None,
) -> dict[str, float | int | None]:
    """Run a model over an evaluation set, in eval mode and full precision.

    Args:
        student: images (B, C, H, W) → logits, or pooled features (B, width) of a headless backbone.
        batches: (images, targets) for the student, as `compressvit.data.loaders.eval_loader` yields them.
        device: where the images go.
        teacher: compare with it too, on the student's images as the teacher expects them.
    labelled: in a labelled set a target that the task does not know (a class below 0) stands for a broken image,
        which is not counted; in an unlabelled one −1 is an image and −2 the stand-in of a broken one.
        task: what the outputs mean; None: classes of a model that has a classifier, else features.
        watch: is shown every batch: images, targets, the outputs (of the task's `run`) and, where the two can be compared, the teacher's.

    Returns:
        `images`, and the figures of the task. Of classes and features: in percent `top1` and `top5`, and `loss` (cross-entropy, nats);
        None without labels or classes. With a teacher also its `teacher_top1`, `teacher_top5` and `teacher_loss`, `agreement` (percent
        of images with the same first class) and `cosine` (mean cosine of the two outputs), both None when the outputs differ in width;
        of two headless backbones of tokens also `cosine_patches` (mean cosine of their patch tokens after the final norm).

    Raises:
        UserError: a label is not below the model's number of classes.
    """
    model, other = student.model, None if teacher is None else teacher.model
    convert = None if teacher is None else teacher.converter(student.input)
    was_training = model.training
    model.eval()
    seen = 0
    task = task or task_of(model)
    metrics = task.metrics(model, other, labelled)
    for batch_images, batch_targets in batches:
        counted = task.known(batch_targets) if labelled else at_least(batch_targets, NO_LABEL)
        images, targets = batch_images[counted].to(device), moved(take(batch_targets, counted), device)
        if not len(images):
            continue
        seen += len(images)
        outputs = task.run(model, images)
        expected = None if other is None or convert is None else task.run(other, convert(images))
        metrics.add(outputs, targets, expected)
        if watch is not None:
            comparable = expected is not None and task.comparable(outputs, expected)
            watch(images, targets, outputs, expected if comparable else None)
    model.train(was_training)
    if seen == 0:
        raise UserError("the evaluation set has no readable image")
    return {"images": seen, **metrics.result()}
