"""One budget over everything that can be made smaller: each part of a model has forms, of which each has a price and an error.

The sum of the parts' errors is made as small as possible while the sum of their prices stays within a limit, in one unit or several. For
given weights of the units every part takes the form with the least error + price; the weights are the multipliers of Lagrange, found by
bisection. What is left over is then spent where it removes most.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

F = TypeVar("F")
_SHARES = 21  # weights of two units against each other that are tried


@dataclass(frozen=True)
class Forms(Generic[F]):
    """What one part of a model can become.

    Attributes:
        forms: one is the part as it is.
        prices: (forms, units).
        errors: (forms,), of the model's output, so that those of all parts add up.
    """

    forms: Sequence[F]
    prices: np.ndarray[Any, Any]
    errors: np.ndarray[Any, Any]

    def efficient(self) -> Forms[F]:
        """Without the forms than which another is better in the error and no worse in every price."""
        order = np.lexsort((*self.prices.T[::-1], self.errors))
        kept = order[_cheaper_than_before(self.prices[order])].tolist()
        return Forms([self.forms[i] for i in kept], self.prices[kept], self.errors[kept])


def _cheaper_than_before(prices: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Which rows of prices (N, units) are below every row before them in some unit, bool (N,)."""
    count, units = prices.shape
    if units == 1:
        before = np.concatenate([[np.inf], np.minimum.accumulate(prices[:, 0])[:-1]])
        return prices[:, 0] < before
    found = np.zeros(count, dtype=bool)
    if units == 2:
        # of the rows so far that none is below in both units, from the lowest first price and the highest second one
        firsts: list[float] = []
        seconds: list[float] = []
        for i, (first, second) in enumerate(prices.tolist()):
            place = bisect.bisect_right(firsts, first)
            if place and seconds[place - 1] <= second:
                continue
            found[i] = True
            end = start = bisect.bisect_left(firsts, first)
            while end < len(firsts) and seconds[end] >= second:
                end += 1
            firsts[start:end], seconds[start:end] = [first], [second]
        return found
    for i, row in enumerate(prices):
        found[i] = not (prices[:i][found[:i]] <= row).all(axis=1).any()
    return found


def least(parts: Mapping[str, Forms[Any]]) -> np.ndarray[Any, Any]:
    """The smallest price of all parts together, (units,), each unit by itself."""
    return np.sum([forms.prices.min(axis=0) for forms in parts.values()], axis=0)


def choose(parts: Mapping[str, Forms[F]], limits: Sequence[float]) -> dict[str, F] | None:
    """The form of every part with the least error of all within `limits`, one a unit; None where there is none."""
    bounds = np.asarray(limits, dtype=float)
    if (least(parts) > bounds).any():
        return None
    tables = {name: (forms.prices / np.maximum(bounds, 1e-30), forms.errors) for name, forms in parts.items()}
    found: tuple[float, dict[str, int]] | None = None
    for shares in _weights(len(bounds)):
        picked = _bisected(tables, shares)
        if picked is None:
            continue
        picked = _filled(tables, picked)
        error = sum(tables[name][1][i] for name, i in picked.items())
        if found is None or error < found[0]:
            found = error, picked
    return None if found is None else {name: parts[name].forms[i] for name, i in found[1].items()}


def _weights(units: int) -> list[np.ndarray[Any, Any]]:
    """How much the units count against each other."""
    if units == 1:
        return [np.ones(1)]
    if units == 2:
        return [np.array([share, 1 - share]) for share in np.linspace(0, 1, _SHARES)]
    draws = np.random.default_rng(0).dirichlet(np.ones(units), 4 * _SHARES)
    return [*np.eye(units), np.full(units, 1 / units), *draws]


Tables = Mapping[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]


def _bisected(tables: Tables, shares: np.ndarray[Any, Any]) -> dict[str, int] | None:
    """The best forms for the smallest multiplier with which all prices stay within 1."""
    low, high = -60.0, 60.0  # its logarithm

    def at(level: float) -> dict[str, int]:
        return {
            name: int(np.argmin(errors + np.exp(level) * (prices @ shares)))
            for name, (prices, errors) in tables.items()
        }

    if not _fits(tables, at(high)):
        return None
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if _fits(tables, at(middle)) else (middle, high)
    return at(high)


def _fits(tables: Tables, picked: Mapping[str, int]) -> bool:
    return bool((_spent(tables, picked) <= 1 + 1e-12).all())


def _spent(tables: Tables, picked: Mapping[str, int]) -> np.ndarray[Any, Any]:
    return np.sum([tables[name][0][i] for name, i in picked.items()], axis=0)


def _filled(tables: Tables, picked: dict[str, int]) -> dict[str, int]:
    """Spend what is left over, always where it removes the most error for its price."""
    picked = dict(picked)
    while True:
        left = 1 + 1e-12 - _spent(tables, picked)
        best: tuple[float, str, int] | None = None
        for name, (prices, errors) in tables.items():
            now = picked[name]
            more = prices - prices[now]
            better = (errors < errors[now]) & (more <= left).all(axis=1)
            for i in np.flatnonzero(better):
                gain = (errors[now] - errors[i]) / max(more[i].clip(min=0).sum(), 1e-12)
                if best is None or gain > best[0]:
                    best = gain, name, int(i)
        if best is None:
            return picked
        picked[best[1]] = best[2]
