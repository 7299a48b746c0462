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
    inverse = torch.linalg.inv(_with_ridge(moment, ridge))
    alive, error = torch.arange(len(moment)), 0.0
    for width in widths:
        while len(alive) > width:
            count = min(at_once, len(alive) - width) if group == 1 else group
            gone = _cheapest(weight, inverse, group, count)
            stay = torch.ones(len(alive), dtype=torch.bool)
            stay[gone] = False
            taken_over = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
            cost = torch.linalg.solve(inverse[gone][:, gone], weight[:, gone].mT)
            error += (weight[:, gone].mT * cost).sum().item()
            weight = (weight - weight[:, gone] @ taken_over)[:, stay]
            inverse = (inverse - inverse[:, gone] @ taken_over)[stay][:, stay]
            alive = alive[stay]
        yield Removal(alive, error, weight)


def _cheapest(weight: Tensor, inverse: Tensor, group: int, count: int) -> Tensor:
    """Indices of `count` inputs whose removal costs little: one after the other among those that cost least by themselves, because of two
    that say the same only one can go for nothing; of groups, the first."""
    if group == 1:
        candidates = (weight.square().sum(dim=0) / inverse.diagonal()).argsort(stable=True)[: 4 * count]
        weight, inverse = weight[:, candidates], inverse[candidates][:, candidates]
        chosen: list[int] = []
        for _ in range(count):
            costs = weight.square().sum(dim=0) / inverse.diagonal()
            costs[chosen] = torch.inf
            j = int(costs.argmin())
            row = inverse[j] / inverse[j, j]
            weight, inverse = weight - weight[:, j : j + 1] * row, inverse - inverse[:, j : j + 1] * row
            inverse[j, j] = 1.0  # it is gone
            chosen.append(j)
        return candidates[chosen]
    starts = range(0, len(inverse), group)
    parts = [slice(start, start + group) for start in starts]
    costs = torch.stack([(weight[:, p].mT * torch.linalg.solve(inverse[p, p], weight[:, p].mT)).sum() for p in parts])
    return torch.arange(group) + group * int(costs.argmin())
