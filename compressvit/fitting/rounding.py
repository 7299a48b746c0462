"""Weights rounded to few bits, so that what a layer computes changes least.

Of every row of a weight, inputs in groups share a scale: `w ≈ (code − 2^(bits − 1)) · scale`, with a scale of either sign, so that the one
level that there is more on one side stands where it is needed. Rounded one by one, codes are the nearest. With error feedback (GPTQ,
ICLR 2023, https://arxiv.org/abs/2210.17323) inputs are rounded one after the other, those with the largest moment first, and what each
loses is made up for by those that follow, in the metric of the inputs' moment H: `‖(W − Ŵ) H^½‖²`. Scales and codes are then improved in
turns, each for the other held fixed: scales by least squares, codes one input at a time (as QuantEase does,
https://arxiv.org/abs/2309.01885), so that no round makes the error of a row larger.

All of it is on the CPU, the factorisation in float64, the rest in float32.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F

from compressvit.fitting.lowrank import Tensor, cholesky

_BLOCK = 64  # inputs that are rounded before what they lost is added to all that follow
_STEPS, _LEAST = 24, 0.4  # scales that are tried, down to this part of the one with which nothing is cut off
_SMALLEST = 6e-8  # of float16
_NOTHING = 1e-30  # the mean square of inputs that are always the same


class Codes(NamedTuple):
    """A rounded weight.

    Attributes:
        codes: (out, in) uint8, from 0 to 2^bits − 1.
        scales: (out, groups) float16.
    """

    codes: Tensor
    scales: Tensor


def groups_of(inputs: int, group: int) -> tuple[int, int]:
    """How many groups of at most `group` inputs there are, and the size of one: as equal as can be, the last one filled up with nothing."""
    count = -(-inputs // group)
    return count, -(-inputs // count)


def values_of(found: Codes, bits: int, group: int) -> Tensor:
    """The weight (out, in) of codes, in float32."""
    inputs = found.codes.shape[1]
    return (found.codes.float() - 2 ** (bits - 1)) * _spread(found.scales.float(), groups_of(inputs, group)[1], inputs)


def nearest(weight: Tensor, bits: int, group: int, importance: Tensor | None = None) -> Codes:
    """Round every number by itself.

    Args:
        weight: (out, in).
        bits: from 2 to 8.
        group: inputs that share a scale.
        importance: of errors at each input, (in,), by which scales are chosen; None: all alike.
    """
    weight = weight.float()
    scales = _scales(weight, bits, group, importance)
    whole = _spread(scales, groups_of(weight.shape[1], group)[1], weight.shape[1])
    return _codes(_round(weight, whole, bits), scales, bits)


class Feedback:
    """Rounds weights in the metric of one moment, which is factorised once.

    Args:
        moment: E[xᵀx] of the inputs (in, in), or of their deviations from the mean where a bias is fitted afterwards.
        ridge: added to its diagonal, in parts of the mean.
    """

    def __init__(self, moment: Tensor, ridge: float):
        moment, one = moment.cpu().double(), torch.eye(len(moment), dtype=torch.float64)
        level = moment.diagonal().mean().item()
        self._moment, self._ridge = (moment / level if level > _NOTHING else one), ridge
        self.metric = (self._moment + ridge * one).float()

    @cached_property
    def _order(self) -> Tensor:
        return self._moment.diagonal().argsort(descending=True)

    @cached_property
    def _factor(self) -> Tensor:
        """The upper factor of the inverse moment, with inputs in the order in which they are rounded."""
        ordered = self._moment[self._order][:, self._order]
        inverse = torch.cholesky_inverse(cholesky(ordered, self._ridge))
        return cholesky(inverse, 0.0).mT.contiguous().float()

    def round(self, weight: Tensor, bits: int, group: int, sweeps: int) -> Codes:
        """Round a weight.

        Args:
            weight: (out, in).
            bits: from 2 to 8.
            group: inputs that share a scale.
            sweeps: rounds in which scales and codes are improved.
        """
        weight = weight.float()
        size = groups_of(weight.shape[1], group)[1]
        scales = _scales(weight, bits, group, self.metric.diagonal())
        codes = self._fed_back(weight, _spread(scales, size, weight.shape[1]), bits)
        for _ in range(sweeps):
            scales = self._better_scales(weight, codes, scales, size)
            codes = self._better_codes(weight, codes, _spread(scales, size, weight.shape[1]), bits)
        return _codes(codes, scales, bits)

    def squared_errors(self, lost: Tensor) -> Tensor:
        """Of each row of an error (out, in): (out,)."""
        return ((lost @ self.metric) * lost).sum(dim=1)

    def _fed_back(self, weight: Tensor, scales: Tensor, bits: int) -> Tensor:
        """Codes (out, in) around 0, each input rounded after what those before it lost was added to it."""
        order, factor = self._order, self._factor
        left, scales = weight[:, order], scales[:, order]
        codes = torch.empty_like(left)
        for start in range(0, left.shape[1], _BLOCK):
            end = min(start + _BLOCK, left.shape[1])
            part, lost = left[:, start:end], torch.empty(len(left), end - start)
            for j in range(end - start):
                i = start + j
                codes[:, i] = _round(part[:, j], scales[:, i], bits)
                lost[:, j] = (part[:, j] - codes[:, i] * scales[:, i]) / factor[i, i]
                part[:, j + 1 :] -= lost[:, j, None] * factor[i, i + 1 : end]
            left[:, end:] -= lost @ factor[start:end, end:]
        return codes[:, order.argsort()]

    def _better_scales(self, weight: Tensor, codes: Tensor, scales: Tensor, size: int) -> Tensor:
        """The best scales (out, groups) for given codes, in the rows where they are better than those that are there."""
        groups, inputs = scales.shape[1], weight.shape[1]

        def by_group(products: Tensor) -> Tensor:
            return F.pad(products, (0, groups * size - inputs)).unflatten(1, (groups, size)).sum(dim=2)

        right = by_group((weight @ self.metric) * codes)
        left = torch.empty(len(weight), groups, groups)
        for i in range(groups):
            own = slice(i * size, min((i + 1) * size, inputs))
            left[:, i] = by_group((codes[:, own] @ self.metric[own]) * codes)
        left = (left + left.mT).double() / 2
        level = 1e-6 * left.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=1e-30)
        left = left + level[:, None, None] * torch.eye(groups, dtype=torch.float64)
        found = torch.linalg.solve(left, right.double()).half().float()
        found = torch.where(found.abs() < _SMALLEST, scales, found)
        before, after = (
            self.squared_errors(weight - codes * _spread(those, size, inputs)) for those in (scales, found)
        )
        return torch.where((after < before)[:, None], found, scales)

    def _better_codes(self, weight: Tensor, codes: Tensor, scales: Tensor, bits: int) -> Tensor:
        """The codes (out, in) after each input has once been given the best ones beside all others."""
        codes, metric = codes.clone(), self.metric
        slope = (weight - codes * scales) @ metric
        for start in range(0, weight.shape[1], _BLOCK):
            end = min(start + _BLOCK, weight.shape[1])
            part, moved = slope[:, start:end].clone(), torch.empty(len(weight), end - start)
            for j in range(end - start):
                i = start + j
                best = _round(codes[:, i] * scales[:, i] + part[:, j] / metric[i, i], scales[:, i], bits)
                moved[:, j] = (best - codes[:, i]) * scales[:, i]
                codes[:, i] = best
                part -= moved[:, j, None] * metric[i, start:end]
            slope -= moved @ metric[start:end]
        return codes


def _scales(weight: Tensor, bits: int, group: int, importance: Tensor | None) -> Tensor:
    """The scales (out, groups) with which the nearest codes lose least, as float16 has them."""
    outputs, inputs = weight.shape
    groups, size = groups_of(inputs, group)
    parts = F.pad(weight, (0, groups * size - inputs)).view(outputs, groups, size)
    counts = torch.ones(inputs) if importance is None else importance.float()
    counts = F.pad(counts, (0, groups * size - inputs)).view(1, groups, size)
    widest = parts.abs().amax(dim=2, keepdim=True) / (2 ** (bits - 1) - 0.5)
    found, least = widest.new_zeros(widest.shape), torch.full_like(widest, torch.inf)
    for step in range(_STEPS):
        size_of_step = (widest * (1 - (1 - _LEAST) * step / _STEPS)).half().float().clamp(min=_SMALLEST)
        for scale in (size_of_step, -size_of_step):
            lost = ((parts - _round(parts, scale, bits) * scale).square() * counts).sum(dim=2, keepdim=True)
            found, least = torch.where(lost < least, scale, found), torch.minimum(lost, least)
    return found.squeeze(2)


def _round(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest codes, around 0."""
    return (values / scales).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _spread(scales: Tensor, size: int, inputs: int) -> Tensor:
    """The scale of every input, (out, in)."""
    return scales.repeat_interleave(size, dim=1)[:, :inputs]


def _codes(around_zero: Tensor, scales: Tensor, bits: int) -> Codes:
    return Codes((around_zero + 2 ** (bits - 1)).to(torch.uint8), scales.half())
