"""Allocate ranks within a budget so that each parameter (or byte, or MAC) spent removes as much error as possible.

The error of a low-rank term of rank r is the sum of the squares of the singular values it leaves out, so each layer has a decreasing,
convex curve of error against cost, and always taking the steepest step over all layers is optimal except for the last step.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field, model_validator

from compressvit.errors import UnmetBudget, UserError
from compressvit.spec import Spec


class Budget(Spec):
    """What a student may cost: one of these. Up to 1 it is a fraction of the teacher's, above 1 an absolute number."""

    parameters: float | None = Field(
        None, gt=0, description="Parameters, each shared tensor once; e.g. 0.5, or 11000000."
    )
    bytes: float | None = Field(None, gt=0, description="Bytes of model.safetensors.")
    macs: float | None = Field(
        None,
        gt=0,
        description="Multiply-accumulates for one image. `low_rank` saves some; `lors`, where layers share, does not.",
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Budget:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a budget names one of parameters, bytes, macs; this one names {', '.join(given) or 'none of them'}"
            )
        return self

    @property
    def unit(self) -> str:
        """'parameters', 'bytes' or 'macs'."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    def limit(self, of_teacher: int) -> int:
        """The most that may be spent, where the teacher costs `of_teacher`."""
        value: float = getattr(self, self.unit)
        return int(value * of_teacher if value <= 1 else value)


@dataclass(frozen=True)
class Curve:
    """The cost and error of one layer by rank.

    Attributes:
        costs: cost at rank 0, 1, …, `most`, rising.
        least, most: the ranks it may have.
        dense: cost of leaving the layer as it is, without error; None where its weight is shared.
        errors: error at rank 0, 1, …, `most`, falling and convex.
    """

    costs: Sequence[int]
    least: int
    most: int
    dense: int | None
    errors: Sequence[float]

    def cost(self, rank: int | None) -> int:
        """Of a rank; None stands for the dense layer."""
        return self.dense or 0 if rank is None else self.costs[rank]


def allocate(curves: Mapping[str, Curve], limit: int) -> dict[str, int | None]:
    """The ranks that remove the most error for `limit`; None for a layer that stays dense. Ties go to the layer named first.

    The caller makes sure that the least ranks fit.
    """
    hulls = {name: _hull(curve) for name, curve in curves.items()}
    chosen: dict[str, int | None] = {name: hull[0][2] for name, hull in hulls.items()}
    left = limit - sum(curves[name].cost(rank) for name, rank in chosen.items())
    queue: list[tuple[float, int, str, int]] = []

    def offer(order: int, name: str, place: int) -> None:
        if place < len(hulls[name]):
            (cost, error, _), (more, less, _) = hulls[name][place - 1], hulls[name][place]
            heapq.heappush(queue, (-(error - less) / (more - cost), order, name, place))

    for order, name in enumerate(hulls):
        offer(order, name, 1)
    while queue:
        _, order, name, place = heapq.heappop(queue)
        price = hulls[name][place][0] - hulls[name][place - 1][0]
        if price > left:
            continue  # a cheaper step of another layer may still fit
        left -= price
        chosen[name] = hulls[name][place][2]
        offer(order, name, place + 1)
    _spend_rest(curves, chosen, left)
    return chosen


def _spend_rest(curves: Mapping[str, Curve], chosen: dict[str, int | None], left: int) -> None:
    """Spend what is left, less than the next step of any layer, on the rank between two steps that removes the most error."""
    while True:
        best: tuple[float, str, int] | None = None
        for name, rank in chosen.items():
            if rank is None:
                continue
            curve = curves[name]
            can_pay = bisect.bisect_right(curve.costs, curve.cost(rank) + left, rank, curve.most + 1) - 1
            gain = curve.errors[rank] - curve.errors[can_pay]
            if gain > 0 and (best is None or gain > best[0]):
                best = gain, name, can_pay
        if best is None:
            return
        _, name, rank = best
        left -= curves[name].cost(rank) - curves[name].cost(chosen[name])
        chosen[name] = rank


def _hull(curve: Curve) -> list[tuple[int, float, int | None]]:
    """The lower convex envelope of (cost, error, rank) of one layer, by cost."""
    points: list[tuple[int, float, int | None]] = [
        (curve.cost(rank), curve.errors[rank], rank) for rank in range(curve.least, curve.most + 1)
    ]
    if curve.dense is not None:
        points = [p for p in points if p[0] < curve.dense] + [(curve.dense, 0.0, None)]
    hull: list[tuple[int, float, int | None]] = []
    for point in points:
        while len(hull) >= 2 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _above(a: tuple, b: tuple, c: tuple) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def uniform(curves: Mapping[str, Curve], limit: int) -> dict[str, int | None]:
    """Ranks in proportion to the largest rank of each layer, for planning where errors are not known."""

    def at(share: float) -> dict[str, int]:
        return {n: min(c.most, max(c.least, int(share * c.most))) for n, c in curves.items()}

    def fits(share: float) -> bool:
        return sum(curves[n].cost(r) for n, r in at(share).items()) <= limit

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    ranks = at(1.0 if fits(1.0) else low)
    left = limit - sum(c.cost(ranks[n]) for n, c in curves.items())
    for name, curve in curves.items():  # what rounding down left over
        rank = ranks[name]
        if rank < curve.most and (step := curve.cost(rank + 1) - curve.cost(rank)) <= left:
            ranks[name] += 1
            left -= step
    return {n: None if c.dense is not None and c.cost(ranks[n]) >= c.dense else ranks[n] for n, c in curves.items()}


def least_cost(curves: Mapping[str, Curve]) -> int:
    """The smallest possible cost of the layers."""
    return sum(min(c.cost(c.least), c.cost(c.least) if c.dense is None else c.dense) for c in curves.values())


def spend(
    budget: Budget,
    curves: Mapping[str, Curve],
    *,
    fixed: int,
    of_teacher: int,
    by_error: bool,
    asker: str,
) -> dict[str, int | None]:
    """Ranks within a budget.

    Args:
        curves: what the layers offer, in the budget's unit.
        fixed: what everything else costs.
        of_teacher: what the teacher costs.
        by_error: whether the curves' errors are known; else ranks are uniform.
        asker: what messages call the step.

    Raises:
        UnmetBudget: not even the least ranks fit.
        UserError: the budget is above what the model costs anyway.
    """
    limit = budget.limit(of_teacher)
    least = fixed + least_cost(curves)
    if limit < least:
        raise UnmetBudget(
            f"{asker}: a budget of {limit:,} {budget.unit} cannot be met: the smallest that these steps reach is {least:,} "
            f"({least / of_teacher:.3f} of the teacher's {of_teacher:,}); raise it, name more targets, or share more blocks with lors"
        )
    if limit >= of_teacher:
        raise UserError(
            f"{asker}: a budget of {limit:,} {budget.unit} is no smaller than the teacher, which has {of_teacher:,}; "
            "give less, or leave the step out"
        )
    return (allocate if by_error else uniform)(curves, limit - fixed)
