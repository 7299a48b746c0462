"""Choosing the forms of all parts within limits in several units."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from compressvit.fitting.hull import Forms, choose, least


def problem(seed: int, units: int, parts: int = 4, forms: int = 6) -> dict[str, Forms[int]]:
    """Parts of which each form costs less in every unit than the one before, with falling returns and noise."""
    random = np.random.default_rng(seed)
    found = {}
    for part in range(parts):
        prices = np.cumsum(random.uniform(0.5, 1.5, (forms, units)), axis=0) * random.uniform(0.5, 2)
        errors = (
            random.uniform(1, 10)
            * np.exp(-np.arange(forms) * random.uniform(0.3, 1.5))
            * random.uniform(0.9, 1.1, forms)
        )
        errors[-1] = 0
        found[str(part)] = Forms(list(range(forms)), prices, errors)
    return found


def spent(parts, chosen):
    return np.sum([parts[name].prices[i] for name, i in chosen.items()], axis=0)


def error(parts, chosen):
    return sum(parts[name].errors[i] for name, i in chosen.items())


@pytest.mark.wide_unless(lambda units: units == 1)
@pytest.mark.parametrize("units", [1, 2, 3])
def test_it_is_near_the_best_of_all_choices(units):
    ratios = []
    for seed in range(10):
        parts = problem(seed, units)
        most = np.sum([forms.prices.max(axis=0) for forms in parts.values()], axis=0)
        limits = 0.55 * most * np.random.default_rng(seed).uniform(0.9, 1.1, units)
        chosen = choose(parts, limits)
        assert chosen is not None
        assert (spent(parts, chosen) <= limits * (1 + 1e-9)).all()
        all_of_them = (dict(zip(parts, way, strict=True)) for way in itertools.product(range(6), repeat=4))
        best = min(error(parts, way) for way in all_of_them if (spent(parts, way) <= limits).all())
        ratios.append(error(parts, chosen) / best)
    assert min(ratios) > 1 - 1e-9
    assert np.mean(ratios) < 1.15  # measured 1.03, 1.02, 1.04
    assert ratios.count(min(ratios)) >= 1


def test_all_limits_hold_and_the_whole_is_chosen_where_it_fits():
    parts = problem(0, 2)
    most = np.sum([forms.prices.max(axis=0) for forms in parts.values()], axis=0)
    assert choose(parts, most) == dict.fromkeys(parts, 5)
    tight = choose(parts, [0.5 * most[0], 10 * most[1]])
    assert tight is not None
    assert spent(parts, tight)[0] <= 0.5 * most[0]


def test_what_cannot_be_met_is_none():
    parts = problem(0, 2)
    low = least(parts)
    assert choose(parts, low * 1.0001) == dict.fromkeys(parts, 0)
    assert choose(parts, [low[0] * 0.99, low[1] * 5]) is None


def test_forms_that_others_beat_are_left_out():
    prices = np.array([[1.0, 1.0], [2.0, 1.0], [2.0, 3.0], [3.0, 0.5]])
    forms = Forms(list("abcd"), prices, np.array([5.0, 5.0, 1.0, 2.0])).efficient()
    assert sorted(forms.forms) == ["a", "c", "d"]  # b costs more than a and loses as much
