"""k-NN accuracy as DINO's, and what is searched in what."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.images import GRAY, side
from helpers.training import CPU, tiny_vit
from torch import nn

from compressvit.data.input import Side
from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.runs.evaluate import Scorer
from compressvit.tasks.neighbours import NEIGHBOURS, Neighbours
from compressvit.training.evaluate import evaluate

OF_SEARCH = ("recall_1", "recall_10", "recall_self", "knn")


def test_it_is_a_vote_of_the_nearest():
    generator = torch.Generator().manual_seed(0)
    known, asked = (torch.randn(n, 6, generator=generator) for n in (60, 30))
    classes, right = (torch.randint(3, (n,), generator=generator) for n in (60, 30))
    neighbours = Neighbours()
    for part in torch.arange(60).split(25):
        neighbours.index(known[part], classes[part])
    for part in torch.arange(30).split(11):
        neighbours.ask(asked[part], right[part])
    hits = 0
    for x, label in zip(asked, right.tolist(), strict=True):
        cosines = torch.cosine_similarity(x[None], known).tolist()
        votes = [0.0, 0.0, 0.0]
        for cosine, c in sorted(zip(cosines, classes.tolist(), strict=True))[-NEIGHBOURS:]:
            votes[c] += math.exp(cosine / 0.07)
        hits += votes.index(max(votes)) == label
    assert 0 < hits < 30
    assert neighbours.accuracy() == pytest.approx(100 * hits / 30)
    assert neighbours.indexed == 60


class Directions(nn.Module):
    """A backbone whose embedding of an image filled with i is direction i, or the opposite of it."""

    num_classes = 0

    def __init__(self, sign: float = 1.0):
        super().__init__()
        self.sign = sign

    def forward(self, images):
        angle = images[:, 0, 0, 0] / 10 * self.sign
        return torch.stack([angle.cos(), angle.sin()], dim=1)


class Elsewhere(Directions):
    """A backbone to which image 17 is like image 0."""

    def forward(self, images):
        return super().forward(images.masked_fill(images == 17, 0))


def filled(numbers, targets):
    images = torch.tensor(numbers)[:, None, None, None].expand(-1, 1, 8, 8)
    return [(images, torch.tensor(targets))]


def test_student_and_teacher_search_in_their_own_index():
    """The student's space is the teacher's mirrored, so every class stays where it is; images without a label are not searched in."""
    index = filled([0.0, 1.0, 2.0, 14.0, 15.0, 16.0, 4.0], [0, 0, 0, 1, 1, 1, -1])
    held_out = filled([3.0, 13.0, 17.0, 1.5], [0, 1, 1, 1])
    result = evaluate(side(Directions(-1)), held_out, CPU, teacher=Side(Directions(), GRAY), index=index)
    assert (result["knn"], result["teacher_knn"], result["indexed"]) == (75, 75, 6)
    assert (result["knn_lost"], result["knn_gained"]) == (0, 0)
    other = evaluate(side(Elsewhere()), held_out, CPU, teacher=Side(Directions(), GRAY), index=index)
    assert (other["knn"], other["knn_lost"], other["knn_gained"]) == (50, 1, 0)
    alone = evaluate(side(Directions()), held_out, CPU, index=index)
    assert alone["knn"] == 75
    assert "knn" not in evaluate(side(Directions()), held_out, CPU)


def test_what_is_searched_for_is_left_out_of_evaluations_in_training():
    """They take a time quadratic in the images, which every epoch and every student that is tried would take."""
    data = Data(name="digits", batch_size=8, num_workers=0, limit_train=24, limit_val=16)
    scorer = Scorer(open_data(data), data, CPU)
    ours, theirs = (side(tiny_vit(seed=seed, num_classes=0).eval()) for seed in (0, 1))
    assert scorer.in_training(ours, theirs).keys().isdisjoint(OF_SEARCH)
    assert scorer.score(ours, theirs).keys().isdisjoint(OF_SEARCH)
    found = scorer.score(ours, theirs, search=True)
    assert all(found[key] is not None for key in OF_SEARCH)
    unlabelled = Scorer(replace(scorer.datasets, labelled=False), data, CPU).score(ours, theirs, search=True)
    assert [unlabelled.get(key) is not None for key in OF_SEARCH] == [True, True, True, False]
