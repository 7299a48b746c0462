"""The factors of a low-rank term: how they start, and which components of a fit they take."""

from __future__ import annotations

import pytest
import torch

from compressvit.transforms.lors.layers import LowRankTerm, SharedLowRankLinear
from compressvit.transforms.low_rank.layer import reset_zero_, set_factors_

IN, OUT, RANK = 64, 20, 50


def test_noise_is_uniform_up_to_one_over_the_root_of_the_inputs():
    torch.manual_seed(0)
    up, down = torch.ones(OUT, RANK), torch.empty(RANK, IN)
    reset_zero_(up, down)
    assert not up.any()
    bound = IN**-0.5
    assert 0.99 * bound < down.abs().max() <= bound
    assert down.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_components_that_float32_cannot_see_start_from_noise():
    """By the size of the product: a component that is small on one side and large on the other counts in full."""
    torch.manual_seed(0)
    up, down = torch.randn(OUT, 4, dtype=torch.float64), torch.randn(4, IN, dtype=torch.float64)
    up, down = up / up.norm(dim=0), down / down.norm(dim=1, keepdim=True)
    up *= torch.tensor([1.0, 1e-5, 1e-5, 0.0], dtype=torch.float64)
    down *= torch.tensor([1.0, 1e5, 1e-4, 0.0], dtype=torch.float64)[:, None]
    ours = torch.empty(OUT, 4), torch.empty(4, IN)
    set_factors_(*ours, up, down)
    for used in (0, 1):
        torch.testing.assert_close(ours[0][:, used], up[:, used].float())
        torch.testing.assert_close(ours[1][used], down[used].float())
    for left in (2, 3):
        assert not ours[0][:, left].any()
        assert 0 < ours[1][left].abs().max() <= IN**-0.5


@pytest.mark.parametrize("tokens", [1, 3, 200])
def test_both_orders_of_the_product_compute_the_same(tokens):
    torch.manual_seed(0)
    layer = SharedLowRankLinear(IN, OUT).double()
    layer.low_rank = LowRankTerm(IN, OUT, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.low_rank.up.normal_()
    x = torch.randn(tokens, IN, dtype=torch.float64)
    expected = x @ (layer.weight + layer.low_rank.up @ layer.low_rank.down).mT + layer.bias
    torch.testing.assert_close(layer(x), expected)
