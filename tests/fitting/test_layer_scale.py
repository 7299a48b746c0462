"""The fit in order where LayerScale (nearly) removes a dimension: that one cannot be corrected, and counts for almost nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.models import build, images_for, randomise

from compressvit.fitting.in_order import LayerFit, fit_in_order
from compressvit.fitting.regression import Regression

LEAST = 1e-3  # of the mean |γ|
LAYER = "blocks.1.mlp.fc2"


@pytest.fixture(scope="module")
def asked() -> tuple[torch.Tensor, Regression, Regression]:
    """γ of one LayerScale, and what the layer before it is asked for in a student like its teacher, and in another one."""
    teacher = build("dinov2_registers")
    gamma = teacher.blocks[1].ls2.gamma
    with torch.no_grad():
        gamma.copy_(torch.where(torch.arange(len(gamma)) % 2 == 0, 0.1, -0.1))
        # on either side of the threshold, of both signs, and gone
        mean = gamma.abs().mean()
        gamma[:5] = mean * torch.tensor([0.5 * LEAST, -0.5 * LEAST, 2.5 * LEAST, -2.5 * LEAST, 0.0])
    images = images_for(teacher, 8)
    found = []
    for move in (False, True):
        student = copy.deepcopy(teacher)
        if move:
            randomise(student.blocks[0], 0.02)
        fit_in_order(student, teacher, [images], {LAYER: LayerFit(lambda module, regression: found.append(regression))})
    return gamma.detach().double(), *found


def test_the_scale_behind_a_layer_is_at_least_a_thousandth_of_its_mean(asked):
    gamma, regression, _ = asked
    size = gamma.abs()
    expected = torch.where(size > LEAST * size.mean(), size, LEAST * size.mean())
    torch.testing.assert_close(regression.scale, expected)
    assert regression.scale[0] > size[0], "raised"
    assert regression.scale[2] == size[2], "as it is"


def test_only_what_layer_scale_leaves_is_corrected(asked):
    """The streams of a moved student and its teacher differ; the difference is asked for, divided by γ, above the threshold only."""
    _, plain, moved = asked
    changed = (moved.whole.y - plain.whole.y).abs() / plain.whole.weight
    assert changed.isfinite().all()
    assert changed[[0, 1, 4]].max() == 0
    assert changed[2:4].min() > 0.1  # a small difference over a small γ
    assert changed[5:].min() > 0
