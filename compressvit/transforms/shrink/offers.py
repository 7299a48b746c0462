"""What every attention and every MLP of a backbone can become, with the price of each form and the error of the model's output it costs.

Errors are those of the closed forms, in the Gauss–Newton metric of the model's output (`compressvit.fitting.lowrank`), so that those of all
parts add up: over the layers, over the neurons or dimensions that go and the ranks of what is left, and over the tokens of an image.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from compressvit.fitting.hull import Forms
from compressvit.fitting.lowrank import Metric, Tensor, cholesky, left_out, singular_values
from compressvit.transforms.narrow.fit import TeacherBlock, factor_of, narrow_heads, restricted
from compressvit.transforms.narrow.form import BlockForm
from compressvit.transforms.narrow.places import FC1, FC2, PROJ, QKV
from compressvit.transforms.shrink.prices import Prices, rank_price

PARTS = 8  # widths that are tried, in eighths of the teacher's
RANKS = 24  # ranks that are tried, of a layer


@dataclass(frozen=True)
class Methods:
    """What may be done.

    Attributes:
        neurons, head_dim, heads, rank: whether each may be reduced.
        multiple: widths and ranks are multiples of it where they can be.
        pivoted: the form of low-rank layers.
    """

    neurons: bool = True
    head_dim: bool = True
    heads: bool = True
    rank: bool = True
    multiple: int = 8
    pivoted: bool = True


def widths(whole: int, multiple: int) -> list[int]:
    """Eighths of a width, rounded to multiples, the largest first."""
    step = multiple if whole >= 2 * multiple else 1
    found = {max(step, round(whole * part / PARTS / step) * step) for part in range(1, PARTS)}
    return [whole, *sorted((width for width in found if width < whole), reverse=True)]


@dataclass(frozen=True)
class _Way:
    """One way for one layer to be: dense, or of a rank."""

    rank: int | None
    numbers: int
    error: float


def _ways(weight: Tensor, centred: Tensor, outer: Tensor | None, ridge: float, methods: Methods) -> list[_Way]:
    """The ways of a layer of this (narrowed) weight (out, in)."""
    outputs, inputs = weight.shape
    found = [_Way(None, outputs * inputs, 0.0)]
    if not methods.rank:
        return found
    left = left_out(singular_values(Metric(cholesky(centred, ridge), outer).weigh(weight))).tolist()
    most = min(outputs, inputs)
    step = (
        max(1, most // RANKS // methods.multiple) * methods.multiple
        if most >= 4 * methods.multiple
        else max(1, most // RANKS)
    )
    for rank in range(step, most, step):
        if (numbers := rank_price(outputs, inputs, rank, methods.pivoted)) < outputs * inputs:
            found.append(_Way(rank, numbers, left[rank]))
    return found


def _forms(
    bases: Iterable[tuple[BlockForm, float, int, float, dict[str, list[_Way]]]], tokens: int, prices: Prices
) -> Forms[BlockForm]:
    """All combinations of the ways of two layers, for each narrower base.

    Args:
        bases: a form, its error, its further parameters and further multiply-accumulates, and the ways of its two layers.
    """
    forms: list[BlockForm] = []
    rows: list[np.ndarray] = []
    errors: list[float] = []
    for base, error, parameters, products, ways in bases:
        (first, ones), (second, others) = ways.items()
        for one in ones:
            for other in others:
                ranks = {name: way.rank for name, way in ((first, one), (second, other)) if way.rank is not None}
                forms.append(base.model_copy(update={"ranks": ranks}))
                numbers = one.numbers + other.numbers
                rows.append(prices.row(numbers + parameters, numbers * tokens + products))
                errors.append(tokens * (error + one.error + other.error))
    return Forms(forms, np.array(rows), np.array(errors)).efficient()


def of_mlp(teacher: TeacherBlock, prices: Prices, methods: Methods) -> Forms[BlockForm]:
    """The forms of an MLP: fewer neurons, and the rank of each of its layers."""
    place, ridge = teacher.place, teacher.settings.ridge
    sizes = widths(place.neurons, methods.multiple) if methods.neurons else [place.neurons]
    removals = teacher.neurons(*sizes)
    inputs, centred, hidden = teacher.weight(FC1), teacher.centred(FC1), teacher.centred(FC2)
    metric = teacher.metric(FC1)
    bases = []
    for size in sizes:
        removal = removals[size]
        rows = place.rows(removal.kept)
        outer = factor_of(restricted(metric, rows))
        kept = removal.kept
        ways = {
            FC1: _ways(inputs[rows], centred, outer, ridge, methods),
            FC2: _ways(removal.weight, hidden[kept][:, kept], None, ridge, methods),
        }
        form = BlockForm(neurons=None if size == place.neurons else size)
        biases = len(rows) * (teacher.bias(FC1) is not None) + len(removal.weight) * (teacher.bias(FC2) is not None)
        bases.append((form, removal.error, biases, 0.0, ways))
    return _forms(bases, prices.tokens[teacher.path(FC1)], prices)


def of_attention(teacher: TeacherBlock, prices: Prices, methods: Methods) -> Forms[BlockForm]:
    """The forms of an attention: fewer dimensions of every head, fewer heads, and the rank of each of its layers."""
    place = teacher.place
    moments = teacher.moments(QKV)
    weight, bias = teacher.weight(QKV), teacher.bias(QKV)
    centred = teacher.centred(QKV)
    biases = teacher.bias(PROJ)
    bases = []
    for heads, size in _head_sizes(teacher, methods):
        form = BlockForm(
            heads=None if heads == place.heads else heads, head_dim=None if size == place.head_dim else size
        )
        found = narrow_heads(teacher, form, weight, bias, moments.inputs, moments.mean)
        outer = teacher.outer(PROJ)
        projection = found.projection if outer is None else outer.mT @ found.projection
        ways = {
            QKV: _ways(found.weight, centred, factor_of(found.metric), teacher.settings.ridge, methods),
            PROJ: _ways(projection, found.values, None, teacher.settings.ridge, methods),
        }
        own = (0 if found.bias is None else len(found.bias)) + (0 if biases is None else len(biases))
        bases.append((form, found.error, own, float(prices.attention(place.path, heads * size)), ways))
    return _forms(bases, prices.tokens[teacher.path(QKV)], prices)


def _head_sizes(teacher: TeacherBlock, methods: Methods) -> list[tuple[int, int]]:
    place = teacher.place
    sizes = [(place.heads, place.head_dim)]
    if methods.head_dim and "head_dim" in place.options:
        sizes += [(place.heads, size) for size in widths(place.head_dim, methods.multiple)[1:]]
    if methods.heads and "heads" in place.options:
        counts = range(place.heads - 1, place.heads // 4, -1)
        teacher.heads(*counts)
        sizes += [(count, place.head_dim) for count in counts]
    return sizes


def offers(teacher: TeacherBlock, prices: Prices, methods: Methods) -> dict[str, Forms[BlockForm]]:
    """The forms of a block's attention and MLP, by path."""
    found: dict[str, Forms[BlockForm]] = {}
    if teacher.place.options:
        found[teacher.path("attn")] = of_attention(teacher, prices, methods)
    if teacher.place.neurons:
        found[teacher.path("mlp")] = of_mlp(teacher, prices, methods)
    return found
