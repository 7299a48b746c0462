"""The regression of one layer, against sums written out token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressvit.fitting.held_out import every_fourth
from compressvit.fitting.regression import RIDGES, Regression

IMAGES, TOKENS, INNER, OUT = 8, 3, 4, 2


def tokens(images: int = IMAGES, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs with a mean, wanted outputs, and a weight for every token."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, TOKENS, INNER, generator=generator) + 1
    y = torch.randn(images, TOKENS, OUT, generator=generator) - 1
    return x, y, torch.rand(images, TOKENS, 1, generator=generator) + 0.1


def flat(*tensors: Tensor) -> list[Tensor]:
    return [t.double().flatten(0, 1) for t in tensors]


def filled(x: Tensor, y: Tensor, weights: Tensor, batch: int, scale: Tensor | None = None) -> Regression:
    regression = Regression(scale)
    held_out = every_fourth(torch.arange(len(x)))
    for parts in zip(*(t.split(batch) for t in (x, y, weights, held_out)), strict=True):
        regression.add(*parts)
    return regression


def ridge_regression(x: Tensor, y: Tensor, weights: Tensor, prior: Tensor, ridge: float) -> Tensor:
    """Towards `prior`, by gradient: the derivative of Σ w ‖x Wᵀ − y‖² / Σ w + level ‖W − prior‖² is zero."""
    xx, yx = (x * weights).mT @ x / weights.sum(), (y * weights).mT @ x / weights.sum()
    level = ridge * xx.diagonal().mean()
    return (yx + level * prior) @ (xx + level * torch.eye(x.shape[1], dtype=torch.float64)).inverse()


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_one_image_in_four_is_held_out_whatever_the_batches(batch):
    x, y, weights = tokens()
    regression = filled(x, y, weights, batch)
    held = torch.tensor([False, False, False, True] * 2)
    for sums, mask in ((regression.held_out, held), (regression.fitted, ~held), (regression.whole, held | ~held)):
        a, b, w = flat(x[mask], y[mask], weights[mask])
        assert sums.weight == pytest.approx(w.sum().item())
        torch.testing.assert_close(sums.x, (a * w).sum(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sums.y, (b * w).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [None, torch.tensor([0.1, 5.0], dtype=torch.float64)], ids=["alike", "scaled"])
def test_the_error_is_what_the_layer_would_make(scale):
    x, y, weights = tokens()
    regression = filled(x, y, weights, 4, scale)
    weight, bias = torch.randn(OUT, INNER, dtype=torch.float64), torch.randn(OUT, dtype=torch.float64)
    a, b, w = flat(x, y, weights)
    by = torch.ones(OUT, dtype=torch.float64) if scale is None else scale
    lost, asked = ((w * ((t * by).square())).sum() for t in (a @ weight.mT + bias - b, b))
    assert regression.error(weight, bias) == pytest.approx((lost / asked).sqrt().item(), rel=1e-5)


def test_the_best_bias_is_the_mean_of_what_the_weight_leaves():
    x, y, weights = tokens()
    weight = torch.randn(OUT, INNER, dtype=torch.float64)
    a, b, w = flat(x, y, weights)
    expected = (w * (b - a @ weight.mT)).sum(0) / w.sum()
    torch.testing.assert_close(filled(x, y, weights, 4).whole.best_bias(weight), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("free", [False, True], ids=["bias stays", "bias is fitted"])
def test_the_solution_is_the_ridge_regression_that_held_out_images_prefer(free):
    x, y, weights = tokens(40)
    prior = torch.zeros(OUT, INNER, dtype=torch.float64)
    bias = torch.tensor([0.5, -2.0], dtype=torch.float64)
    held = torch.arange(40) % 4 == 3

    def solution(mask: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        a, b, w = flat(x[mask], y[mask], weights[mask])
        if not free:
            return ridge_regression(a, b - bias, w, prior, ridge), bias
        means = [(t * w).sum(0) / w.sum() for t in (a, b)]
        found = ridge_regression(a - means[0], b - means[1], w, prior, ridge)
        return found, means[1] - found @ means[0]

    errors = []
    for ridge in RIDGES:
        found, beside = solution(~held, ridge)
        a, b, w = flat(x[held], y[held], weights[held])
        errors.append((w * (a @ found.mT + beside - b).square()).sum().item())
    chosen = RIDGES[errors.index(min(errors))]
    assert len(set(errors)) == len(RIDGES)
    weight, moment = filled(x, y, weights, 8).solve(prior, None if free else bias)
    torch.testing.assert_close(weight, solution(held | ~held, chosen)[0], rtol=1e-4, atol=1e-5)
    a, _, w = flat(x, y, weights)
    centre = (a * w).sum(0) / w.sum() if free else 0.0
    torch.testing.assert_close(moment, ((a - centre) * w).mT @ (a - centre) / w.sum(), rtol=1e-4, atol=1e-5)


def test_without_a_held_out_image_little_but_the_prior_is_left():
    """Nothing could judge a smaller ridge."""
    x, y, weights = tokens(3)
    prior = torch.randn(OUT, INNER, dtype=torch.float64)
    zero = torch.zeros(OUT, dtype=torch.float64)
    regression = filled(x, y, weights, 3)
    assert not regression.held_out.weight
    found, _ = regression.solve(prior, zero)
    expected = ridge_regression(*flat(x, y, weights), prior, RIDGES[-1])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found - prior).norm() < 0.5 * prior.norm()


def test_a_layer_whose_inputs_are_zero_keeps_its_weight():
    _, y, weights = tokens()
    prior = torch.randn(OUT, INNER, dtype=torch.float64)
    regression = filled(torch.zeros(IMAGES, TOKENS, INNER), y, weights, 4)
    for bias in (None, torch.zeros(OUT, dtype=torch.float64)):
        torch.testing.assert_close(regression.solve(prior, bias)[0], prior)
