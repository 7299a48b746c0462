"""Where a budget goes, against the lower convex envelope found point by point."""

from __future__ import annotations

import itertools
import random

import pytest

from compressvit.fitting.allocate import Curve, allocate, least_cost, uniform


def curve(seed: int, *, dense: bool) -> Curve:
    """Errors that fall by less and less, as those of singular values do, and a dense cost that need not be a multiple of a rank's."""
    rng = random.Random(seed)
    squares = sorted((rng.random() ** 3 for _ in range(6)), reverse=True)
    errors = [sum(squares[i:]) for i in range(7)]
    return Curve(
        costs=range(0, 21, 3),
        least=int(dense),
        most=6,
        dense=rng.choice((8, 10, 11, 14)) if dense else None,
        errors=errors,
    )


def envelope(one: Curve) -> list[tuple[int, float, int | None]]:
    """The points (cost, error, rank) that no line between two others passes below (or through)."""
    points: list[tuple[int, float, int | None]] = [
        (one.costs[rank], one.errors[rank], rank)
        for rank in range(one.least, one.most + 1)
        if one.dense is None or one.costs[rank] < one.dense
    ]
    if one.dense is not None:
        points.append((one.dense, 0.0, None))

    def below(point: tuple[int, float, int | None]) -> bool:
        x, y, _ = point
        return any(
            a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0]) <= y for a in points for b in points if a[0] < x < b[0]
        )

    return [point for point in points if not below(point)]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_one_layer_gets_the_least_error_that_it_can_pay(seed, dense):
    """Also where that is between two points of its envelope."""
    one = curve(seed, dense=dense)
    points = envelope(one)
    assert len(points) >= 2
    for limit in range(points[0][0], points[-1][0] + 3):
        ranks = [rank for rank in range(one.least, one.most + 1) if one.costs[rank] <= limit]
        expected = None if one.dense is not None and one.dense <= limit else ranks[-1]
        assert allocate({"one": one}, limit) == {"one": expected}, limit


@pytest.mark.parametrize("seed", range(12))
def test_of_several_layers_every_step_is_the_steepest(seed):
    """Where the steepest steps of all envelopes come to just the limit, no other choice leaves less."""
    curves = {f"layer{i}": curve(10 * seed + i, dense=i % 2 == 0) for i in range(3)}
    points = {name: envelope(one) for name, one in curves.items()}
    steps = sorted(
        (
            ((b[1] - a[1]) / (b[0] - a[0]), name, b)
            for name, found in points.items()
            for a, b in itertools.pairwise(found)
        ),
        key=lambda step: step[0],
    )
    chosen = {name: found[0] for name, found in points.items()}
    assert sum(point[0] for point in chosen.values()) == least_cost(curves)
    for _, name, point in steps:
        chosen[name] = point
        limit = sum(p[0] for p in chosen.values())
        assert allocate(curves, limit) == {name: p[2] for name, p in chosen.items()}


def test_prices_that_rise_by_less_and_less_are_spent_to_the_last_rank():
    """The price r (m + n) − r² of a pivoted layer bends the curve of error against cost, whose envelope then passes over ranks."""
    between = 0
    for seed in range(6):
        curves = {}
        for name in "ab":
            errors = curve(2 * seed + (name == "b"), dense=False).errors
            curves[name] = Curve(costs=[r * (14 - r) for r in range(7)], least=1, most=6, dense=48, errors=errors)
        steps = {name: {rank for _, _, rank in envelope(one)} for name, one in curves.items()}
        for limit in range(26, 97):
            ranks = allocate(curves, limit)
            spent = sum(curves[name].cost(rank) for name, rank in ranks.items())
            assert spent <= limit
            between += any(rank not in steps[name] for name, rank in ranks.items())
            for name, rank in ranks.items():
                if rank is not None:
                    one = curves[name]
                    next_cost = one.dense if rank + 1 == one.most else one.cost(rank + 1)
                    assert spent - one.cost(rank) + next_cost > limit, "another rank of one layer was to be had"
    assert between > 20


@pytest.mark.parametrize("limit", range(8, 40, 3))
def test_uniform_ranks_are_the_same_share_of_every_layer_and_spend_what_there_is(limit):
    curves = {
        "small": Curve(costs=range(5), least=0, most=4, dense=None, errors=[0.0] * 5),
        "large": Curve(costs=range(0, 34, 2), least=1, most=16, dense=None, errors=[0.0] * 17),
    }
    ranks = uniform(curves, limit)
    cost = ranks["small"] + 2 * ranks["large"]
    assert cost <= limit
    if ranks != {"small": 4, "large": 16}:
        assert limit - cost < 2, "another step of either would be too much"
        assert abs(ranks["small"] / 4 - ranks["large"] / 16) <= 0.25, "but for rounding"
