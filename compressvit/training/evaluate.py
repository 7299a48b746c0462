"""Evaluation of a model against labels, and of a student against its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from compressvit.data.input import Side
from compressvit.errors import UserError
from compressvit.tasks.base import Metrics, Task, task_of
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
    index: Batches | None = None,
) -> dict[str, float | int | None]:
    """Run a model over an evaluation set, in eval mode and full precision.

    Args:
        student: images (B, C, H, W) → logits, or pooled features (B, width) of a headless backbone.
        batches: (images, targets), normalised for the student, as yielded by `compressvit.data.loaders.eval_loader`.
        device: the device to which images are moved.
        teacher: also compare with this model, on the same images converted to the teacher's input.
        labelled: in a labelled set, a target that is not valid for the task (a class below 0) marks a broken image, which is not
            counted; in an unlabelled set, −1 marks an image and −2 the stand-in for a broken one.
        task: what the outputs mean; None: classes if the model has a classifier, else features.
        index: labelled training images, as `batches`, for a task that `searches`; empty where there are none. None: all figures of a
            search are left out, which take time quadratic in the images.
        watch: called with every batch: images, targets, outputs (of the task's `run`) and, if they are comparable, the teacher's outputs.

    Returns:
        `images` (their number) and the metrics of the task. For classes and features: `top1` and `top5` in percent and `loss`
        (cross-entropy in nats), None without labels or classes. With a teacher also `teacher_top1`, `teacher_top5`, `teacher_loss`,
        `agreement` (percent of images with the same top-1 class) and `cosine` (mean cosine similarity of the outputs), the last two None
        if the outputs differ in width; for two headless backbones `cosine_patches` (mean cosine similarity of their patch tokens after
        the final norm) and, with an index, even an empty one, what `compressvit.tasks.retrieval` measures; with images in it `knn`,
        `teacher_knn` (`compressvit.tasks.neighbours`) and `indexed`, their number.

    Raises:
        UserError: a label is not below the model's number of classes.
    """
    model, other = student.model, None if teacher is None else teacher.model
    convert = None if teacher is None else teacher.converter(student.input)
    was_training, seen = model.training, 0
    model.eval()
    task = task or task_of(model)
    metrics = task.metrics(model, other, labelled)
    outputs_of = partial(_outputs, task, student, teacher, convert)
    if index is not None:
        _fill_index(metrics, task, index, outputs_of, device)
    for batch_images, batch_targets in batches:
        counted = task.known(batch_targets) if labelled else at_least(batch_targets, NO_LABEL)
        seen += int(counted.sum())
        if not counted.any():
            continue
        images, targets = batch_images[counted].to(device), moved(take(batch_targets, counted), device)
        outputs, expected = outputs_of(images)
        metrics.add(outputs, targets, expected)
        if watch is not None:
            comparable = expected is not None and task.comparable(outputs, expected)
            watch(images, targets, outputs, expected if comparable else None)
    model.train(was_training)
    if seen:
        return {"images": seen, **metrics.result()}
    raise UserError("the evaluation set has no readable image")


def _outputs(task: Task, student: Side, teacher: Side | None, convert: Any, images: torch.Tensor) -> tuple[Any, Any]:
    """What both models make of images of the student's, which `convert` makes the teacher's."""
    return task.run(student.model, images), None if teacher is None else task.run(teacher.model, convert(images))


def _fill_index(
    metrics: Metrics,
    task: Task,
    index: Batches,
    outputs_of: Callable[[torch.Tensor], tuple[Any, Any]],
    device: torch.device,
) -> None:
    """Have metrics search, in the labelled images of an index and what both models make of them."""
    metrics.search()
    for images, targets in index:
        known = task.known(targets)
        if known.any():
            outputs, expected = outputs_of(images[known].to(device))
            metrics.index(outputs, moved(take(targets, known), device), expected)
