"""Centred kernel alignment (CKA): similarity of two layers' features from 0 to 1, independent of width, rotation and scale.

Paper: Similarity of Neural Network Representations Revisited, ICML 2019, https://arxiv.org/abs/1905.00414
In batches: Do Wide and Deep Networks Learn the Same Things?, ICLR 2021, https://arxiv.org/abs/2010.15327, with the unbiased estimator of
HSIC of Song et al., JMLR 2012, https://jmlr.org/papers/v13/song12a.html

`CKA(K, L) = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))` of two kernel matrices over images. The plain (biased) HSIC overestimates similarity
for few images and wide layers. The unbiased estimator does not, and can be averaged over batches, so a stream of batches needs the
memory of only one. Kernels and sums are in float64, regardless of the features' dtype.

Shapes: n images, p and q features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compressvit import processes
from compressvit.errors import UserError

Kernel = Literal["linear", "rbf"]

LEAST = 4  # images: the unbiased estimator divides by n − 3
_FLAT = 1e-12  # relative to the squared norm: anything smaller in centred features is rounding (1e-14 in float32)
_CHUNK = 1 << 15  # features converted to float64 at a time


def cka(x: Tensor, y: Tensor, kernel: Kernel = "linear", *, unbiased: bool = False, bandwidth: float = 1.0) -> float:
    """CKA of two representations of the same images, computed in one piece.

    Args:
        x: (n, p), or any shape whose first axis is the images.
        y: (n, q), or any shape whose first axis is the images.
        kernel: 'linear', or 'rbf': `exp(−d² / 2σ²)` of the distance d of two images.
        unbiased: use the unbiased estimator of HSIC, which needs at least 4 images and can be slightly negative for dissimilar inputs.
        bandwidth: σ of 'rbf', as a multiple of the median distance, as in the paper.

    Returns:
        The CKA; 0 if one representation is the same for all images.

    Raises:
        UserError: there are too few images, their numbers differ, or values are not finite.
    """
    least = LEAST if unbiased else 2
    grams = {}
    for name, features in (("x", x), ("y", y)):
        _require_usable(name, features, len(x), least)
        gram = centred_gram(features)
        grams[name] = None if gram is None else _kernel(gram, kernel, _scale(gram, bandwidth))
    k, m = grams["x"], grams["y"]
    if k is None or m is None:
        return 0.0
    centre = _u_centred if unbiased else _doubly_centred
    k, m = centre(k), centre(m)
    return _ratio((k * m).sum(), k.square().sum(), m.square().sum()).item()


@dataclass(frozen=True)
class CKAResult:
    """CKA `values` and the `half_width` of their 95 % confidence intervals (None after one batch), both (rows, columns)."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Tensor
    half_width: Tensor | None
    images: int
    batches: int


class MinibatchCKA:
    """Unbiased CKA of every layer of one model with every layer of another, from a stream of batches, in constant memory.

    Args:
        rows, columns: names of the layers of the two models.
        kernel, bandwidth: as for `cka`; the median distances are those of the first batch.

    Example:
        >>> stream = MinibatchCKA(["a"], ["b"])
        >>> for images in batches:  # at least 4 images in each
        ...     stream.add({"a": first(images)}, {"b": second(images)})
        >>> stream.result().values  # (1, 1)
    """

    def __init__(self, rows: Sequence[str], columns: Sequence[str], kernel: Kernel = "linear", bandwidth: float = 1.0):
        self.rows, self.columns = tuple(rows), tuple(columns)
        self._kernel: Kernel = kernel
        self._bandwidth = bandwidth
        self._scales: dict[tuple[int, str], float] = {}
        self._sums = _Sums(len(rows), len(columns))
        self.images = self.batches = 0

    def add(self, x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> None:
        """Add a batch: the features of every layer, with images on the first axis.

        Raises:
            UserError: there are fewer than 4 images, layers differ in their number, or values are not finite.
        """
        count = len(x[self.rows[0]])
        # The same tensors on both sides are centred once.
        made: dict[int, Tensor] = {}
        sides = []
        for side, (names, features) in enumerate(((self.rows, x), (self.columns, y))):
            grams = []
            for name in names:
                tensor = features[name]
                if id(tensor) not in made:
                    made[id(tensor)] = self._centred((side, name), tensor, count)
                grams.append(made[id(tensor)])
            sides.append(torch.stack(grams))
        k, m = sides
        pairs = count * (count - 3)
        self._sums.add(k @ m.mT / pairs, k.square().sum(1) / pairs, m.square().sum(1) / pairs, weight=count)
        self.images += count
        self.batches += 1

    def look(self, x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> None:
        """Take the median distances from a batch without adding it: the first, where another process adds it."""
        for side, (names, features) in enumerate(((self.rows, x), (self.columns, y))):
            for name in names:
                self._centred((side, name), features[name], len(features[name]))

    def sum_up(self) -> None:
        """Add up what all processes of a run have added, each its part of the batches."""
        self.images, self.batches = processes.totals([self.images, self.batches])
        self._sums.sum_up()

    def _centred(self, key: tuple[int, str], features: Tensor, count: int) -> Tensor:
        """The U-centred kernel matrix, flattened to (n²,); zeros for constant features."""
        _require_usable(key[1], features, count, LEAST)
        gram = centred_gram(features)
        if gram is None:
            return features.new_zeros(count * count, dtype=torch.float64, device="cpu")
        if key not in self._scales:
            self._scales[key] = _scale(gram, self._bandwidth)
        return _u_centred(_kernel(gram, self._kernel, self._scales[key])).flatten()

    def result(self) -> CKAResult:
        """The result over all batches so far.

        Raises:
            UserError: no batch was added.
        """
        if not self.batches:
            raise UserError(f"CKA needs images: none were given; at least {LEAST}, better some hundreds")
        values, half_width = self._sums.ratio(self.batches)
        return CKAResult(self.rows, self.columns, values, half_width, self.images, self.batches)


class _Sums:
    """Weighted sums of HSIC(K, L), HSIC(K, K) and HSIC(L, L) over batches, and of their products, for the interval."""

    def __init__(self, rows: int, columns: int):
        self._weight = self._squares = 0.0
        self._means = torch.zeros(3, rows, columns, dtype=torch.float64)  # Σ w v
        self._first = torch.zeros_like(self._means)  # Σ w² v
        self._second = torch.zeros(3, 3, rows, columns, dtype=torch.float64)  # Σ w² v vᵀ

    def add(self, cross: Tensor, own: Tensor, other: Tensor, weight: float) -> None:
        values = torch.stack([cross, *torch.broadcast_tensors(own[:, None], other[None, :])])
        self._weight += weight
        self._squares += weight**2
        self._means += weight * values
        self._first += weight**2 * values
        self._second += weight**2 * values[:, None] * values[None, :]

    def sum_up(self) -> None:
        """The sums of all processes, in each."""
        mine = [self._weight, self._squares, self._means, self._first, self._second]
        self._weight, self._squares, self._means, self._first, self._second = processes.totals(mine)

    def ratio(self, batches: int) -> tuple[Tensor, Tensor | None]:
        """The ratio of the means, and half the width of its 95 % interval (delta method, Student's t)."""
        from scipy import stats

        mean = self._means / self._weight
        value = _ratio(*mean)
        if batches < 2:
            return value, None
        outer = mean[:, None] * mean[None, :]
        cross = self._first[:, None] * mean[None, :]
        scatter = self._second - cross - cross.transpose(0, 1) + self._squares * outer
        covariance = scatter / self._weight**2 * batches / (batches - 1)
        flat = (mean[1] <= 0) | (mean[2] <= 0)
        own, other = mean[1].masked_fill(flat, 1.0), mean[2].masked_fill(flat, 1.0)
        gradient = torch.stack([(own * other).rsqrt(), -value / (2 * own), -value / (2 * other)]).masked_fill(flat, 0.0)
        variance = torch.einsum("irc,ijrc,jrc->rc", gradient, covariance, gradient).clamp(min=0)
        return value, float(stats.t.ppf(0.975, batches - 1)) * variance.sqrt()


def centred_gram(features: Tensor) -> Tensor | None:
    """Inner products (n, n) of the features after subtracting their mean over images, float64 on the CPU; None for constant features.

    The mean does not affect the HSIC of any kernel; subtracting it first avoids cancellation.
    """
    flat = features.detach().flatten(1)
    if flat.device.type == "mps":  # MPS has no float64
        flat = flat.cpu()
    gram = flat.new_zeros(len(flat), len(flat), dtype=torch.float64)
    whole = 0.0
    for part in flat.split(_CHUNK, dim=1):  # converting all features to float64 at once would need twice their memory
        part = part.double()
        whole += part.square().sum().item()
        part = part - part.mean(dim=0)
        gram += part @ part.mT
    return gram.cpu() if gram.trace().item() > _FLAT * whole else None


def _scale(gram: Tensor, bandwidth: float) -> float:
    """σ: `bandwidth` times the median distance between different images."""
    first, second = torch.triu_indices(len(gram), len(gram), 1)
    distances = _squared_distances(gram)[first, second]
    apart = distances[distances > _FLAT * gram.diagonal().max()]  # many images may coincide, e.g. with sparse features
    return bandwidth * apart.median().item() ** 0.5


def _squared_distances(gram: Tensor) -> Tensor:
    own = gram.diagonal()
    return (own[:, None] + own[None, :] - 2 * gram).clamp(min=0)


def _kernel(gram: Tensor, kernel: Kernel, scale: float) -> Tensor:
    if kernel == "linear":
        return gram
    return torch.exp(-_squared_distances(gram) / (2 * scale**2))


def _doubly_centred(k: Tensor) -> Tensor:
    """`H K H`: the sum of the products of two such matrices is the biased HSIC times (n − 1)²."""
    return k - k.mean(0, keepdim=True) - k.mean(1, keepdim=True) + k.mean()


def _u_centred(k: Tensor) -> Tensor:
    """Székely and Rizzo's U-centred matrix (n, n): the sum of the products of two such matrices is the unbiased HSIC times n(n − 3)."""
    n = len(k)
    k = k - torch.diag(k.diagonal())
    rows = k.sum(0) / (n - 2)
    k = k - rows[:, None] - rows[None, :] + k.sum() / ((n - 1) * (n - 2))
    return k - torch.diag(k.diagonal())


def _ratio(cross: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """`cross` divided by the geometric mean of the other two; 0 if one of those is not positive."""
    flat = (own <= 0) | (other <= 0)
    return (cross / own.masked_fill(flat, 1.0).sqrt() / other.masked_fill(flat, 1.0).sqrt()).masked_fill(flat, 0.0)


def _require_usable(name: str, features: Tensor, count: int, least: int) -> None:
    if features.ndim < 2:
        raise UserError(f"CKA: {name} has the shape {tuple(features.shape)}; it takes (images, features)")
    if len(features) != count:
        raise UserError(
            f"CKA: {name} has the features of {len(features)} images, and another layer those of {count}; both must see the same images"
        )
    if count < least:
        raise UserError(f"CKA: {count} images are too few; it needs at least {least}, better some hundreds")
    if not torch.isfinite(features).all():
        bad = (~torch.isfinite(features)).sum().item()
        raise UserError(
            f"CKA: {name} has {bad} features that are not finite; check the weights of the model up to there"
        )
