"""Attention heads with fewer dimensions: what a head computes are two products, and each has a best approximation of a lower rank.

Of queries and keys only q·k matters, so any invertible map may be put between them; of values and output projection only their product.
With d' < d dimensions a head then has

    q' = V q,  k' = Uᵀ k   with U V ≈ I (d, d), of rank d', and     v' = T v,  with R T ≈ I for the output projection W_o R.

U V is the truncated singular value decomposition of the identity in the metric of what it is applied to: the second moment of q, bias
included, on one side, and on the other the moment of the gradients at q, which says what a change of it does to the model's output. (They
are sums over keys, weighted by what the softmax lets through; without gradients the covariance of k takes their place: what is equal for
all keys leaves the softmax unchanged.) T and R are those of W_o in the metric of the values that the head averages and of the outputs.
The result is attention with a smaller head dimension. It divides its logits by √d' where the teacher divides by √d, so q' carries √(d'/d).

MoDeGPT (ICLR 2025, https://arxiv.org/abs/2408.09632) decomposes the same two products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compressvit.fitting.lowrank import TINY, Tensor, cholesky, left_out

_LEAST = 1e-6  # ridge of moments of d numbers, of which there are many tokens
_OF_GRADIENTS = 1e-2


@dataclass(frozen=True)
class HeadMaps:
    """Narrower heads in terms of the teacher's: for every head of the queries, keys and values (3, H, ·, ·), in float64.

    Attributes:
        into: y' = into y, (3, H, d', d).
        back: y ≈ back y', (3, H, d, d').
    """

    into: Tensor
    back: Tensor

    def narrow(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight (3·H·d', in) and bias (3·H·d',) of the narrower `qkv`, from those of the teacher (3·H·d, …)."""
        own = None if bias is None else self._apply(self.into, bias[:, None])[:, 0]
        return self._apply(self.into, weight), own

    def of_outputs(self, moment: Tensor) -> Tensor:
        """The moment (3·H·d', …) of gradients at the narrower outputs, from that at the teacher's: y ≈ back y'."""
        return self._apply(self.back.mT, self._apply(self.back.mT, moment).mT)

    def projection(self, weight: Tensor) -> Tensor:
        """The output projection (out, H·d') that reads narrower values, from the teacher's (out, H·d)."""
        back = torch.block_diag(*self.back[2])
        return weight @ back

    def of_values(self, moment: Tensor) -> Tensor:
        """The moment (H·d', H·d') of the averages of narrower values, from that of the teacher's."""
        into = torch.block_diag(*self.into[2])
        return into @ moment @ into.mT

    def mean_of_values(self, mean: Tensor) -> Tensor:
        """Of the averages of narrower values, (H·d',), from that of the teacher's."""
        return torch.block_diag(*self.into[2]) @ mean

    def balanced(self, weight: Tensor, bias: Tensor | None, projection: Tensor) -> HeadMaps:
        """The same function with one size for the two sides of every product: the rows of a query and a key that are multiplied, and a
        row of the values with the column of the projection that reads it. In the metrics they differ by a factor of hundreds (250 in a
        DINOv2 ViT-S/14), and then a step of an optimiser is far too large for one side.

        Args:
            weight, bias: of the teacher's `qkv`, (3·H·d, in) and (3·H·d,).
            projection: the weight of its output projection, (out, H·d).
        """
        rows, own = self.narrow(weight, bias)
        if own is not None:
            rows = torch.cat([rows, own[:, None]], dim=1)
        _, heads, size, _ = self.into.shape
        query, key, value = rows.norm(dim=1).clamp(min=TINY).reshape(3, heads, size, 1)
        column = self.projection(projection).norm(dim=0).clamp(min=TINY).reshape(heads, size, 1)
        scale = torch.stack([key / query, query / key, column / value]).sqrt()
        return HeadMaps(self.into * scale, self.back / scale.mT)

    def _apply(self, maps: Tensor, matrix: Tensor) -> Tensor:
        _, heads, _, inner = maps.shape
        return (maps @ matrix.reshape(3, heads, inner, -1)).flatten(0, 2)


@dataclass(frozen=True)
class Products:
    """The decompositions of the two products of every head of one attention, by which its heads can have any smaller dimension."""

    query: tuple[
        Tensor, Tensor, Tensor, Tensor, Tensor
    ]  # left (H, d, d), values (H, d), right, factors of both metrics (H, d, d)
    value: tuple[Tensor, Tensor, Tensor]  # values (H, d), right (H, d, d), factor of the metric

    @property
    def errors(self) -> Tensor:
        """The mean squared error of all heads with 0, 1, …, d dimensions, (d + 1,): it falls, and ends at 0."""
        return left_out((self.query[1].square() + self.value[0].square()).sum(dim=0).sqrt())

    def maps(self, size: int) -> HeadMaps:
        """The maps to heads of `size` dimensions."""
        left, values, right, outer, inner = self.query
        whole = values.shape[-1]
        root = values[:, :size].sqrt()
        down = torch.linalg.solve_triangular(inner, root[..., None] * right[:, :size], upper=False, left=False)
        up = torch.linalg.solve_triangular(outer.mT, left[:, :, :size] * root[:, None], upper=True)
        _, of_values, metric = self.value
        into = torch.linalg.solve_triangular(metric, of_values[:, :size], upper=False, left=False)
        back = metric @ of_values[:, :size].mT
        scale = (size / whole) ** 0.5
        # q' = scale V q and q ≈ U q' / scale;  k' = Uᵀ k and k ≈ Vᵀ k'
        return HeadMaps(
            torch.stack([down * scale, up.mT, into]),
            torch.stack([up / scale, down.mT, back]),
        )


def products(queries: Tensor, keys: Tensor, gradients: Tensor | None, projection: Tensor, values: Tensor) -> Products:
    """Decompose the products of all heads.

    Args:
        queries: second moments of q, (H, d, d), with the bias.
        keys: covariances of k, (H, d, d).
        gradients: moments of the gradients at q, (H, d, d); None without them.
        projection: Mᵀ W_o, (out, H·d): the output projection in whitened outputs, where the metric of the outputs is M Mᵀ.
        values: moment of the output projection's inputs, (H·d, H·d), of deviations from the mean where a bias takes that over.
    """
    heads, size, _ = queries.shape
    inner = torch.stack([cholesky(moment, _LEAST) for moment in queries])
    other = keys if gradients is None else gradients
    if gradients is None:  # only their direction counts, so that errors have the unit of what q loses
        other = other / other.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None].clamp(min=TINY)
    outer = torch.stack([cholesky(moment, _LEAST if gradients is None else _OF_GRADIENTS) for moment in other])
    left, sizes, right = torch.linalg.svd(outer.mT @ inner)
    parts = [slice(h * size, (h + 1) * size) for h in range(heads)]
    metric = torch.stack([cholesky(values[part, part], _LEAST) for part in parts])
    seen = torch.stack([projection[:, part] for part in parts]) @ metric
    _, of_values, right_values = torch.linalg.svd(seen, full_matrices=False)
    return Products((left, sizes, right, outer, inner), (of_values, right_values, metric))


def head_blocks(matrix: Tensor, heads: int) -> Tensor:
    """The blocks (H, d, d) on the diagonal of a matrix (H·d, H·d)."""
    size = len(matrix) // heads
    return torch.stack([matrix[h * size : (h + 1) * size, h * size : (h + 1) * size] for h in range(heads)])


def outputs_of(weight: Tensor, bias: Tensor | None, inputs: Tensor, mean: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The second moments (H, d, d) of q = W x + b, and the covariances of k, for inputs x.

    Args:
        weight, bias: of `qkv`, (3·H·d, in) and (3·H·d,).
        inputs, mean: E[xᵀx], (in, in), and E[x], (in,).
    """
    size = len(weight) // (3 * heads)
    of_query, of_key, _ = weight.reshape(3, heads, size, -1)
    middle = of_query @ mean
    queries = of_query @ inputs @ of_query.mT
    if bias is not None:
        own = bias.reshape(3, heads, size)[0]
        cross = middle[:, :, None] * own[:, None]
        queries = queries + cross + cross.mT + own[:, :, None] * own[:, None]
    keys = of_key @ (inputs - torch.outer(mean, mean)) @ of_key.mT
    return queries, keys
