"""What an evaluation counts, against plain sums over all images at once, whatever the batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.images import side
from helpers.training import CPU
from torch import Tensor, nn

from compressvit.data.input import InputConfig, Side
from compressvit.training.evaluate import evaluate

IMAGES, CLASSES = 40, 9


class Table(nn.Module):
    """A model that looks its outputs up: image i is filled with the number i."""

    def __init__(self, outputs: Tensor, num_classes: int = CLASSES):
        super().__init__()
        self.num_classes = num_classes
        self.outputs = outputs

    def forward(self, images: Tensor) -> Tensor:
        return self.outputs[images[:, 0, 0, 0].long()]


def batches(targets: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    images = torch.arange(float(IMAGES))[:, None, None, None].expand(IMAGES, 1, 2, 2)
    return list(zip(images.split(size), targets.split(size), strict=True))


@pytest.fixture(scope="module")
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(IMAGES, CLASSES, generator=generator)
    return ours, ours + torch.randn(IMAGES, CLASSES, generator=generator)


def place(logits: Tensor, targets: Tensor) -> Tensor:
    """How many classes are above the right one."""
    return (logits > logits.gather(1, targets[:, None])).sum(dim=1)


@pytest.mark.parametrize("size", [1, 7, 40])
def test_accuracies_and_losses_are_means_over_the_images(logits, size):
    ours, theirs = logits
    targets = torch.arange(IMAGES) % CLASSES
    broken = torch.arange(IMAGES) % 10 == 3
    result = evaluate(side(Table(ours)), batches(targets.where(~broken, -1), size), CPU, teacher=side(Table(theirs)))
    ours, theirs, targets = ours[~broken], theirs[~broken], targets[~broken]
    assert result["images"] == len(targets) == 36
    for prefix, outputs in (("", ours), ("teacher_", theirs)):
        places = place(outputs, targets)
        assert {0, 4, 5} <= set(places.tolist()), (
            "of one at the fifth place and one at the sixth, only the first counts"
        )
        assert result[f"{prefix}top1"] == pytest.approx(100 * (places == 0).double().mean().item())
        assert result[f"{prefix}top5"] == pytest.approx(100 * (places < 5).double().mean().item())
        expected = -outputs.log_softmax(1)[torch.arange(len(targets)), targets].mean()
        assert result[f"{prefix}loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert result["agreement"] == pytest.approx(100 * (ours.argmax(1) == theirs.argmax(1)).double().mean().item())
    cosines = (F.normalize(ours, dim=1) * F.normalize(theirs, dim=1)).sum(1)
    assert result["cosine"] == pytest.approx(cosines.mean().item(), rel=1e-5)


@pytest.mark.parametrize("size", [1, 7, 40])
def test_a_watcher_sees_every_image_once(logits, size):
    ours, theirs = logits
    targets = torch.arange(IMAGES) % CLASSES
    seen: list[tuple[Tensor, ...]] = []
    evaluate(
        side(Table(ours)),
        batches(targets, size),
        CPU,
        teacher=side(Table(theirs)),
        watch=lambda *batch: seen.append(batch),
    )
    images, labels, outputs, expected = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert images[:, 0, 0, 0].tolist() == list(range(IMAGES))
    assert torch.equal(labels, targets)
    assert torch.equal(outputs, ours)
    assert torch.equal(expected, theirs)


def test_the_teacher_sees_images_of_its_own():
    """The student's image i is the teacher's 2 i."""
    table = torch.eye(8)
    images = torch.arange(4.0)[:, None, None, None].expand(4, 1, 2, 2)
    data = [(images, torch.tensor([0, 2, 4, 6]))]
    seen = InputConfig(1, 2, 2, (0.0,), (1.0,), "bicubic", 1.0)
    teacher = Side(Table(table, 8), replace(seen, std=(0.5,)))
    result = evaluate(Side(Table(table, 8), seen), data, CPU, teacher=teacher)
    assert (result["top1"], result["teacher_top1"]) == (25, 100)


def test_without_labels_or_classes_nothing_is_right_or_wrong(logits):
    ours, theirs = logits
    unlabelled = evaluate(
        side(Table(ours)), batches(torch.full((IMAGES,), -1), 8), CPU, teacher=side(Table(theirs)), labelled=False
    )
    headless = evaluate(
        side(Table(ours, 0)), batches(torch.zeros(IMAGES, dtype=torch.long), 8), CPU, teacher=side(Table(theirs, 0))
    )
    for result in (unlabelled, headless):
        assert result["images"] == IMAGES
        assert all(result[f"{p}{name}"] is None for p in ("", "teacher_") for name in ("top1", "top5", "loss"))
    assert unlabelled["agreement"] is not None
    assert headless["agreement"] is None
    assert headless["cosine"] == pytest.approx(unlabelled["cosine"])
