"""Grouping layers by similarity: the clusters of average linkage, by a distance relative to the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressvit.fitting.moments import Moments
from compressvit.fitting.reference import Reference
from compressvit.transforms.lors.grouping import group_by_similarity


def layers(weights: list[Tensor]) -> nn.ModuleDict:
    model = nn.ModuleDict()
    for i, weight in enumerate(weights):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data.copy_(weight)
        model[f"layer{i}"] = layer
    return model


def groups(weights: list[Tensor], count: int) -> list[tuple[int, ...]]:
    model = layers(weights)
    found = group_by_similarity(list(model), count, Reference(model), "weights", 1e-3)
    return [tuple(int(path.removeprefix("layer")) for path in group) for group in found]


def test_two_groups_are_as_far_apart_as_their_layers_on_average():
    """Along this line single linkage would make a chain of the middle, (0) (1 2 3 4 5) (6), complete linkage (0 1 2) (3 4 5) (6)."""
    base = torch.tensor([[1000.0, 0.0]])
    line = [base + torch.tensor([[0.0, place]]) for place in (1.0, 14.0, 21.0, 29.0, 38.0, 40.0, 51.0)]
    assert groups(line, 3) == [(0,), (1, 2), (3, 4, 5, 6)]


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_a_difference_counts_in_parts_of_the_weights(scale):
    """0 and 1 are nearer to each other than 2 and 3 are, but a smaller part of what the latter are."""
    weights = [scale * torch.tensor([[x, y]]) for x, y in ((1.0, 0.0), (1.0, 1.0), (0.0, 50.0), (3.0, 50.0))]
    assert groups(weights, 3) == [(0,), (1,), (2, 3)]


def test_layers_that_differ_where_no_input_goes_are_alike():
    """In the metric of the inputs the second one of which is always (nearly) zero."""
    weights = [torch.tensor([[1.0, y]]) for y in (0.0, 5.0)] + [torch.tensor([[2.0, y]]) for y in (0.0, 5.0)]
    model = layers(weights)
    reference = Reference(model)
    inputs = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e-3])
    second = inputs.double().mT @ inputs.double() / 16
    reference._moments = {path: Moments(second, torch.zeros(2), 16) for path in model}
    by_inputs = group_by_similarity(list(model), 2, reference, "inputs", 1e-6)
    assert by_inputs == [("layer0", "layer1"), ("layer2", "layer3")]
    assert groups(weights, 2) == [(0, 2), (1, 3)]


def test_as_many_groups_as_layers():
    weights = [torch.ones(2, 2)] * 3
    assert groups(weights, 3) == groups(weights, 5) == [(0,), (1,), (2,)]
    assert groups(weights, 1) == [(0, 1, 2)]
    assert len(groups(weights, 2)) == 2, "equal layers too"
