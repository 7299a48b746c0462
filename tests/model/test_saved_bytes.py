"""Counting what autograd keeps of a computation keeps nothing itself."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from compressvit.model.cost import saved_bytes


class Doubled(torch.autograd.Function):
    """Keeps a tensor by its context, as the losses that compare relations do."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(2 * x)
        return x.sum()

    @staticmethod
    def backward(ctx, outer):
        return outer * ctx.saved_tensors[0]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch, whose modules are looked at
@pytest.mark.parametrize("last", [lambda x: x, Doubled.apply], ids=["module", "function"])
def test_nothing_is_left_of_what_was_counted(last):
    """A softmax keeps its own output."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1))

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(found, torch.Tensor) for found in gc.get_objects())

    found = {saved_bytes(lambda: last(model(torch.zeros(2, 4)))) for _ in range(2)}
    before = tensors()
    for _ in range(5):
        found.add(saved_bytes(lambda: last(model(torch.zeros(2, 4)))))
    assert tensors() == before  # with either cycle left in, 10 or 20 more
    assert len(found) == 1
