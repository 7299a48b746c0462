"""Remembered shapes are those that torch works out, and what cannot be remembered is computed."""

from __future__ import annotations

import pytest
import torch
from helpers.models import BACKBONES, build, images_for
from torch.utils._python_dispatch import TorchDispatchMode

from compressvit.model import surgery
from compressvit.model.shapes import RememberedShapes


class Watched(TorchDispatchMode):
    """Calls that reach torch."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


def form(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype)


@pytest.mark.wide_unless(lambda name: name in ("vit", "swin", "cait"))
@pytest.mark.parametrize("name", BACKBONES)
def test_a_model_gives_the_same_forms(name):
    model = surgery.skeleton(build(name)).eval()
    images = meta(*images_for(model, 2).shape).to(memory_format=torch.channels_last)
    expected = [form(t) for t in model.forward_intermediates(images, intermediates_only=True)]
    with RememberedShapes():
        for _ in range(2):  # the second time from memory
            assert [form(t) for t in model.forward_intermediates(images, intermediates_only=True)] == expected


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + 1,
        lambda x: x + 1.0,
        lambda x: x > 0,
        lambda x: x.mT @ x,
        lambda x: torch.cat([x, x.to(torch.float64)]),
        lambda x: x.max(dim=0).indices,
        lambda x: torch.nn.functional.layer_norm(x.float(), x.shape[-1:]),
        lambda x: x.transpose(0, 1).clone(),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_an_operation_gives_the_same_form(operation, dtype):
    inputs = [meta(3, 4, dtype=dtype), meta(4, 3, dtype=dtype).mT, meta(5, 2, dtype=dtype)]
    expected = [form(operation(x)) for x in inputs]
    with RememberedShapes():
        assert [form(operation(x)) for x in inputs] == expected
        assert [form(operation(x)) for x in inputs] == expected


def test_what_was_seen_does_not_reach_torch_again():
    x, weight = meta(3, 17), meta(17, 17)
    with Watched() as watched, RememberedShapes():
        first = x @ weight
        count = len(watched.calls)
        second = x @ weight
    assert count == 1
    assert torch.ops.aten.mm.default not in watched.calls[count:]
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata


def test_the_default_type_decides():
    x = meta(3, dtype=torch.int64)
    with RememberedShapes():
        assert (x * 1.5).dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert (x * 1.5).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_a_view_that_does_not_say_so_is_one():
    x = meta(2, 3)
    with RememberedShapes():
        for _ in range(2):
            assert torch.ops.aten._unsafe_view(x, [6]).untyped_storage()._cdata == x.untyped_storage()._cdata


def test_values_views_and_changes_in_place_are_real():
    x = torch.arange(6.0).reshape(2, 3)
    empty = meta(2, 3)
    with RememberedShapes():
        for _ in range(2):
            assert torch.equal(x * 2, x.clone().mul_(2))
            assert empty.mT.untyped_storage()._cdata == empty.untyped_storage()._cdata
            assert empty.add_(1) is empty
