"""A matrix of low rank from its own rows: the same matrix, in fewer numbers, with coefficients that stay small."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import qr

from compressvit.fitting import pivoted as module
from compressvit.fitting.pivoted import LARGEST, Pivoted, pivoted


def factors(outputs, inputs, rank, seed=0, decay=0.0):
    """Random factors whose components fall from 1 to 10^-decay."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(outputs, rank, generator=generator, dtype=torch.float64)
    down = torch.randn(rank, inputs, generator=generator, dtype=torch.float64)
    return up * torch.logspace(0, -decay, rank, dtype=torch.float64), down


def whole(found: Pivoted) -> torch.Tensor:
    return torch.cat([found.rows, found.coefficients @ found.rows])[found.order]


@pytest.mark.parametrize("decay", [0, 6])
@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(60, 20, 7), (20, 60, 19), (9, 9, 1), (64, 64, 40)])
def test_it_is_the_same_matrix_in_fewer_numbers(outputs, inputs, rank, decay):
    up, down = factors(outputs, inputs, rank, decay=decay)
    found = pivoted(up, down)
    expected = up @ down
    assert (
        whole(found) - expected
    ).abs().max() < 1e-10 * expected.abs().max()  # measured up to 2e-15, of decay 6 6e-13
    assert found.rows.numel() + found.coefficients.numel() == rank * (outputs + inputs) - rank**2
    assert (found.order.dtype, found.order.sort().values.tolist()) == (torch.int64, list(range(outputs)))
    pivots = found.order.argsort()[:rank]
    assert torch.allclose(found.rows, expected[pivots]), "rows of the matrix itself"
    assert found.coefficients.abs().max() <= LARGEST


@pytest.mark.parametrize("seed", [1994, 2205, 1685])
def test_coefficients_stay_small_where_the_greedy_choice_lets_them_grow(seed):
    up, down = factors(40, 50, 6, seed)
    basis = module._basis(up).numpy()
    greedy = qr(basis.T, mode="r", pivoting=True)[1]
    assert abs(module._solve(basis, greedy[:6], greedy[6:])).max() > 1.3
    found = pivoted(up, down)
    assert found.coefficients.abs().max() <= LARGEST
    assert torch.allclose(whole(found), up @ down)


def test_the_rows_do_not_depend_on_how_the_product_is_split():
    up, down = factors(30, 12, 5)
    mixing = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 10.0 ** torch.arange(
        5
    )
    found, again = pivoted(up, down), pivoted(up @ mixing, torch.linalg.solve(mixing, down))
    assert torch.equal(found.order, again.order)
    assert torch.allclose(found.coefficients, again.coefficients)


@pytest.mark.parametrize("kind", ["zero component", "equal components", "equal rows", "zero"])
def test_a_product_of_a_lower_rank_has_pivots_that_depend_on_others(kind):
    up, down = factors(12, 8, 4)
    if kind == "zero component":
        up[:, 2] = 0
    elif kind == "equal components":
        up[:, 3] = 2 * up[:, 1]
    elif kind == "equal rows":
        up[:] = up[:1]
    else:
        up[:], down[:] = 0, 0
    found = pivoted(up, down)
    assert (found.rows.shape, found.coefficients.shape) == ((4, 8), (8, 4))
    assert torch.allclose(whole(found), up @ down)
    assert found.coefficients.abs().max() <= LARGEST
    used = {"zero component": 3, "equal components": 3, "equal rows": 1, "zero": 0}[kind]
    assert (found.coefficients != 0).any(dim=0).tolist() == [True] * used + [False] * (4 - used)
