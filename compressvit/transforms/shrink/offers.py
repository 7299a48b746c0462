"""What every attention and every MLP of a backbone can become, with the price of each form and the error of the model's output it costs.

Errors are those of the closed forms, in the Gauss–Newton metric of the model's output (`compressvit.fitting.lowrank`), so that those of all
parts add up: over the layers, over the neurons or dimensions that go and the ranks of what is left, and over the tokens of an image. Prices
need no values, so the smallest student that the forms allow is known before an image is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field

from compressvit.fitting.hull import Forms
from compressvit.fitting.lowrank import TINY, Tensor, truncation_errors
from compressvit.fitting.rounding import nearest, values_of
from compressvit.transforms.narrow.fit import narrow_heads
from compressvit.transforms.narrow.form import FC2, PROJ, BlockForm
from compressvit.transforms.narrow.places import Place
from compressvit.transforms.narrow.teacher import TeacherBlock, restricted
from compressvit.transforms.shrink.prices import Prices, Row, rank_price

PARTS = 8  # widths that are tried, in eighths of the teacher's
RANKS = 24  # ranks that are tried, of a layer
# Of the error of plain rounding, with error feedback, fitted scales and layers in order: 1 − cosine of a DINOv2 ViT-S/14 in 4 bits was
# 0.0052 instead of 0.0271 (benchmarks/quantise_dinov2.py).
_FED_BACK = 0.2


@dataclass(frozen=True)
class Methods:
    """What may be done.

    Attributes:
        neurons, head_dim, heads, rank: whether each may be reduced.
        multiple: widths and ranks are multiples of it where they can be.
    """

    neurons: bool = True
    head_dim: bool = True
    heads: bool = True
    rank: bool = True
    multiple: int = 8


def widths(whole: int, multiple: int) -> list[int]:
    """Eighths of a width, rounded to multiples, the largest first."""
    step = multiple if whole >= 2 * multiple else 1
    found = {max(step, round(whole * part / PARTS / step) * step) for part in range(1, PARTS)}
    return [whole, *sorted((width for width in found if width < whole), reverse=True)]


class Offer(BlockForm):
    """What one block, or one of its sublayers, can become.

    Attributes:
        bits: that its price counts on, of layers by name, where a step after this one rounds them.
    """

    bits: dict[str, int] = Field(default_factory=dict)

    def form(self) -> BlockForm:
        """What this step makes of it."""
        return BlockForm(**self.model_dump(exclude={"bits"}))


@dataclass(frozen=True)
class _Way:
    """One way for one layer to be: dense, or of a rank in one of two forms; and with how many bits it is stored."""

    rank: int | None
    pivoted: bool
    bits: int | None
    price: Row
    error: float


@dataclass(frozen=True)
class _Base:
    """A width of a sublayer: its form, its error, what it costs besides its two layers, and the ways of these."""

    form: Offer
    error: float
    price: Row
    ways: dict[str, list[_Way]]


class _Offers:
    """The forms of one block.

    Args:
        teacher: what is known of its values; None: errors are not, and count as zero.
    """

    def __init__(self, place: Place, prices: Prices, methods: Methods, teacher: TeacherBlock | None):
        self.place, self.prices, self.methods, self.teacher = place, prices, methods, teacher
        self.shapes = prices.shapes[place.path]
        self._noises = {layer: self._noise(layer) for layer in self.shapes.layers}

    def mlp(self) -> Forms[Offer]:
        """Fewer neurons, and the rank of each of the two layers."""
        place, teacher = self.place, self.teacher
        sizes = widths(place.neurons, self.methods.multiple) if self.methods.neurons else [place.neurons]
        removals = teacher.neurons(*sizes) if teacher else {}
        metrics = {name: teacher.metric(name) for name in place.fc1} if teacher else {}
        bases = []
        for size in sizes:
            form = Offer(neurons=None if size == place.neurons else size, parts=place.parts)
            error, left = 0.0, dict[str, list[float] | None].fromkeys((*place.fc1, FC2))
            if teacher:
                removal = removals[size]
                kept, rows, error = removal.kept, place.rows(removal.kept), removal.error
                for name in place.fc1:
                    weight, metric = teacher.weight(name)[rows], restricted(metrics[name], rows)
                    left[name] = self._left(weight, teacher.centred(name), metric)
                left[FC2] = self._left(removal.weight, teacher.centred(FC2)[kept][:, kept], None)
            bases.append(self._base(form, error, left, self.prices.hidden(place.path, size)))
        return self._forms(bases, place.fc1[0])

    def attention(self) -> Forms[Offer]:
        """Fewer dimensions of every head, fewer heads, and the rank of each of the two layers."""
        place, teacher = self.place, self.teacher
        bases = []
        for heads, size in self._head_sizes():
            form = Offer(
                parts=place.parts,
                qkv=place.own_qkv,
                heads=None if heads == place.heads else heads,
                head_dim=None if size == place.head_dim else size,
            )
            error, left = 0.0, dict[str, list[float] | None].fromkeys((*place.qkv, PROJ))
            if teacher:
                (weight, bias, _), inputs = teacher.joined(), teacher.first()
                found = narrow_heads(teacher, form, weight, bias, inputs.inputs, inputs.mean, teacher.products)
                outer, error = teacher.outer(PROJ), found.error
                projection = found.projection if outer is None else outer.mT @ found.projection
                count = len(place.qkv)
                rows = torch.arange(len(found.weight)).chunk(count)
                for name, own, part in zip(place.qkv, found.weight.chunk(count), rows, strict=True):
                    metric = found.metric if count == 1 else restricted(found.metric, part)
                    left[name] = self._left(own, teacher.centred(name), metric, self._share(name))
                left[PROJ] = self._left(projection, found.values, None)
            products = self.prices.products(place.path, heads, size)
            bases.append(self._base(form, error, left, products))
        return self._forms(bases, place.qkv[0])

    def _head_sizes(self) -> list[tuple[int, int]]:
        place, methods = self.place, self.methods
        sizes = [(place.heads, place.head_dim)]
        if methods.head_dim and "head_dim" in place.options:
            sizes += [(place.heads, size) for size in widths(place.head_dim, methods.multiple)[1:]]
        if methods.heads and "heads" in place.options:
            counts = range(place.heads - 1, place.heads // 4, -1)
            if self.teacher:
                self.teacher.heads(*counts)
            sizes += [(count, place.head_dim) for count in counts]
        return sizes

    def _share(self, layer: str) -> float:
        """The tokens that a layer of queries, keys or values sees, in parts of those of queries."""
        tokens, block = self.prices.tokens, self.place.path
        return tokens[f"{block}.{layer}"] / tokens[f"{block}.{self.place.qkv[0]}"]

    def _left(self, weight: Tensor, centred: Tensor, metric: Tensor | None, share: float = 1.0) -> list[float] | None:
        """The error of a layer of every rank, from that of leaving it out, times `share`; None where it stays dense and as it is."""
        assert self.teacher is not None
        if not self.methods.rank and not self.prices.bits:
            return None
        found: list[float] = (share * truncation_errors(weight, centred, self.teacher.settings.ridge, metric)).tolist()
        return found

    def _noise(self, layer: str) -> dict[int, float]:
        """What rounding a layer to each number of bits loses, in parts of what leaving it out would: independent errors of all numbers, in
        the metrics of its inputs and outputs, of which error feedback leaves a part."""
        rounding = self.prices.rounding
        if self.teacher is None or rounding is None:
            return {}
        group = rounding.group
        weight, moment, metric = self.teacher.weight(layer), self.teacher.centred(layer), self.teacher.metric(layer)
        outer = torch.ones(len(weight), dtype=torch.float64) if metric is None else metric.diagonal()
        whole = truncation_errors(weight, moment, self.teacher.settings.ridge, metric)[0].clamp(min=TINY)
        found = {}
        for bits in self.prices.bits:
            lost = weight - values_of(nearest(weight.float(), bits, group), bits, group)
            found[bits] = (_FED_BACK * (outer @ lost.square() @ moment.diagonal()) / whole).item()
        return found

    def _base(self, form: Offer, error: float, left: dict[str, list[float] | None], other: Row) -> _Base:
        shapes = self.shapes.narrowed(form)
        biases = sum(shapes[name][0] for name in left if name in self.shapes.biases)
        ways = {name: self._ways(name, *shapes[name], errors, self._noises[name]) for name, errors in left.items()}
        return _Base(form, error, other + self.prices.row(biases), ways)

    def _ways(
        self, layer: str, outputs: int, inputs: int, errors: list[float] | None, noise: Mapping[int, float]
    ) -> list[_Way]:
        block, multiple = self.place.path, self.methods.multiple
        found: list[_Way] = []

        def add(rank: int | None, pivoted: bool, price: Row) -> None:
            numbers = outputs * inputs if rank is None else rank_price(outputs, inputs, rank, pivoted)
            lost = errors[rank] if errors and rank is not None else 0.0
            kept = (errors[0] - lost) * (1 if rank is None else 2) if errors else 0.0  # two factors are rounded
            found.extend(
                _Way(rank, pivoted, bits, own, lost + kept * noise.get(bits or 0, 0.0))
                for bits, own in self.prices.rounded(price, numbers)
            )

        add(None, False, self.prices.dense(block, layer, outputs, inputs))
        if not self.methods.rank:
            return found
        most = min(outputs, inputs)
        step = max(1, most // RANKS // multiple) * multiple if most >= 4 * multiple else max(1, most // RANKS)
        for rank in range(step, most, step):
            for pivoted, price in self.prices.low_rank(block, layer, outputs, inputs, rank):
                add(rank, pivoted, price)
        if not self.prices.bits:
            return found
        prices, lost = np.array([way.price for way in found]), np.array([way.error for way in found])
        return list(Forms(found, prices, lost).efficient().forms)  # their combinations would be too many

    def _forms(self, bases: Sequence[_Base], layer: str) -> Forms[Offer]:
        """All combinations of the ways of the layers, for each width, without those that others are better than."""
        each = [self._combinations(base) for base in bases]
        made = [(base, ways) for base, forms in zip(bases, each, strict=True) for ways in forms.forms]
        prices, errors = (np.concatenate(rows) for rows in zip(*((f.prices, f.errors) for f in each), strict=True))
        tokens = self.prices.tokens[f"{self.place.path}.{layer}"]
        found = Forms(range(len(made)), prices, tokens * errors).efficient()
        return Forms([self._form(made[i][0], *made[i][1]) for i in found.forms], found.prices, found.errors)

    @staticmethod
    def _combinations(base: _Base) -> Forms[tuple[_Way, ...]]:
        """Of the ways of the layers of one width."""
        found: Forms[tuple[_Way, ...]] = Forms([()], base.price[None], np.array([base.error]))
        for position, ways in enumerate(base.ways.values()):
            if position > 1:
                found = found.efficient()
            price, error = np.array([way.price for way in ways]), np.array([way.error for way in ways])
            found = Forms(
                [(*before, way) for before in found.forms for way in ways],
                (found.prices[:, None] + price[None]).reshape(-1, len(base.price)),
                (found.errors[:, None] + error[None]).flatten(),
            )
        return found

    def _form(self, base: _Base, *ways: _Way) -> Offer:
        of_layers = [(name, way) for name, way in zip(base.ways, ways, strict=True) if way.rank is not None]
        ranks = {name: way.rank for name, way in of_layers}
        factored = tuple(name for name, way in of_layers if self.prices.pivoted and not way.pivoted)
        bits = {name: way.bits for name, way in zip(base.ways, ways, strict=True) if way.bits is not None}
        return base.form.model_copy(update={"ranks": ranks, "factored": factored, "bits": bits})


def offers(place: Place, prices: Prices, methods: Methods, teacher: TeacherBlock | None) -> dict[str, Forms[Offer]]:
    """The forms of a block's attention and MLP, by path.

    Args:
        teacher: what is known of its values; None: all errors are zero, and of forms the cheapest are found.
    """
    made = _Offers(place, prices, methods, teacher)
    found: dict[str, Forms[Offer]] = {}
    if place.options:
        found[f"{place.path}.attn"] = made.attention()
    if place.neurons:
        found[f"{place.path}.mlp"] = made.mlp()
    return found
