"""Approximations of layers that generate matrices: shared generators plus private low-rank terms, fitted to trained ones.

A generator is a linear layer whose outputs, for a query q, are the entries of a matrix W(q) (rows, columns): a tensor T (rows, columns, D
+ 1) applied to [q; 1], the last slice being the bias. A term `Σ_k P_k Z_k(q) Q_k` with Z linear in q is a sum of Tucker-2 decompositions
of such a tensor: P_k (rows, r) and Q_k (r, columns) are its factors, Z_k (r, r, D + 1) its core (block-term decomposition, De Lathauwer
2008, https://doi.org/10.1137/070690729). Errors are those of the generated matrices, in the mean over queries: ‖(T − T̂) L‖² with L Lᵀ =
E[q̃ q̃ᵀ] for q̃ = [q; 1].

All of it is float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compressvit.fitting.lowrank import cholesky
from compressvit.fitting.moments import Moments

Tensor = torch.Tensor
SWEEPS = 3  # of the alternation for the two factors of a term: more change the fourth digit of its error


@dataclass(frozen=True)
class Term:
    """`up @ core @ down` of a generated matrix: (rows, r), (r, r, D + 1), (r, columns)."""

    up: Tensor
    core: Tensor
    down: Tensor

    def product(self) -> Tensor:  # (rows, columns, D + 1)
        return torch.einsum("ar,rsd,sb->abd", self.up, self.core, self.down)


def query_factor(moments: Moments, ridge: float) -> Tensor:
    """L (D + 1, D + 1), lower triangular, with `L Lᵀ = E[q̃ q̃ᵀ]` and a ridge on the part of q."""
    size = len(moments.mean)
    level = moments.inputs.double().diagonal().mean()
    whole = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    whole[:size, :size] = moments.inputs.double() + ridge * level * torch.eye(size, dtype=torch.float64)
    whole[size, :size] = whole[:size, size] = moments.mean.double()
    whole[size, size] = 1.0
    return cholesky(whole, 0.0)


def best_term(tensor: Tensor, rank: int) -> Term:
    """A Tucker-2 approximation of `tensor` (rows, columns, d) with orthonormal factors of `rank`, by orthogonal iteration (HOOI)."""
    down = _leading(tensor.movedim(1, 0), rank)  # (columns, r)
    for _ in range(SWEEPS):
        up = _leading(torch.einsum("abd,bs->asd", tensor, down), rank)
        down = _leading(torch.einsum("abd,ar->brd", tensor, up), rank)
    core = torch.einsum("abd,ar,bs->rsd", tensor, up, down)
    return Term(up, core, down.mT)


def _leading(tensor: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors (n, rank) of the first unfolding of a tensor (n, …)."""
    flat = tensor.flatten(1)
    _, vectors = torch.linalg.eigh(flat @ flat.mT)
    return vectors[:, -rank:].flip(1)


def fit_terms(tensor: Tensor, ranks: Sequence[int], rounds: int) -> list[Term]:
    """A sum of terms of these ranks for `tensor` (rows, columns, d): each for what the others leave, `rounds` times over."""
    terms: list[Term] = []
    left = tensor
    for rank in ranks:
        terms.append(best_term(left, rank))
        left = left - terms[-1].product()
    for _ in range(rounds if len(ranks) > 1 else 0):
        for i, term in enumerate(terms):
            left = left + term.product()
            terms[i] = best_term(left, term.up.shape[1])
            left = left - terms[i].product()
    return terms


def fit_shared_generators(
    tensors: Sequence[Tensor], ranks: Sequence[Sequence[int]], rounds: int
) -> tuple[Tensor, list[list[Term]]]:
    """One tensor for several, and terms for each: alternately the mean of what the terms leave, and terms for what the mean leaves.

    Args:
        tensors: (rows, columns, d) each, weighed by the same L.
        ranks: of each one's terms.
        rounds: of the alternation.
    """
    shared = torch.stack(list(tensors)).mean(0)
    terms: list[list[Term]] = [[] for _ in tensors]
    for number in range(rounds + 1):
        for i, tensor in enumerate(tensors):
            terms[i] = fit_terms(tensor - shared, ranks[i], rounds=1)
        if number < rounds:
            rest = [t - sum(term.product() for term in found) for t, found in zip(tensors, terms, strict=True)]
            shared = torch.stack(rest).mean(0)
    return shared, terms
