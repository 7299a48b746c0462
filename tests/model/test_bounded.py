"""Models that are built without values."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from compressvit.model.bounded import TooMany, on_meta
from compressvit.testing.models import examples


@pytest.mark.parametrize("name", examples())
def test_a_model_without_values_is_the_model_without_its_values(name):
    example = examples()[name]
    with torch.device("meta"):
        plain = timm.create_model(example.model, **example.args)
    with on_meta():
        model = timm.create_model(example.model, **example.args)
    for mine, other in ((model.parameters(), plain.parameters()), (model.buffers(), plain.buffers())):
        described = [
            [(t.shape, t.stride(), t.dtype, t.device, t.requires_grad, type(t)) for t in ts] for ts in (mine, other)
        ]
        assert described[0] == described[1]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_what_has_values_is_filled_all_the_same():
    with on_meta():
        weight = torch.zeros(3, device="cpu")
        weight.add_(2).mul_(3)
        nn.init.constant_(bias := torch.zeros(2, device="cpu"), 4.0)
    assert weight.tolist() == [6, 6, 6]
    assert bias.tolist() == [4, 4]


def test_calls_that_are_skipped_are_counted():
    def fill():
        for _ in range(30):
            torch.Tensor.zero_(torch.empty(1))

    with pytest.raises(TooMany), on_meta(40):
        fill()
    with on_meta(60):
        fill()
