"""How alike outputs are, of every kind of task."""

from __future__ import annotations

import math

import pytest
import torch

from compressvit.runs.export import TOLERANCES
from compressvit.tasks.likeness import of_classes, of_detections, of_tensors


def test_classes():
    expected = torch.tensor([[4.0, 1.0], [0.0, 2.0], [3.0, 0.0]])
    found = expected.clone()
    assert of_classes([expected], [found], 0.0)[:4] == (0.0, 1.0, "the same class for 3 of 3", True)
    found[1] = torch.tensor([2.0, 0.0])
    told = of_classes([expected], [found], 0.4)
    assert told[:4] == (0.5, pytest.approx(2 / 3), "the same class for 2 of 3", False)


def test_features():
    expected = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    told = of_tensors([expected], [torch.tensor([[1.0, 0.0], [1.0, 2.0]])], 0.5)
    assert (told.difference, told.alike) == (0.5, False)
    assert told.agreement == pytest.approx(2 / math.sqrt(5))
    assert of_tensors([expected], [torch.tensor([[1.0, 0.0], [0.2, 2.0]])], 0.5).alike


@pytest.mark.parametrize("tolerance", TOLERANCES.values())
def test_what_is_wrong_in_all_numbers_but_a_large_one_is_not_alike(tolerance):
    torch.manual_seed(0)
    expected = torch.randn(4, 64) * 0.05
    expected[:, 0] = 1.0
    rounded = expected * (1 + tolerance / 10 * (2 * torch.rand(4, 64) - 1))
    wrong = expected.clone()
    wrong[:, 1:] = (expected[:, 1:].flip(1) - expected[:, 1:]).clamp(-0.09, 0.09) + expected[:, 1:]
    for likeness in (of_tensors, of_classes):
        assert likeness([expected], [rounded], tolerance).alike
        assert likeness([torch.zeros(2, 3)], [torch.zeros(2, 3)], tolerance).alike
    if tolerance == TOLERANCES["bf16"]:
        told = of_tensors([expected], [wrong], tolerance)
        assert told.difference <= tolerance
        assert not told.alike


def test_another_class_is_rounding_only_where_two_are_nearly_as_likely():
    expected = torch.tensor([[10.0, 0.0, 0.0], [0.0, 1.0, 0.8], [10.0, 0.0, 0.0]])
    found = expected.clone()
    found[1] = torch.tensor([0.0, 0.85, 0.9])
    assert of_classes([expected], [found], 0.1).alike
    expected[1, 1] = found[1, 1] = 1.4  # ahead by 0.6 of 10
    found[1, 2] = 1.5
    told = of_classes([expected], [found], 0.1)
    assert told.difference < 0.1
    assert (told.agreement, told.alike) == (pytest.approx(2 / 3), False)


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
    assert told == (0.0, 1.0, "100.0 % of 2 detections in both", True, "95 % in both")


@pytest.mark.parametrize("other", [(0.15, 0.9, 1), (0.1, 0.85, 1), (0.1, 0.9, 0), (0.1, math.nan, 1)])
def test_a_detection_elsewhere_is_another(other):
    rows = [(0.1, 0.9, 1), (0.2, 0.8, 2)]
    told = of_detections(detections(*rows), detections(other, rows[1]), 0.01)
    assert not told.alike
    assert told.agreement <= 2 / 3
    assert of_detections(detections(*rows), detections((0.105, 0.9, 1), rows[1]), 0.01).difference == pytest.approx(
        0.005
    )


def test_the_surest_detections_count():
    rows = [(i / 200, 0.95 - i / 200 if i < 4 else 0.05 + i / 1e6, 1) for i in range(100)]
    for count in range(1, 5):
        moved = [(5 + place, score, label) for place, score, label in rows[:count]] + rows[count:]
        told = of_detections(detections(*rows, room=100), detections(*moved, room=100), 1e-4)
        assert not told.alike
        assert told.text.endswith("the surest in one alone has score 0.95")
    last = [*rows[:-3], *((0.9, score, label) for _, score, label in rows[-3:])]  # around the 100th score
    assert of_detections(detections(*rows, room=100), detections(*last, room=100), 1e-4).alike


def test_a_detection_stands_for_one_alone():
    rows = [(0.1, 0.9, 1)] * 4
    told = of_detections(detections(*rows), detections(rows[0], *[(0.8, 0.9, 1)] * 3), 0.01)
    assert (told.agreement, told.alike) == (0.25, False)


def test_nothing_found_is_alike_and_something_is_not():
    assert of_detections(detections(), detections(), 0.1).alike
    assert not of_detections(detections(), detections((0.1, 0.9, 1)), 0.1).alike


def test_masks_count():
    rows = [(0.1, 0.9, 1)]
    masks = torch.rand(1, 5, 4, 4)
    assert of_detections([*detections(*rows), masks], [*detections(*rows), masks + 0.005], 0.01).alike
    assert not of_detections([*detections(*rows), masks], [*detections(*rows), masks + 0.1], 0.01).alike
