"""How alike outputs are, of every kind of task."""

from __future__ import annotations

import math

import pytest
import torch

from compressvit.tasks.likeness import of_classes, of_detections, of_tensors


def test_classes():
    expected = torch.tensor([[4.0, 1.0], [0.0, 2.0], [3.0, 0.0]])
    found = expected.clone()
    assert of_classes([expected], [found], 0.0) == (0.0, 1.0, "the same class for 3 of 3", True)
    found[1] = torch.tensor([2.0, 0.0])
    told = of_classes([expected], [found], 0.4)
    assert told == (0.5, pytest.approx(2 / 3), "the same class for 2 of 3", False)


def test_features():
    expected = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    told = of_tensors([expected], [torch.tensor([[1.0, 0.0], [1.0, 2.0]])], 0.5)
    assert (told.difference, told.alike) == (0.5, True)
    assert told.agreement == pytest.approx(2 / math.sqrt(5))


def test_what_is_not_finite_is_not_alike():
    expected = torch.ones(2, 3)
    for value in (math.nan, math.inf):
        found = expected.clone()
        found[1, 1] = value
        assert not of_classes([expected], [found], 0.1).alike
        assert not of_tensors([expected], [found], 0.1).alike


def detections(*rows: tuple[float, float, int], room: int = 5) -> list[torch.Tensor]:
    """Of one image: rows of place, score and label."""
    boxes, scores, labels = torch.zeros(1, room, 4), torch.zeros(1, room), torch.zeros(1, room, dtype=torch.long)
    for i, (place, score, label) in enumerate(rows):
        boxes[0, i], scores[0, i], labels[0, i] = place, score, label
    return [boxes, scores, labels]


def test_detections_in_another_order_are_the_same():
    rows = [(0.1, 0.9, 1), (0.2, 0.8, 2)]
    told = of_detections(detections(*rows), detections(*rows[::-1]), 1e-6)
    assert told == (0.0, 1.0, "100.0 % of 2 detections in both", True)


@pytest.mark.parametrize("other", [(0.15, 0.9, 1), (0.1, 0.85, 1), (0.1, 0.9, 0), (0.1, math.nan, 1)])
def test_a_detection_elsewhere_is_another(other):
    rows = [(0.1, 0.9, 1), (0.2, 0.8, 2)]
    told = of_detections(detections(*rows), detections(other, rows[1]), 0.01)
    assert not told.alike
    assert told.agreement <= 2 / 3
    assert of_detections(detections(*rows), detections((0.105, 0.9, 1), rows[1]), 0.01).difference == pytest.approx(
        0.005
    )


def test_nothing_found_is_alike_and_something_is_not():
    assert of_detections(detections(), detections(), 0.1).alike
    assert not of_detections(detections(), detections((0.1, 0.9, 1)), 0.1).alike


def test_masks_count():
    rows = [(0.1, 0.9, 1)]
    masks = torch.rand(1, 5, 4, 4)
    assert of_detections([*detections(*rows), masks], [*detections(*rows), masks + 0.005], 0.01).alike
    assert not of_detections([*detections(*rows), masks], [*detections(*rows), masks + 0.1], 0.01).alike
