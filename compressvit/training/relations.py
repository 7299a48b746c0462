"""The arithmetic of the relation losses: value and gradient of the student in one pass, in pieces that fit in a cache.

A relation compares every token with every other, but its gradient has the size of the tokens. So both functions compute that gradient
while they have the relations of a piece (some windows, images or heads, or some rows of them), and keep it alone: no relation and no graph
outlives the forward pass, and the backward pass is one multiplication. Where nothing asks for a gradient, none is computed. There is no
second derivative.

Half precision: a gradient is kept in the student's dtype, without the factor of the mean, which would leave float16's range.
A GPU has the same form with larger pieces; flash or flex attention is not used.

Shapes: B batch, N tokens, H relation heads, D = C / H, G = some of the B·H groups, M = tokens of all parts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from compressvit.errors import UserError

# Elements of a matrix that is computed at once: 1 MiB of float32, so that the few that a piece needs stay in the cache of a processor,
# and on a GPU, where a piece must keep all units busy, 64 MiB.
_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}
_LEAST_NORM = 1e-12  # as in F.normalize


def cross_entropy(
    student: Sequence[Tensor], teacher: Sequence[Tensor], heads: int, with_kl: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the rows of `softmax(X Yᵀ / sqrt(D))`, of the student against the teacher, over all ordered pairs (X, Y).

    Args:
        student: tensors (B, N, C_student), which may differ in N.
        teacher: as many tensors (B, N, C_teacher), with the student's B and N of each; no gradient reaches them.
        heads: H, which divides both widths.
        with_kl: compute the KL divergence, too.

    Returns:
        The mean over pairs, batch, heads and rows, and the KL divergence, which is detached; 0 without `with_kl`.

    Products run in the inputs' dtype or the one chosen by autocast, all else in at least float32. Where N exceeds D of both, no matrix has
    N×N elements.
    """
    if torch.is_grad_enabled() and any(part.requires_grad for part in student):
        found: tuple[Tensor, Tensor] = _CrossEntropy.apply(
            [part.detach() for part in teacher], heads, with_kl, *student
        )
        return found
    relations = _Relations(student, [part.detach() for part in teacher], heads)
    loss, kl, _ = relations.compare(with_kl, gradient=False)
    return loss * relations.weight, kl * relations.weight


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """`Σ (Ŝ Ŝᵀ − T̂ T̂ᵀ)² / N` over the batch, with the L2-normalised tokens of (B, N, C_student) and (B, N, C_teacher).

    Computed in at least float32. No matrix is larger than N×C or, where N is at most the larger C, N×N.
    """
    if torch.is_grad_enabled() and student.requires_grad:
        found: Tensor = _SquaredDistance.apply(student, teacher.detach())
        return found
    return _distances(student, teacher, None)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, teacher: list[Tensor], heads: int, with_kl: bool, *student: Tensor) -> tuple[Tensor, Tensor]:
        relations = _Relations(student, teacher, heads)
        loss, kl, gradients = relations.compare(with_kl, gradient=True)
        ctx.save_for_backward(*gradients)
        ctx.weight = relations.weight
        kl = kl * relations.weight
        ctx.mark_non_differentiable(kl)
        return loss * relations.weight, kl

    @staticmethod
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(_times(gradient, outer * ctx.weight) for gradient in ctx.saved_tensors)


class _SquaredDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
        distance = _distances(student, teacher, gradient)
        ctx.save_for_backward(gradient)
        ctx.weight = student.shape[1] ** -0.5
        return distance

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return _times(gradient, outer * ctx.weight), None


def _times(gradient: Tensor, factor: Tensor) -> Tensor:
    """The product, rounded once: a factor of a mean may be too small for float16.

    Raises:
        UserError: a second derivative is asked for, which would lack what the relations contribute.
    """
    if torch.is_grad_enabled():
        raise UserError(
            "relation losses have no second derivative, which create_graph=True asks for, because they keep their gradient and no graph; "
            "leave them out of what is differentiated twice"
        )
    return (gradient.to(factor.dtype) * factor).to(gradient.dtype)


class _Relations:
    """The relations among parts (B, N, C) of the student and of the teacher, one tensor each or queries, keys and values.

    A piece stacks all parts of its groups into X (G, M, D): `X Xᵀ` has the logits of all pairs, and its gradient, which is the sum of what
    comes through rows and columns, is one more product.

    Attributes:
        weight: of a row in the mean.
    """

    def __init__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], heads: int):
        self.student, self.teacher, self.heads = student, teacher, heads
        self.sizes = [part.shape[1] for part in student]
        self.tokens, self.batch = sum(self.sizes), student[0].shape[0]
        widths = [side[0].shape[-1] // heads for side in (student, teacher)]
        # With at most as many rows as the narrower model has columns, logits are no larger than the tokens.
        self.rows = self.tokens if max(self.sizes) <= max(widths) else min(widths)
        self.weight = 1 / (len(student) ** 2 * self.batch * heads * self.sizes[0])
        self.alike = len(set(self.sizes)) == 1

    def compare(self, with_kl: bool, gradient: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Sums of cross-entropy and KL over rows, and the gradient of the first of each part of the student, empty without `gradient`."""
        device, sums = self.student[0].device, []
        into = [torch.empty_like(s, memory_format=torch.contiguous_format) for s in self.student] if gradient else []
        row_weights = None
        if not self.alike:  # a row of fewer counts more in the mean
            dtype = torch.promote_types(self.student[0].dtype, torch.float32)
            of_parts = [torch.full((n, 1), self.sizes[0] / n, device=device, dtype=dtype) for n in self.sizes]
            row_weights = torch.cat(of_parts)
        for images, chosen in self._groups(_at_once(device) // (self.rows * self.tokens)):
            s, t = (_stacked(side, self.heads, images, chosen) for side in (self.student, self.teacher))
            slopes = None
            for start in range(0, self.tokens, self.rows):
                rows = slice(start, start + self.rows)
                weights = None if row_weights is None else row_weights[rows]
                *values, difference = self._piece(s, t, rows, weights, with_kl)
                sums.append(values)
                if gradient:
                    slopes = _slopes(difference, s, rows, slopes)
                del difference
            if slopes is not None:
                slopes *= s.shape[-1] ** -0.25
                for whole, part in zip(into, self._by_part(slopes, images), strict=True):
                    whole.unflatten(-1, (self.heads, -1))[images, :, chosen] = part
        loss, kl = (torch.stack(values).sum() for values in zip(*sums, strict=True))
        return loss, kl, into

    def _groups(self, count: int) -> Iterator[tuple[slice, slice]]:
        """Images and heads, of about `count` groups at a time."""
        images = max(1, count // self.heads)
        heads = self.heads if count >= self.heads else max(1, count)
        for start in range(0, self.batch, images):
            for head in range(0, self.heads, heads):
                yield slice(start, start + images), slice(head, head + heads)

    def _by_part(self, slopes: Tensor, images: slice) -> list[Tensor]:
        """Of (G, M, D), the parts (images, N, heads, D)."""
        count = len(range(self.batch)[images])
        return [part.transpose(1, 2) for part in slopes.unflatten(0, (count, -1)).split(self.sizes, dim=2)]

    def _piece(
        self, s: Tensor, t: Tensor, rows: slice, weights: Tensor | None, with_kl: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of some rows, the sums of cross-entropy and KL, and the gradient of the first by the student's logits (G, rows, M)."""
        log_student, log_teacher = (self._log_softmax(x[:, rows] @ x.mT) for x in (s, t))
        probabilities = log_teacher.exp()
        if weights is not None:
            probabilities *= weights
        loss = -(probabilities * log_student).sum()
        # Elementwise rather than as loss − entropy, so that equal relations give exactly 0.
        kl = log_teacher.sub_(log_student).mul_(probabilities).sum() if with_kl else torch.zeros_like(loss)
        difference = log_student.exp_()
        if weights is not None:
            difference *= weights
        return loss, kl, difference.sub_(probabilities)

    def _log_softmax(self, logits: Tensor) -> Tensor:
        """Over the tokens of each part, of logits (G, rows, M)."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        if self.alike:
            return logits.unflatten(-1, (len(self.sizes), -1)).log_softmax(-1, dtype=dtype).flatten(-2)
        return torch.cat([part.log_softmax(-1, dtype=dtype) for part in logits.split(self.sizes, dim=-1)], dim=-1)


def _stacked(parts: Sequence[Tensor], heads: int, images: slice, chosen: slice) -> Tensor:
    """Parts of some images and heads below each other, (G, M, D), scaled so that their products are divided by sqrt(D).

    Scaling before the product keeps float16 logits in range.
    """
    views = [part[images].unflatten(-1, (heads, -1))[:, :, chosen].transpose(1, 2) for part in parts]
    stacked = torch.cat(views, dim=2).flatten(0, 1)
    return stacked.mul_(stacked.shape[-1] ** -0.25)


def _slopes(difference: Tensor, tokens: Tensor, rows: slice, before: Tensor | None) -> Tensor:
    """The gradient (G, M, D) by tokens, of the gradient (G, rows, M) by logits, added to that of the rows `before`."""
    if difference.shape[-2] == difference.shape[-1]:
        both = difference + difference.mT
        return (both.to(tokens.dtype) @ tokens).to(difference.dtype)
    difference = difference.to(tokens.dtype)
    slopes = difference.mT @ tokens[:, rows]
    slopes = slopes.to(torch.promote_types(slopes.dtype, torch.float32)) if before is None else before.add_(slopes)
    slopes[:, rows] += difference @ tokens
    return slopes


def _distances(student: Tensor, teacher: Tensor, gradient: Tensor | None) -> Tensor:
    """`squared_distance`; its gradient by the student, times √N, is written into `gradient`: for many tokens of any length that is in
    float16's range."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    batch, tokens, width = student.shape
    at_once = max(1, _at_once(student.device) // (tokens * width))
    found = []
    for start in range(0, batch, at_once):
        images = slice(start, start + at_once)
        s, t = student[images].to(dtype), teacher[images].to(dtype)
        length = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
        divisor = length.clamp(min=_LEAST_NORM)
        s, t = s / divisor, t / torch.linalg.vector_norm(t, dim=-1, keepdim=True).clamp(min=_LEAST_NORM)
        distance, slopes = _distance(s, t, gradient is not None)
        found.append(distance / tokens)
        if gradient is not None:
            assert slopes is not None, "as asked for"
            # a token shorter than the least norm is divided by a constant
            along = torch.where(length >= _LEAST_NORM, (s * slopes).sum(dim=-1, keepdim=True), 0)
            gradient[images] = slopes.addcmul_(s, along, value=-1).div_(divisor * tokens**0.5)
    return torch.stack(found).sum()


def _distance(s: Tensor, t: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """`Σ (S Sᵀ − T Tᵀ)²` of (B, N, C_student) and (B, N, C_teacher), and, if asked for, its gradient by S, `4 (S Sᵀ − T Tᵀ) S`."""
    tokens, widths = s.shape[-2], (s.shape[-1], t.shape[-1])
    if widths[0] == widths[1]:
        # S Sᵀ − T Tᵀ = (E Pᵀ + P Eᵀ)/2 with E = S − T and P = S + T. Every term contains E, so for a student close to its
        # teacher, the goal of distillation, the result is not a small difference of large numbers.
        error, total = s - t, s + t
        if tokens <= widths[0]:
            half = error @ total.mT
            return _of_matrix((half + half.mT) / 2, s, gradient)
        cross, errors, totals = error.mT @ total, error.mT @ error, total.mT @ total
        distance = ((errors * totals).sum() + (cross * cross.mT).sum()) / 2
        return distance, error @ (totals + cross.mT) + total @ (errors + cross) if gradient else None
    if tokens <= max(widths):
        return _of_matrix(s @ s.mT - t @ t.mT, s, gradient)
    own, cross = s.mT @ s, s.mT @ t
    distance = own.square().sum() + (t.mT @ t).square().sum() - 2 * cross.square().sum()
    return distance, (s @ own - t @ cross.mT).mul_(4) if gradient else None


def _of_matrix(difference: Tensor, s: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    return difference.square().sum(), (difference @ s).mul_(4) if gradient else None


def _at_once(device: torch.device) -> int:
    """How many elements a matrix of a piece may have; on the meta device, where nothing is stored, any number."""
    return sys.maxsize if device.type == "meta" else _AT_ONCE.get(device.type, _AT_ONCE["cuda"])
