"""What a model gets right, and how close a student is to its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from compressvit.errors import UserError

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
Watch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], None]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Batches,
    device: torch.device,
    *,
    teacher: nn.Module | None = None,
    teacher_input: Callable[[torch.Tensor], torch.Tensor] = lambda images: images,
    labelled: bool = True,
    watch: Watch | None = None,
) -> dict[str, float | int | None]:
    """Run a model over an evaluation set, in eval mode and full precision.

    Args:
        model: images (B, C, H, W) → logits, or pooled features (B, width) of a headless backbone.
        batches: (images, targets), as `compressvit.data.loaders.eval_loader` yields them.
        device: where the images go.
        teacher: compare with it too.
        teacher_input: turns the student's images into the teacher's.
        labelled: in a labelled set a target below 0 stands for a broken image, which is not counted; in an unlabelled one −1 is
            an image and −2 the stand-in of a broken one.
        watch: is shown every batch: images, targets, the outputs and, where the two can be compared, the teacher's.

    Returns:
        `images`, and in percent `top1` and `top5`, and `loss` (cross-entropy, nats); None without labels or classes. With a teacher
        also its `teacher_top1`, `teacher_top5` and `teacher_loss`, `agreement` (percent of images with the same first class) and
        `cosine` (mean cosine of the two outputs), both None when the outputs differ in width; of two headless backbones of tokens also
        `cosine_patches` (mean cosine of their patch tokens after the final norm).

    Raises:
        UserError: a label is not below the model's number of classes.
    """
    was_training = model.training
    model.eval()
    seen = 0
    scores = _Scores(model, labelled)
    closeness = None if teacher is None else _Closeness(model, teacher, labelled)
    for batch_images, batch_targets in batches:
        counted = batch_targets >= (0 if labelled else -1)
        images, targets = batch_images[counted].to(device), batch_targets[counted].to(device)
        if not len(images):
            continue
        seen += len(images)
        outputs, hidden = _run(model, images, closeness is not None and closeness.tokens)
        scores.add(outputs, targets)
        expected = None
        if closeness is not None:
            expected = closeness.add(outputs, hidden, teacher_input(images), targets)
        if watch is not None:
            watch(images, targets, outputs, expected)
    model.train(was_training)
    if seen == 0:
        raise UserError("the evaluation set has no readable image")
    result: dict[str, float | int | None] = {"images": seen, **scores.means(seen)}
    return result if closeness is None else result | closeness.means(seen)


def _is_headless(model: nn.Module) -> bool:
    return not getattr(model, "num_classes", 0) and hasattr(model, "forward_head")


def _run(model: nn.Module, images: torch.Tensor, tokens: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Outputs (B, …) and, where they are asked for and there are any, patch tokens (B, N, C), both in float32 at least."""
    if not tokens:
        return model(images).float(), None
    hidden = model.forward_features(images)  # type: ignore[operator]
    outputs = model.forward_head(hidden).float()  # type: ignore[operator]
    return outputs, hidden[:, getattr(model, "num_prefix_tokens", 0) :].float() if hidden.ndim == 3 else None


class _Scores:
    """Top-1, top-5 and cross-entropy of one model; all None for a model without classes or a set without labels."""

    def __init__(self, model: nn.Module, labelled: bool):
        self.classes: int = (getattr(model, "num_classes", 0) or 0) if labelled else 0
        self.sums = {"top1": 0.0, "top5": 0.0, "loss": 0.0}

    def add(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        if not self.classes:
            return
        if int(targets.max()) >= self.classes:
            raise UserError(
                f"the data has label {int(targets.max())}, but the model has only {self.classes} classes "
                f"(0 to {self.classes - 1}); use data of its classes, or a teacher with a head for them (teacher.num_classes and "
                "teacher.finetune in a recipe)"
            )
        ranked = logits.topk(min(5, self.classes), dim=1).indices == targets[:, None]
        self.sums["top1"] += 100 * ranked[:, 0].sum().item()
        self.sums["top5"] += 100 * ranked.any(dim=1).sum().item()
        self.sums["loss"] += F.cross_entropy(logits, targets, reduction="sum").item()

    def means(self, count: int) -> dict[str, float | None]:
        return {name: total / count if self.classes else None for name, total in self.sums.items()}


class _Closeness:
    """How close a student's outputs are to its teacher's, and the teacher's own scores.

    Attributes:
        tokens: both are headless backbones of tokens of one shape, so their patch tokens are compared too.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, labelled: bool):
        self.tokens = _is_headless(student) and _is_headless(teacher)
        self._teacher = teacher
        self._has_classes = bool(getattr(student, "num_classes", 0))
        self._scores = _Scores(teacher, labelled)
        self._comparable = True
        self._agreement = self._cosine = self._patches = 0.0

    def add(
        self, outputs: torch.Tensor, hidden: torch.Tensor | None, images: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor | None:
        """Compare a batch; `images` as the teacher knows them. Returns its outputs, None where they differ in width."""
        expected, theirs = _run(self._teacher, images, self.tokens)
        self._scores.add(expected, targets)
        self.tokens = self.tokens and hidden is not None and theirs is not None and hidden.shape == theirs.shape
        if hidden is not None and theirs is not None and self.tokens:
            self._patches += F.cosine_similarity(hidden, theirs, dim=-1).mean(dim=1).sum().item()
        self._comparable = expected.shape == outputs.shape
        if not self._comparable:
            return None
        self._agreement += (expected.argmax(1) == outputs.argmax(1)).sum().item()
        self._cosine += F.cosine_similarity(outputs, expected, dim=1).sum().item()
        return expected

    def means(self, count: int) -> dict[str, float | None]:
        agreement = 100 * self._agreement / count if self._comparable and self._has_classes else None
        cosine = self._cosine / count if self._comparable else None
        found = {f"teacher_{name}": value for name, value in self._scores.means(count).items()}
        found |= {"agreement": agreement, "cosine": cosine}
        return {**found, "cosine_patches": self._patches / count} if self.tokens else found
