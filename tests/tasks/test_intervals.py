"""Intervals of shares of images, and of what a student loses of one against its teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.images import side
from helpers.training import CPU
from scipy.stats import multinomial
from torch import nn

from compressvit.tasks.qualities import differences, intervals, qualities
from compressvit.training.evaluate import evaluate


def test_intervals_are_of_shares_of_images():
    found = intervals({"images": 100, "top1": 90.0, "knn": 90.0, "recall_10": None, "cosine": 0.9})
    assert list(found) == ["top1", "knn"]
    # Wilson's interval of 90 of 100, as every calculator has it
    assert found["top1"] == found["knn"] == pytest.approx((82.56, 94.48), abs=0.01)
    low, high = qualities()["knn"].interval(100.0, 50)
    assert (low, high) == pytest.approx((92.87, 100), abs=0.01)


@pytest.mark.parametrize("shares", [(0.1, 0.04), (0.02, 0.01), (0.3, 0.3), (0.05, 0.0)])
def test_the_interval_of_a_difference_holds_it_as_often_as_it_says(shares):
    """Of every number of images that either alone has right, by its probability."""
    lost, gained = shares
    images, difference = 60, qualities()["top1"].difference
    cases = [(a, b) for a in range(images + 1) for b in range(images + 1 - a)]
    chances = multinomial.pmf([(a, b, images - a - b) for a, b in cases], images, [lost, gained, 1 - lost - gained])
    ends = np.array([difference(a, b, images) for a, b in cases])
    held = (ends[:, 0] <= 100 * (lost - gained)) & (100 * (lost - gained) <= ends[:, 2])
    assert chances[held].sum() > 0.945  # measured: 0.967, 0.999, 0.951 and 0.953
    assert (ends[:, 0] <= ends[:, 1]).all()
    assert (ends[:, 1] <= ends[:, 2]).all()


def test_a_difference_is_known_better_than_two_accuracies():
    # by hand: 8/23 − 2/23, and 1.96 √((10/23 − (6/23)²) / 23) around it
    assert qualities()["top1"].difference(7, 1, 21) == pytest.approx((1.34, 28.57, 50.84), abs=0.01)
    low, points, high = qualities()["top1"].difference(4, 2, 400)
    assert points == pytest.approx(0.5)
    assert (-high, -points, -low) == pytest.approx(qualities()["top1"].difference(2, 4, 400))
    apart = qualities()["top1"].interval(90.0, 400)
    assert high - low < 0.6 * (apart[1] - apart[0])  # measured: 0.47


class Answers(nn.Module):
    """Of three classes, the one that stands in an image, at a place."""

    num_classes = 3

    def __init__(self, place):
        super().__init__()
        self.place = place

    def forward(self, images):
        return nn.functional.one_hot(images[:, 0, 0, self.place].long(), 3).float()


def test_what_either_alone_has_right_is_counted():
    student, teacher = [0, 1, 2, 0, 0], [0, 1, 0, 1, 1]
    images = torch.zeros(5, 1, 8, 8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = torch.tensor(student), torch.tensor(teacher)
    targets = torch.tensor([0, 2, 0, 1, 0])  # both, none, the teacher, the teacher, the student
    batches = list(zip(images.split(2), targets.split(2), strict=True))
    scores = evaluate(side(Answers(0)), batches, CPU, teacher=side(Answers(1)))
    assert (scores["top1_lost"], scores["top1_gained"]) == (2, 1)
    assert scores["teacher_top1"] - scores["top1"] == pytest.approx(differences(scores)["top1"][1]) == pytest.approx(20)
    for alone in (
        evaluate(side(Answers(0)), batches, CPU),
        evaluate(side(Answers(0)), batches, CPU, teacher=side(Answers(1)), labelled=False),
    ):
        assert differences(alone) == {}
