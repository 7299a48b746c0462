"""Shared and low-rank approximations of weight matrices, with the error measured in the layers' outputs.

A layer computes `y = x Wᵀ`. Replacing W by Ŵ changes its output by `x (Ŵ − W)ᵀ`, whose mean square over inputs with second
moment `S = E[xᵀx]` is `‖(Ŵ − W) S^½‖²`: plain truncation minimises the error of the weights (S = I), *whitened* truncation that
of the outputs (SVD-LLM, ICLR 2025, https://arxiv.org/abs/2403.07378). A second matrix `G` (out, out) says how much the model's
output suffers from an error at the layer's: with `G = E[gᵀg]` of gradients g the squared norm `‖G^½ (Ŵ − W) S^½‖²` is the
Kronecker-factored Gauss–Newton estimate of the change of the whole model's output (K-FAC, https://arxiv.org/abs/1503.05671).

All of it is float64 on the CPU: a few matrices of a layer's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

Tensor = torch.Tensor
LEAST_RIDGE = 1e-6
TINY = 1e-300  # in place of zero, where something is taken relative to a weight


@dataclass(frozen=True)
class Metric:
    """Lower-triangular factors of a layer's input moment S = L Lᵀ (in, in) and output moment G = M Mᵀ (out, out).

    None stands for the identity: `Metric()` measures the weight itself.
    """

    input: Tensor | None = None
    output: Tensor | None = None

    def weigh(self, matrix: Tensor) -> Tensor:
        """`Mᵀ · matrix · L`, whose plain squared norm is the error in this metric."""
        weighed = matrix if self.input is None else matrix @ self.input
        return weighed if self.output is None else self.output.mT @ weighed

    def apply(self, matrix: Tensor) -> Tensor:
        """`G · matrix · S`, half the gradient of the squared norm."""
        image = matrix if self.input is None else matrix @ self.input @ self.input.mT
        return image if self.output is None else self.output @ (self.output.mT @ image)

    def squared_norm(self, matrix: Tensor) -> float:
        """The squared norm of an error `matrix` (out, in) in this metric."""
        return self.weigh(matrix).square().sum().item()


def cholesky(moment: Tensor, ridge: float) -> Tensor:
    """Lower-triangular L with `L Lᵀ = moment + ridge · mean(diagonal) · I`, in float64.

    The ridge keeps a cost on directions that the calibration images do not use. It is at least 1e-6, and larger where a
    singular moment requires it.
    """
    moment = moment.double()
    size = moment.shape[0]
    if not torch.isfinite(moment).all():
        raise ArithmeticError("a moment holds numbers that are not finite")
    level, ridge = _level(moment), max(ridge, LEAST_RIDGE)
    while True:  # sums of products are positive definite only up to the rounding of their float32 terms
        factor, failed = torch.linalg.cholesky_ex(moment + ridge * level * torch.eye(size, dtype=torch.float64))
        if not failed:
            return factor
        ridge *= 10


def factor_of(metric: Tensor | None) -> Tensor | None:
    """M of a metric M Mᵀ, whatever the units of its outputs are."""
    if metric is None:
        return None
    units = metric.diagonal().clamp(min=TINY).sqrt()
    return units[:, None] * cholesky(metric / torch.outer(units, units), 0.0)


def _level(moment: Tensor) -> Tensor:
    return moment.diagonal().abs().mean().clamp(min=torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of a matrix in a metric; `factors(rank)` is its best approximation there."""

    left: Tensor  # (out, k)
    values: Tensor  # (k,), falling
    right: Tensor  # (k, in)
    metric: Metric

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """`up` (out, rank) and `down` (rank, in), whose product is the best approximation of that rank.

        Each component is split evenly, `‖up_k‖ = ‖down_k‖`: an optimiser's steps are of one size in both, and where one of them were
        a hundred times the smaller they would destroy it.
        """
        up, down = self.left[:, :rank] * self.values[:rank], self.right[:rank]
        if self.metric.input is not None:
            down = torch.linalg.solve_triangular(self.metric.input, down, upper=False, left=False)
        if self.metric.output is not None:
            up = torch.linalg.solve_triangular(self.metric.output.mT, up, upper=True)
        tiny = torch.finfo(torch.float64).tiny
        split = (down.norm(dim=1).clamp(min=tiny) / up.norm(dim=0).clamp(min=tiny)).sqrt()
        split = torch.where(self.values[:rank] > 0, split, torch.ones_like(split))
        return up * split, down / split[:, None]


def spectrum(matrix: Tensor, metric: Metric = Metric()) -> Spectrum:
    """Decompose `matrix` (out, in) so that its truncations have the smallest error in `metric`."""
    left, values, right = torch.linalg.svd(metric.weigh(matrix.double()), full_matrices=False)
    return Spectrum(left, values, right, metric)


def truncation_errors(matrix: Tensor, moment: Tensor, ridge: float, outputs: Tensor | None = None) -> Tensor:
    """The squared error of the best truncations of W to rank 0, 1, …, k, (k + 1,), falling.

    They are sums of the eigenvalues of the smaller of its two squares, which take a fraction of the time of a singular value decomposition
    and a factor of one of the two metrics at most; they are off by 1e-15 of the first, and by the ridge of a metric that is not factored.

    Args:
        matrix: W, (out, in), in float64; k is the smaller of the two.
        moment: of its inputs, (in, in); with the `ridge` of `cholesky`.
        outputs: the metric of its outputs, (out, out); None where all count alike.
    """
    if matrix.shape[0] > matrix.shape[1]:
        factor: Tensor | None = cholesky(moment, ridge)
        square = matrix.mT @ (matrix if outputs is None else outputs @ matrix)
    else:
        factor = factor_of(outputs)
        square = matrix @ moment @ matrix.mT + max(ridge, LEAST_RIDGE) * _level(moment) * (matrix @ matrix.mT)
    if factor is not None:
        square = factor.mT @ square @ factor
    return left_out(torch.linalg.eigvalsh(square).clamp(min=0).sqrt().flip(0))


def left_out(values: Tensor) -> Tensor:
    """The squared error of truncations to rank 0, 1, …, k, (k + 1,), from the singular values (k,): what each leaves out."""
    return torch.cat([values.square().flip(0).cumsum(0).flip(0), values.new_zeros(1)])


def fit_shared(
    matrices: Sequence[Tensor],
    metrics: Sequence[Metric],
    ranks: Sequence[int] = (),
    rounds: int = 0,
    *,
    advance: Callable[..., object] = lambda parts=1: None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """One shared matrix and a low-rank term for each layer, fitted together: minimise `Σ ‖matrix_i − shared − up_i down_i‖²`.

    Each norm is that of the layer's metric. Alternates the two exact minimisations (the shared matrix for given terms, the
    terms for a given shared matrix), so no round makes it worse.

    Args:
        matrices: (out, in) each.
        ranks: of the terms; none at all for the shared matrix alone.
        rounds: how often the shared matrix is fitted again after the terms; 0 for the weighted mean and one fit of the terms.
        advance: as `compressvit.log.working` gives; called with 1 after each fit, (rounds + 1) · (layers + 1) in all, else with 0.

    Returns:
        The shared matrix, and (up, down) of each layer.
    """
    matrices = [m.double() for m in matrices]

    def refitted(terms: Sequence[Tensor], start: Tensor) -> Tensor:
        found = _best_shared([m - t for m, t in zip(matrices, terms, strict=True)], metrics, start, advance)
        advance()
        return found

    def fitted(shared: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for matrix, metric, rank in zip(matrices, metrics, ranks, strict=True):
            yield spectrum(matrix - shared, metric).factors(rank)
            advance()

    shared = refitted([torch.zeros_like(m) for m in matrices], _sum(matrices) / len(matrices))
    for _ in range(rounds):
        shared = refitted([_product(factors) for factors in fitted(shared)], shared)
    return shared, list(fitted(shared)) if ranks else []


def used_components(up: Tensor, down: Tensor) -> Tensor:
    """(r,) of bool: the components of `up @ down`, (out, r) and (r, in), that are above float32's precision relative to the largest."""
    size = up.norm(dim=0) * down.norm(dim=1)
    return size > 1e-7 * size.max()


def _sum(matrices: Iterable[Tensor]) -> Tensor:
    return sum(matrices, torch.zeros((), device="cpu"))


def _product(factors: tuple[Tensor, Tensor]) -> Tensor:
    return factors[0] @ factors[1]


def _best_shared(
    targets: Sequence[Tensor], metrics: Sequence[Metric], start: Tensor, advance: Callable[..., object]
) -> Tensor:
    """The matrix X that minimises `Σ ‖targets_i − X‖²`, each in its metric: it solves `Σ G_i X S_i = Σ G_i targets_i S_i`.

    With one kind of metric for inputs alone this is the mean weighted by the inputs' second moments.
    """
    out, inner = start.shape
    left = torch.linalg.cholesky(_sum(_moment(g.output, out) for g in metrics))
    right = torch.linalg.cholesky(_sum(_moment(g.input, inner) for g in metrics))

    def precondition(r: Tensor) -> Tensor:  # exact where all G_i, or all S_i, are equal
        return len(metrics) * torch.cholesky_solve(torch.cholesky_solve(r, left).mT, right).mT

    # Preconditioned conjugate gradients from `start`, each step of which lowers the same quadratic form.
    x = start
    residual = _sum(g.apply(t - x) for g, t in zip(metrics, targets, strict=True))
    first = residual.norm()
    direction = z = precondition(residual)
    for _ in range(50):
        if residual.norm() <= 1e-6 * first:
            break
        advance(0)
        image = _sum(g.apply(direction) for g in metrics)
        scale = (residual * z).sum()
        step = scale / (direction * image).sum()
        x = x + step * direction
        residual = residual - step * image
        z = precondition(residual)
        direction = z + ((residual * z).sum() / scale) * direction
    return x


def _moment(factor: Tensor | None, size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64) if factor is None else factor @ factor.mT
