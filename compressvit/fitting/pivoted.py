"""A matrix of low rank as some of its own rows, and the coefficients that make the others of them.

A matrix W (m, n) of rank r has r rows that span all others: `W_rest = C W_pivots` with C (m − r, r). The rows and the coefficients are
r(m + n) − r² numbers and multiply-accumulates, r² fewer than two factors have, for the same function; at full rank they are as many as the
matrix has, so unlike two factors they are never more. (Pivoting Factorization, PIFA, ICML 2025, https://arxiv.org/abs/2501.19090.) Of the
transpose these are columns.

Any r independent rows will do in exact arithmetic. Rounding errors of the pivots reach the other rows multiplied by C, so here they are
rows of nearly the largest volume, with which no coefficient is above 1.05: the greedy choice of a pivoted QR decomposition, then
exchanges for as long as a coefficient is above (Goreinov et al., How to Find a Good Submatrix, 2010,
https://doi.org/10.1142/9789812836021_0015; each exchange makes the volume that many times larger, so they come to an end).

All of it is float64 on the CPU, on matrices of a factor's size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from compressvit.fitting.lowrank import used_components

if TYPE_CHECKING:
    import numpy as np

Tensor = torch.Tensor
LARGEST = 1.05  # of a coefficient; closer to 1 takes more exchanges
_INDEPENDENT = 1e-10  # what a column must have that those before it lack, relative to its norm, to count


class Pivoted(NamedTuple):
    """`W = torch.cat([rows, coefficients @ rows])[order]`."""

    order: Tensor  # (m,) int64: where the rows of W are in the concatenation
    rows: Tensor  # (r, n) float64
    coefficients: Tensor  # (m − r, r) float64, each within ±1.05


def pivoted(up: Tensor, down: Tensor) -> Pivoted:
    """The pivoted form of `up @ down`.

    Where the product is of a lower rank than the factors have, some of the pivots depend on others, and their coefficients are zero.

    Args:
        up: (m, r) with r < m, of any precision and on any device.
        down: (r, n). The rows of W depend on each other as those of `up` do, so only those are looked at.
    """
    up, down = up.detach().cpu().double(), down.detach().cpu().double()
    outputs, rank = up.shape
    assert 0 < rank < outputs, "at full rank no row is left to depend on the others"
    used = used_components(up, down)
    up, down = up[:, used], down[used]
    pivots, coefficients = _of_largest_volume(_basis(up))
    rest = [row for row in range(outputs) if row not in set(pivots)]
    more = rank - len(pivots)  # pivots that depend on the others
    chosen = torch.tensor([*pivots, *rest[:more]])
    order = torch.empty(outputs, dtype=torch.int64)
    order[torch.cat([chosen, torch.tensor(rest[more:])])] = torch.arange(outputs)
    found = torch.zeros(outputs - rank, rank, dtype=torch.float64)
    found[:, : len(pivots)] = coefficients[more:]
    return Pivoted(order, up[chosen] @ down, found)


def _basis(up: Tensor) -> Tensor:
    """An orthonormal basis (m, k) of the columns of `up` (m, r), k its rank: which rows span the others does not depend on the basis."""
    from scipy.linalg import qr

    norms = up.norm(dim=0)
    found, triangle, _ = qr((up / norms).numpy(), mode="economic", pivoting=True)
    independent = abs(triangle.diagonal()) > _INDEPENDENT
    return torch.from_numpy(found[:, independent])


def _of_largest_volume(basis: Tensor) -> tuple[list[int], Tensor]:
    """Rows of `basis` (m, k) of nearly the largest volume, and the coefficients (m − k, k) of the others, in order."""
    from scipy.linalg import qr

    whole = basis.numpy()
    size = whole.shape[1]
    permutation = qr(whole.T, mode="r", pivoting=True)[1]
    pivots, rest = permutation[:size].copy(), permutation[size:].copy()
    while True:
        coefficients = _solve(whole, pivots, rest)
        if not _exchange(coefficients, pivots, rest):  # with what the solution says, not only the sum of the exchanges
            break
    ordered = rest.argsort()
    return pivots.tolist(), torch.from_numpy(coefficients[ordered])


def _solve(whole: np.ndarray, pivots: np.ndarray, rest: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.ascontiguousarray(np.linalg.solve(whole[pivots].T, whole[rest].T).T)


def _exchange(coefficients: np.ndarray, pivots: np.ndarray, rest: np.ndarray) -> int:
    """Exchange pivots for other rows, in place, until no coefficient (m − k, k) is too large; returns how many were exchanged.

    Of the row i that becomes the pivot j, with coefficients c: `C' = C − C_j (c − e_j)ᵀ / c_j`, where the old pivot, whose own coefficients
    are e_j, takes the place of row i.
    """
    import numpy as np

    count = 0
    while coefficients.size:
        i, j = np.unravel_index(np.abs(coefficients).argmax(), coefficients.shape)
        largest = coefficients[i, j]
        if abs(largest) <= LARGEST:
            break
        step = coefficients[i] / largest
        step[j] -= 1 / largest
        coefficients[i] = 0.0
        coefficients[i, j] = 1.0
        coefficients -= np.multiply.outer(coefficients[:, j].copy(), step)
        pivots[j], rest[i] = rest[i], pivots[j]
        count += 1
    return count
