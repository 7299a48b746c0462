"""Evaluation of a model against labels, and of a student against its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch

from compressvit import processes
from compressvit.data.input import Side
from compressvit.errors import UserError
from compressvit.tasks.base import Metrics, Task, task_of
from compressvit.tasks.targets import NO_LABEL, at_least, moved, take
from compressvit.training.sharding import divided as sharding

Batches = Iterable[tuple[torch.Tensor, Any]]
Watch = Callable[[torch.Tensor, Any, Any, Any], None]
T = TypeVar("T")
_Answered = tuple[
    int, torch.Tensor, Any, tuple[Any, Any]
]  # how many images, they, their targets, outputs of both models


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
    divided: bool = False,
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
        divided: the batches, also those of the index, are the part of this process, dealt out in turn. What models make of them is
            handed to the leader, which counts it in the order of a single process; its result is that of all.
        watch: called in the leader with every batch: images, targets, outputs (of the task's `run`) and, if they are comparable, the
            teacher's outputs.

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
    with sharding.evaluating(student.model, None if teacher is None else teacher.model):
        return _evaluate(student, batches, device, teacher, labelled, task, watch, index, divided)


def _evaluate(
    student: Side,
    batches: Batches,
    device: torch.device,
    teacher: Side | None,
    labelled: bool,
    task: Task | None,
    watch: Watch | None,
    index: Batches | None,
    divided: bool,
) -> dict[str, float | int | None]:
    if not divided and processes.count() > 1:
        whole = partial(evaluate, teacher=teacher, labelled=labelled, task=task, watch=watch, index=index)
        return processes.alone(lambda: whole(student, batches, device))
    model, other = student.model, None if teacher is None else teacher.model
    convert = None if teacher is None else teacher.converter(student.input)
    was_training = model.training
    model.eval()
    task = task or task_of(model)
    metrics = task.metrics(model, other, labelled)
    outputs_of = partial(_outputs, task, student, teacher, convert)
    ask = partial(sharding.in_step, outputs_of, model, other)
    if index is not None:
        metrics.search()
        for _, _, targets, found in _handed(_answered(index, task, ask, device, labelled=True), device):
            metrics.index(found[0], targets, found[1])
    parts = _answered(batches, task, ask, device, labelled=labelled, shown=watch is not None)
    seen = _counted(metrics, _handed(parts, device), task, watch)
    model.train(was_training)
    return processes.led(lambda: _result(seen, metrics))


def _counted(metrics: Metrics, parts: Iterable[_Answered], task: Task, watch: Watch | None) -> int:
    """Add what models made of images to the metrics, and show it; returns the number of images."""
    seen = 0
    for count, images, targets, (outputs, expected) in parts:
        seen += count
        metrics.add(outputs, targets, expected)
        if watch is not None:
            comparable = expected is not None and task.comparable(outputs, expected)
            watch(images, targets, outputs, expected if comparable else None)
    return seen


def _result(seen: int, metrics: Metrics) -> dict[str, float | int | None]:
    if seen:
        return {"images": seen, **metrics.result()}
    raise UserError("the evaluation set has no readable image")


def _outputs(task: Task, student: Side, teacher: Side | None, convert: Any, images: torch.Tensor) -> tuple[Any, Any]:
    """What both models make of images of the student's, which `convert` makes the teacher's."""
    return task.run(student.model, images), None if teacher is None else task.run(teacher.model, convert(images))


def _answered(
    batches: Batches,
    task: Task,
    ask: Callable[[Iterator[tuple[torch.Tensor, Any]]], Iterator[Any]],
    device: torch.device,
    *,
    labelled: bool,
    shown: bool = False,
) -> Iterator[_Answered | None]:
    """Of every batch the images that count: how many, themselves if they are `shown`, their targets, and what both models make of them.
    None where others have a batch and this process has none, which it has to know of (`sharding.in_step`)."""

    def known() -> Iterator[tuple[torch.Tensor, Any]]:
        for images, targets in batches:
            counted = task.known(targets) if labelled else at_least(targets, NO_LABEL)
            if counted.any():
                yield images[counted].to(device), moved(take(targets, counted), device)

    for found in ask(known()):
        if found is None:
            yield None
            continue
        images, targets, outputs = found
        yield len(images), images if shown else images[:0], targets, outputs


def _handed(parts: Iterator[T | None], device: torch.device) -> Iterator[T]:
    """What every process makes of its part, in the leader, by way of the hosts' memory."""
    if processes.count() == 1:
        yield from (part for part in parts if part is not None)
        return
    host = torch.device("cpu")
    for part in processes.in_turn(None if part is None else moved(part, host) for part in parts):
        if part is not None:
            yield moved(part, device)
