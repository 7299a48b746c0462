"""Which inputs of a linear layer to remove, and what the others take over: the optimal brain surgeon for inputs.

A layer computes y = W z. Without the inputs R, the others can stand in for them as far as they say the same: where S = E[zᵀz], the best
W for the inputs that are left has a mean squared error greater by

    tr(G W_R (P_RR)⁻¹ W_Rᵀ),   P = S⁻¹ over the inputs before the removal, W_R the columns of R,

in the metric G of the outputs, and both W and P follow by one step of Gaussian elimination. Removing a few at a time, those that cost
least, gives the order of all inputs, and with it the error of every width in one go. (Hassibi & Stork, NeurIPS 1992, for single weights;
for columns of a layer e.g. ZipLM, https://arxiv.org/abs/2302.04089.)

For the hidden neurons of an MLP, whose `fc2` is the layer, and for whole heads, which are groups of inputs of `proj`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from compressvit.fitting.lowrank import TINY, Tensor


@dataclass(frozen=True)
class Removal:
    """What is left after some inputs were removed.

    Attributes:
        kept: indices of the inputs that are left, rising.
        error: the mean squared error that the removal costs at least, in the metric of the outputs.
        weight: (out, kept), in the whitened outputs that were given.
    """

    kept: Tensor
    error: float
    weight: Tensor


def eliminate(
    weight: Tensor, moment: Tensor, ridge: float, widths: Sequence[int], group: int = 1, at_once: int = 16
) -> dict[int, Removal]:
    """Remove the inputs that cost least, and note what is left at some widths.

    Args:
        weight: Mᵀ W, (out, in): the layer's weight in whitened outputs, where the metric of the outputs is M Mᵀ.
        moment: of the inputs, (in, in): E[zᵀz], without the mean where a bias takes that over.
        ridge: relative to the moment's mean; it keeps a cost on inputs that the images do not use.
        widths: numbers of inputs that are left, each a multiple of `group`.
        group: inputs that only go together, one after the other in the layer: the dimensions of a head.
        at_once: inputs removed between two looks at what the others cost.

    Returns:
        By width. All inputs cost nothing.
    """
    found: dict[int, Removal] = {}
    for removal in _steps(weight.double(), moment.double(), ridge, sorted(widths, reverse=True), group, at_once):
        found[len(removal.kept)] = removal
    return found


def compensated(weight: Tensor, moment: Tensor, ridge: float, kept: Tensor) -> Tensor:
    """The weight (out, kept) with which the inputs `kept` stand in best for all; see `eliminate`."""
    whole = _with_ridge(moment.double(), ridge)
    factor = torch.linalg.cholesky(whole[kept][:, kept])
    return torch.cholesky_solve(whole[kept] @ weight.double().mT, factor).mT


def _with_ridge(moment: Tensor, ridge: float) -> Tensor:
    level = moment.diagonal().mean().clamp(min=TINY)
    return moment + max(ridge, 1e-6) * level * torch.eye(len(moment), dtype=torch.float64)


def _steps(
    weight: Tensor, moment: Tensor, ridge: float, widths: Sequence[int], group: int, at_once: int
) -> Iterator[Removal]:
    weight, inverse = weight.clone(), _inverse(_with_ridge(moment, ridge))
    alive, error = torch.arange(len(moment)), 0.0
    standing = torch.ones(len(alive), dtype=torch.bool)
    for width in widths:
        while (left := int(standing.sum())) > width:
            if group == 1:
                gone = _cheapest(weight, inverse, standing, min(at_once, left - width))
            else:
                gone = _cheapest_group(weight, inverse, group)
            rows, lost = inverse[gone], weight[:, gone]
            taken_over = torch.linalg.solve(rows[:, gone], rows)
            error += (lost.mT * torch.linalg.solve(rows[:, gone], lost.mT)).sum().item()
            weight.addmm_(lost, taken_over, alpha=-1)
            inverse.addmm_(rows.mT, taken_over, alpha=-1)
            standing[gone] = False
            # What is gone is zero now. It is cut out once it is an eighth of all: copying takes longer than computing with zeros.
            if group > 1 or standing.sum() * 8 <= len(standing) * 7:
                weight, inverse, alive = weight[:, standing], inverse[standing][:, standing], alive[standing]
                standing = standing[standing]
        yield Removal(alive[standing], error, weight[:, standing])


def _inverse(moment: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(moment)
    if failed:  # only through rounding: sums of products are positive definite up to that of their float32 terms
        return torch.linalg.inv(moment)
    return torch.cholesky_inverse(factor)


def _cheapest(weight: Tensor, inverse: Tensor, standing: Tensor, count: int) -> Tensor:
    """Indices of `count` inputs of those `standing` whose removal costs little: one after the other among those that cost least by
    themselves, because of two that say the same only one can go for nothing."""
    alone = torch.where(standing, weight.square().sum(dim=0) / inverse.diagonal(), torch.inf)
    candidates = alone.argsort(stable=True)[: min(4 * count, int(standing.sum()))]
    inverse, squares = inverse[candidates][:, candidates], weight[:, candidates].mT @ weight[:, candidates]
    chosen: list[int] = []
    for _ in range(count):
        costs = squares.diagonal() / inverse.diagonal()
        costs[chosen] = torch.inf
        j = int(costs.argmin())
        row = inverse[j] / inverse[j, j]  # of w − w_j row, the weights that are left, these are the products:
        half = torch.outer(row, squares[j] - squares[j, j] / 2 * row)
        squares = squares - half - half.mT
        inverse = inverse - torch.outer(inverse[j], row)
        inverse[j, j] = 1.0  # it is gone
        chosen.append(j)
    return candidates[chosen]


def _cheapest_group(weight: Tensor, inverse: Tensor, group: int) -> Tensor:
    """Indices of the inputs of the group whose removal costs least."""
    parts = [slice(start, start + group) for start in range(0, len(inverse), group)]
    costs = torch.stack([(weight[:, p].mT * torch.linalg.solve(inverse[p, p], weight[:, p].mT)).sum() for p in parts])
    return torch.arange(group) + group * int(costs.argmin())
