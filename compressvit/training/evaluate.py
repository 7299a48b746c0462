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
        `cosine_patches` (mean cosine of their patch tokens behind the final norm).

    Raises:
        UserError: a label is not below the model's number of classes.
    """
    was_training = model.training
    model.eval()
    seen = 0
    scores = _Scores(getattr(model, "num_classes", 0) if labelled else 0)
    teacher_scores = _Scores(getattr(teacher, "num_classes", 0) if labelled and teacher is not None else 0)
    agreement = cosine = patches = 0.0
    tokens = teacher is not None and all(_is_headless(m) for m in (model, teacher))
    comparable = teacher is not None
    for batch_images, batch_targets in batches:
        counted = batch_targets >= (0 if labelled else -1)
        images, targets = batch_images[counted].to(device), batch_targets[counted].to(device)
        if not len(images):
            continue
        seen += len(images)
        outputs, hidden = _run(model, images, tokens)
        scores.add(outputs, targets)
        expected = None
        if teacher is not None:
            expected, theirs = _run(teacher, teacher_input(images), tokens)
            teacher_scores.add(expected, targets)
            tokens = tokens and hidden is not None and theirs is not None and hidden.shape == theirs.shape
            if hidden is not None and theirs is not None and tokens:
                patches += F.cosine_similarity(hidden, theirs, dim=-1).mean(dim=1).sum().item()
            comparable = expected.shape == outputs.shape
            if comparable:
                agreement += (expected.argmax(1) == outputs.argmax(1)).sum().item()
                cosine += F.cosine_similarity(outputs, expected, dim=1).sum().item()
        if watch is not None:
            watch(images, targets, outputs, expected if comparable else None)
    model.train(was_training)
    if seen == 0:
        raise UserError("the evaluation set has no readable image")
    result: dict[str, float | int | None] = {"images": seen, **scores.means(seen)}
    if teacher is not None:
        result |= {f"teacher_{name}": value for name, value in teacher_scores.means(seen).items()}
        result["agreement"] = 100 * agreement / seen if comparable and getattr(model, "num_classes", 0) else None
        result["cosine"] = cosine / seen if comparable else None
        if tokens:
            result["cosine_patches"] = patches / seen
    return result


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

    def __init__(self, classes: int | None):
        self.classes = classes or 0
        self.sums = {"top1": 0.0, "top5": 0.0, "loss": 0.0}

    def add(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        if not self.classes:
            return
        if int(targets.max()) >= self.classes:
            raise UserError(
                f"the data has label {int(targets.max())}, but the model tells only {self.classes} classes apart "
                f"(0 to {self.classes - 1}); use data of its classes, or a teacher with a head of theirs (teacher.num_classes and "
                "teacher.finetune in a recipe)"
            )
        ranked = logits.topk(min(5, self.classes), dim=1).indices == targets[:, None]
        self.sums["top1"] += 100 * ranked[:, 0].sum().item()
        self.sums["top5"] += 100 * ranked.any(dim=1).sum().item()
        self.sums["loss"] += F.cross_entropy(logits, targets, reduction="sum").item()

    def means(self, count: int) -> dict[str, float | None]:
        return {name: total / count if self.classes else None for name, total in self.sums.items()}
