"""The linear layer that computes wanted outputs from given inputs best, from sums over tokens alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from compressvit.fitting.lowrank import TINY, Tensor
from compressvit.fitting.shares import summed

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # in parts of the inputs' mean square


@dataclass
class Sums:
    """Sums over tokens of a layer's inputs x (in,) and wanted outputs y (out,), in float64 on the CPU, weighted."""

    weight: float = 0.0
    x: Any = 0.0  # (in,)
    y: Any = 0.0  # (out,)
    xx: Any = 0.0  # (in, in)
    yx: Any = 0.0  # (out, in)
    yy: Any = 0.0  # (out,), of squares

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Add tokens: x (T, in), y (T, out), weights (T, 1)."""
        weighted = x * weights
        self.weight += weights.sum().item()
        self.x = self.x + weighted.sum(dim=0).cpu().double()
        self.y = self.y + (y * weights).sum(dim=0).cpu().double()
        self.xx = self.xx + (weighted.mT @ x).cpu().double()
        self.yx = self.yx + (y.mT @ weighted).cpu().double()
        self.yy = self.yy + (y.square() * weights).sum(dim=0).cpu().double()

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def of(self, outputs: Tensor) -> Sums:
        """The sums for these outputs alone."""
        return self if not self.weight else replace(self, y=self.y[outputs], yx=self.yx[outputs], yy=self.yy[outputs])

    def moments(self, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """E[xᵀx] (in, in) and E[(y − bias)ᵀx] (out, in); without a bias of deviations from the means."""
        mean, xx = self.x / self.weight, self.xx / self.weight
        if bias is None:
            return xx - torch.outer(mean, mean), self.yx / self.weight - torch.outer(self.y / self.weight, mean)
        return xx, self.yx / self.weight - torch.outer(bias, mean)

    def best_bias(self, weight: Tensor) -> Tensor:
        """The best bias (out,) beside `weight` (out, in)."""
        return (self.y - weight @ self.x) / self.weight

    def squared_errors(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Of `x weightᵀ + bias` from y, summed over tokens: (out,)."""
        products = ((weight @ self.xx - 2 * self.yx) * weight).sum(dim=1)
        return self.yy + products + 2 * (weight @ self.x - self.y) * bias + self.weight * bias.square()


@dataclass
class Regression:
    """What one layer is to learn: sums over two sets of images, so that a ridge is judged by images it was not fitted to.

    Attributes:
        scale: how much an error of each output matters, (out,): timm's LayerScale after it; None if all are equal.
        ridges: to choose from, in parts of the inputs' mean square.
    """

    scale: Tensor | None = None
    ridges: tuple[float, ...] = RIDGES
    fitted: Sums = field(default_factory=Sums)
    held_out: Sums = field(default_factory=Sums)

    def add(self, x: Tensor, y: Tensor, weights: Tensor, held_out: Tensor) -> None:
        """Add the tokens of a batch of images, one after the other: x (…, in), y (…, out), weights (…, 1). `held_out`, bool (B,), says
        which images judge the fit (`compressvit.fitting.held_out`)."""
        held_out = held_out.to(x.device)
        tokens = [t.reshape(len(held_out), -1, t.shape[-1]) for t in (x, y, weights)]
        for sums, mask in ((self.fitted, ~held_out), (self.held_out, held_out)):
            if mask.any():
                sums.add(*(t[mask].flatten(0, 1) for t in tokens))

    def over_processes(self) -> Regression:
        """Of the tokens of all processes of a run."""
        return replace(self, fitted=summed(self.fitted), held_out=summed(self.held_out))

    def of(self, outputs: Tensor) -> Regression:
        """The same inputs, for some of the outputs alone.

        Args:
            outputs: their indices.
        """
        return replace(
            self,
            scale=None if self.scale is None else self.scale[outputs],
            fitted=self.fitted.of(outputs),
            held_out=self.held_out.of(outputs),
        )

    @property
    def whole(self) -> Sums:
        """Over all images."""
        return self.fitted + self.held_out

    def solve(self, prior: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The matrix (out, in) that predicts y from x best, with a ridge towards `prior`, and the moment E[xᵀx] (in, in) of errors in it.

        The ridge is the one of `ridges` that does best on the held-out images, or where there are none the largest, which leaves little
        but `prior`.

        Args:
            prior: the teacher's weight (out, in).
            bias: one that stays as it is (zeros for a layer without); None for one that will be fitted to the matrix.
        """
        chosen = self.ridges[-1]
        if self.held_out.weight:
            moments, errors = self.fitted.moments(bias), []
            for ridge in self.ridges:
                found = _ridge_regression(*moments, prior, ridge)
                beside = self.fitted.best_bias(found) if bias is None else bias
                errors.append(self._weigh(self.held_out.squared_errors(found, beside)))
            chosen = self.ridges[errors.index(min(errors))]
        xx, yx = self.whole.moments(bias)
        return _ridge_regression(xx, yx, prior, chosen), xx

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Of `x weightᵀ + bias`, relative to y: the root of the ratio of mean squares."""
        sums = self.whole
        lost, asked = self._weigh(sums.squared_errors(weight, bias)), self._weigh(sums.yy)
        return (max(lost, 0.0) / max(asked, TINY)) ** 0.5

    def _weigh(self, squares: Tensor) -> float:
        return (squares if self.scale is None else squares * self.scale.square()).sum().item()


def _ridge_regression(xx: Tensor, yx: Tensor, prior: Tensor, ridge: float) -> Tensor:
    level = ridge * xx.diagonal().mean().clamp(min=TINY)
    whole = xx + level * torch.eye(len(xx), dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(whole)
    if failed:  # only through rounding: sums of products are positive definite up to that of their float32 terms
        return torch.linalg.solve(whole, yx + level * prior, left=False)
    return torch.cholesky_solve((yx + level * prior).mT, factor).mT
