"""Evaluation: what is counted as right, the comparison with a teacher, and what cannot be counted."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.images import side
from helpers.models import build, images_for
from helpers.training import CPU
from torch import nn

from compressvit.data.input import InputConfig, Side
from compressvit.errors import UserError
from compressvit.runs.requirement import Requirement
from compressvit.training.evaluate import evaluate


class Table(nn.Module):
    """A model that looks its logits up: image i is filled with the number i."""

    def __init__(self, logits):
        super().__init__()
        self.num_classes = logits.shape[1]
        self.logits = nn.Parameter(logits)

    def forward(self, images):
        return self.logits[images[:, 0, 0, 0].long()]


def numbered(count, targets, size=2):
    images = torch.arange(float(count))[:, None, None, None].expand(count, 1, 2, 2)
    return [(images[i : i + size], torch.tensor(targets[i : i + size])) for i in range(0, count, size)]


def test_evaluation_counts_what_is_right():
    logits = torch.eye(7)[[0, 1, 2, 3, 4]] - 0.01 * torch.arange(7)
    model = Table(logits).train()
    targets = [0, 1, 3, 6, -1]  # right, right, among five, wrong, a broken image
    result = evaluate(side(model), numbered(5, targets), CPU)
    assert result["images"] == 4
    assert result["top1"] == 50
    assert result["top5"] == 75
    assert result["loss"] == pytest.approx(F.cross_entropy(logits[:4], torch.tensor(targets[:4])).item(), rel=1e-5)
    assert "agreement" not in result
    assert model.training


def test_evaluation_compares_with_the_teacher():
    ours, theirs = torch.tensor([[1.0, 0], [0, 1], [3, 1]]), torch.tensor([[2.0, 0], [1, 0], [1, 3]])
    data = numbered(3, [-1, -1, -2])  # -2: the stand-in of a broken image
    result = evaluate(side(Table(ours)), data, CPU, teacher=side(Table(theirs)), labelled=False)
    assert result["images"] == 2
    assert result["top1"] is result["top5"] is result["loss"] is None
    assert result["agreement"] == 50
    assert result["cosine"] == pytest.approx(0.5)
    seen = InputConfig(1, 2, 2, (0.0,), (1.0,), "bicubic", 1.0)
    dark = replace(seen, std=(1e6,))  # every image is almost 0
    doubled = evaluate(Side(Table(ours), seen), data, CPU, teacher=Side(Table(ours), dark), labelled=False)
    assert doubled["agreement"] == 50  # the teacher saw image 0 twice


def test_outputs_of_different_widths_are_not_compared():
    result = evaluate(
        side(Table(torch.eye(3))), numbered(3, [0, 1, 0]), CPU, teacher=side(Table(torch.eye(3, 4)[[0, 1, 0]]))
    )
    assert result["top1"] == pytest.approx(200 / 3)
    assert result["teacher_top1"] == 100
    assert result["teacher_loss"] < result["loss"]
    assert result["agreement"] is result["cosine"] is None


def test_evaluation_refuses_what_it_cannot_count():
    with pytest.raises(UserError, match=r"label 5.*3 classes"):
        evaluate(side(Table(torch.eye(3))), numbered(3, [0, 5, 2]), CPU)
    with pytest.raises(UserError, match="no readable image"):
        evaluate(side(Table(torch.eye(3))), numbered(3, [-1, -1, -1]), CPU)


def test_headless_backbones_are_compared_token_by_token():
    teacher, student = build("headless"), build("headless", seed=1)
    images = images_for(teacher, 5)
    data = [(images[:3], torch.tensor([-1] * 3)), (images[3:], torch.tensor([-1, -2]))]
    result = evaluate(side(student), data, CPU, teacher=side(teacher), labelled=False)
    with torch.no_grad():
        ours, theirs = (m.forward_features(images[:4]) for m in (student, teacher))
    cosines = F.cosine_similarity(ours, theirs, dim=-1)
    assert result["cosine"] == pytest.approx(cosines[:, 0].mean().item(), abs=1e-5)
    assert result["cosine_patches"] == pytest.approx(cosines[:, 1:].mean().item(), abs=1e-5)
    assert result["agreement"] is None
    assert evaluate(side(teacher), data, CPU, teacher=side(teacher), labelled=False)["cosine_patches"] == pytest.approx(
        1, abs=1e-5
    )
    with_head = evaluate(side(build("vit")), numbered_images(teacher), CPU, teacher=side(build("vit")))
    assert "cosine_patches" not in with_head


def numbered_images(model):
    return [(images_for(model, 3), torch.tensor([0, 1, 2]))]


# ---- what a pipeline requires


@pytest.mark.parametrize(
    ("text", "reached"),
    [
        ("top1>=85", True),
        ("top1>=0.85", True),
        ("top1>=85.1", False),
        ("top1 >= 0.851", False),
        ("loss<=0.5", True),
        ("loss<=0.4", False),
        ("top5>=1", False),
        ("bytes<=1e6", True),
    ],
)
def test_a_requirement_is_met_or_not(text, reached):
    figures = {"top1": 85.0, "loss": 0.5, "top5": math.nan, "bytes": 1_000_000}
    assert Requirement.of(text).met(figures) is reached


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("top1", "give FIGURE>=NUMBER or FIGURE<=NUMBER in quotes"),
        ("top1>=high", "give FIGURE>=NUMBER"),
        ("topp1>=1", r"there is no figure 'topp1'; did you mean 'top1'\? \(known: parameters, bytes"),
    ],
)
def test_what_is_no_requirement_is_refused(text, message):
    with pytest.raises(UserError, match=f"--require {text}: .*{message}"):
        Requirement.of(text)
    with pytest.raises(UserError, match=r"--require top1>=85: top1 was not measured here"):
        Requirement.of("top1>=85").met({"top1": None})
