"""The student on images that it was fitted to, beside held-out ones."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.images import side
from helpers.runs import done
from helpers.training import CPU
from torch import nn

from compressvit.report.record import read_run
from compressvit.report.sections import details
from compressvit.runs.files import Fitted
from compressvit.runs.generalisation import IMAGES, beside, on_fitted


class Turned(nn.Module):
    """Its output for an image filled with i is turned by i degrees."""

    num_classes = 2

    def __init__(self, by=1.0):
        super().__init__()
        self.by = by

    def forward(self, images):
        angle = images[:, 0, 0, 0].deg2rad() * self.by
        return torch.stack([angle.cos(), angle.sin()], dim=1)


def test_it_is_that_of_the_first_images():
    degrees = torch.cat([torch.full((IMAGES,), 60.0), torch.full((40,), 0.0)])
    images = degrees[:, None, None, None].expand(-1, 1, 8, 8)
    found = on_fitted(side(Turned()), side(Turned(0)), lambda: images.split(16), CPU)
    assert (found.images, found.cosine) == (IMAGES, pytest.approx(0.5))
    few = on_fitted(side(Turned()), side(Turned(0)), lambda: images[-10:].split(16), CPU)
    assert (few.images, few.cosine) == (10, pytest.approx(1))


@pytest.mark.parametrize(
    ("own", "others", "more"),
    [(0.964, 0.933, True), (0.94, 0.93, False), (0.9999, 0.9960, False), (0.99, 0.984, True), (0.9, 0.95, False)],
)
def test_when_more_images_would_help(own, others, more):
    found = beside(Fitted(images=64, cosine=own), others)
    assert (found.held_out, found.more_would_help) == (others, more)
    assert ("more images would help" in found.text) is more
    assert beside(None, others) is beside(Fitted(images=64, cosine=own), None) is None
    assert beside(found, 0.1) is found


def test_a_run_and_a_plan_say_it(trained, tmp_path):
    """Also where a training follows: both figures are those before it."""
    recipe, run = trained
    results = json.loads((run / "results.json").read_text())
    fitted, start = results["fitted"], results["phases"]["1_distill"]["start"]
    assert fitted["held_out"] == pytest.approx(start["cosine"])
    assert 0 < fitted["images"] <= IMAGES
    text = Fitted.model_validate(fitted).text
    assert text in (run / "run.log").read_text()
    assert any(text[1:] in sentence for sentence in details(read_run(run)))
    words = [recipe, f"teacher.weights={run / 'teacher'}", "calibration.images=32", "--measure", "--json"]
    measured = json.loads(done("plan", *words))["measured"]
    assert measured["fitted"]["cosine"] == pytest.approx(fitted["cosine"], abs=1e-3)
    assert measured["fitted"]["images"] == 32
    of_weights = json.loads(done("plan", *words[:3], "steps.0.low_rank.metric=weights", *words[3:]))["measured"]
    assert of_weights["fitted"] is None
