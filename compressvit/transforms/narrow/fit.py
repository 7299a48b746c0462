"""The values of a block that is made narrower: in closed form from the teacher's, or from what the student's earlier layers produce.

    fc1   the rows of the neurons that are kept
    fc2   the columns of those neurons, and what they take over of the others (`compressvit.fitting.elimination`)
    qkv   the two products of every head, with fewer dimensions (`compressvit.fitting.narrow_heads`); only the heads that are kept
    proj  what reads those

Each can be low rank besides. In the fit in order, `fc1` and `qkv` are first fitted to all of the teacher's outputs from the student's
inputs and then made narrower, with the moments of those inputs; `fc2` and `proj` are fitted from what the narrower layers give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from compressvit.fitting.elimination import Removal
from compressvit.fitting.in_order import LayerFit
from compressvit.fitting.lowrank import TINY, Metric, Tensor, cholesky, factor_of, spectrum
from compressvit.fitting.narrow_heads import HeadMaps, Products
from compressvit.fitting.regression import Regression
from compressvit.transforms.low_rank.layer import Factored
from compressvit.transforms.narrow.form import PROJ, QKV, BlockForm
from compressvit.transforms.narrow.places import of_each_head
from compressvit.transforms.narrow.teacher import TeacherBlock, heads_products, restricted

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 30.0, 100.0)  # in parts of the inputs' mean square


@dataclass(frozen=True)
class Heads:
    """Attention with the heads that are kept, each with fewer dimensions.

    Attributes:
        weight, bias: of `qkv`.
        metric: of its outputs.
        projection: of `proj`, (out, H'·d').
        values, mean: moment and mean of what `proj` reads.
        error: mean squared error of the model's output.
        size: of all, against which the error counts.
        maps: from the heads that are kept to these; None where they keep their dimensions.
    """

    weight: Tensor
    bias: Tensor | None
    metric: Tensor | None
    projection: Tensor
    values: Tensor
    mean: Tensor
    error: float
    size: float
    maps: HeadMaps | None = None


def narrow_heads(
    teacher: TeacherBlock,
    form: BlockForm,
    weight: Tensor,
    bias: Tensor | None,
    inputs: Tensor,
    mean: Tensor,
    decomposed: Products | None = None,
    known: HeadMaps | None = None,
) -> Heads:
    """The attention of a narrower block, as a function of what `qkv` computes from given inputs.

    Args:
        weight, bias: of the teacher's `qkv`, or of one fitted to its outputs, (3·H·d, in).
        inputs, mean: E[xᵀx], (in, in), and E[x], (in,), of its inputs.
        decomposed: the products of all heads, if they are known.
        known: the maps to heads of fewer dimensions, instead of those that these products give.
    """
    place = teacher.place
    heads, size = form.heads or place.heads, form.head_dim or place.head_dim
    metric, projection, error = teacher.joined()[2], teacher.whitened(PROJ), 0.0
    values, mean_of_values = teacher.centred(PROJ), teacher.mean(PROJ)
    found = decomposed if heads == place.heads else None
    if heads < place.heads:
        removal = teacher.heads(heads)[heads]
        rows = torch.cat([removal.kept + part * place.heads * place.head_dim for part in range(3)])
        weight, bias = weight[rows], None if bias is None else bias[rows]
        metric, values = restricted(metric, rows), values[removal.kept][:, removal.kept]
        mean_of_values = mean_of_values[removal.kept]
        projection, error = removal.weight, removal.error
    found = found or heads_products(weight, bias, inputs, mean, metric, projection, values, heads)
    whole, maps = found.errors[0].item() + error, None
    if size < place.head_dim:
        error += found.errors[size].item()
        maps = known or found.maps(size).balanced(weight, bias, teacher.unwhitened(PROJ, projection))
        weight, bias = maps.narrow(weight, bias)
        metric = None if metric is None else maps.of_outputs(metric)
        projection, values = maps.projection(projection), maps.of_values(values)
        mean_of_values = maps.mean_of_values(mean_of_values)
    projection = teacher.unwhitened(PROJ, projection)
    return Heads(weight, bias, metric, projection, values, mean_of_values, error, whole, maps)


class BlockFit:
    """Sets the values of one narrower block, in every student it is given: first in closed form, then in order.

    Args:
        student: the layers that get the values, besides those of the working copy that the fit in order runs.
    """

    def __init__(self, teacher: TeacherBlock, form: BlockForm, student: nn.Module):
        self.teacher, self.form, self.student = teacher, form, student.get_submodule(teacher.place.path)
        self._heads: Heads | None = None

    def changed(self) -> list[str]:
        """The layers that this block changes, in the order they run."""
        return self.form.in_order()

    @torch.no_grad()
    def keep_others(self) -> None:
        """Give the attention what it has beside its layers: biases of its own, and the entries of the heads that are kept."""
        if not self._narrows_heads:
            return
        family, heads = self.teacher.family, self.form.heads
        ours: Any = self.student.get_submodule("attn")
        if (found := self._of_vectors) is not None:
            assert found.bias is not None
            for name, part in zip(family.of_heads, found.bias.chunk(3), strict=True):
                getattr(ours, name).copy_(part)
        if heads:
            first = self.teacher.heads(heads)[heads].kept[:: self.teacher.place.head_dim]
            kept = first // self.teacher.place.head_dim
            for name, axes in of_each_head(ours, family).items():
                tensor = self.teacher.block.attn.get_parameter(name)
                for axis in axes:
                    tensor = tensor.index_select(axis, kept.to(tensor.device))
                ours.get_parameter(name).copy_(tensor)

    @cached_property
    def _of_vectors(self) -> Heads | None:
        """The narrower heads of what the teacher's own layers give, where the attention has biases of its own: those do not follow the fit
        in order, which sets layers."""
        if self.teacher.vectors() is None:
            return None
        (weight, bias, _), inputs = self.teacher.joined(), self.teacher.first()
        return narrow_heads(self.teacher, self.form, weight, bias, inputs.inputs, inputs.mean, self.teacher.products)

    @property
    def _maps(self) -> HeadMaps | None:
        """Those of heads whose biases are set already."""
        return None if self._of_vectors is None else self._of_vectors.maps

    @torch.no_grad()
    def start(self) -> None:
        """Set all values in closed form, as if the layers before were the teacher's."""
        for layer in self.changed():
            moments, centred = self.teacher.moments(layer), self.teacher.centred(layer)
            weight, bias, mean = self.teacher.weight(layer), self.teacher.bias(layer), self.teacher.mean(layer)
            metric, wanted = self.teacher.metric(layer), weight @ mean  # with the bias, what the layer gives on average
            if layer == QKV and self._narrows_heads:
                known = moments.inputs, moments.mean, self.teacher.products
                self._heads = narrow_heads(self.teacher, self.form, weight, bias, *known, self._maps)
                weight, bias, metric = self._heads.weight, self._heads.bias, self._heads.metric
                wanted = weight @ mean
            elif layer == PROJ and self._heads is not None:
                weight, centred, mean = self._heads.projection, self._heads.values, self._heads.mean
            elif (rows := self._rows(layer)) is not None:
                weight, bias, wanted = weight[rows], None if bias is None else bias[rows], wanted[rows]
                metric = restricted(metric, rows)
            elif (removal := self._removal(layer)) is not None:
                kept = removal.kept
                weight = self.teacher.unwhitened(layer, removal.weight)
                centred, mean = centred[kept][:, kept], mean[kept]
            weight, factors = self._low_rank(layer, weight, centred, metric)
            bias = None if bias is None else bias + wanted - weight @ mean
            self._set(self.student.get_submodule(layer), weight, bias, factors)

    def fits(self) -> dict[str, LayerFit]:
        """Of every changed layer, by path, for the fit in order."""
        prefix = {layer: self.teacher.moments(layer).prefix_weight for layer in self.changed()}
        return {
            self.teacher.path(layer): LayerFit(partial(self._fit, layer), prefix[layer]) for layer in self.changed()
        }

    @property
    def _narrows_heads(self) -> bool:
        return bool(self.form.heads or self.form.head_dim)

    def _removal(self, layer: str) -> Removal | None:
        """What is left of a layer that reads what goes; None of another, and of the output projection of heads that are fitted together
        with their queries, keys and values."""
        neurons, heads = self.form.neurons, self.form.heads
        if layer == self.teacher.place.fc2 and neurons:
            return self.teacher.neurons(neurons)[neurons]
        return self.teacher.heads(heads)[heads] if layer == PROJ and heads and self._apart else None

    def _rows(self, layer: str) -> Tensor | None:
        """The outputs that are kept of a layer that gives what goes; None of another."""
        place = self.teacher.place
        if layer in place.fc1 and (removal := self._removal(place.fc2)) is not None:
            return place.rows(removal.kept)
        if layer in place.qkv and (removal := self._removal(PROJ)) is not None:
            return removal.kept
        return None

    @property
    def _apart(self) -> bool:
        """Whether queries, keys and values come from three layers."""
        return len(self.teacher.place.qkv) > 1

    def _fit(self, layer: str, working: nn.Module, regression: Regression) -> float:
        """Fit one layer of the working copy, and the student's; returns the remaining error."""
        regression = replace(regression, ridges=RIDGES)
        metric = self.teacher.metric(layer)
        prior, bias = self.teacher.weight(layer), self.teacher.bias(layer)
        rows, removal = self._rows(layer), self._removal(layer)
        if rows is not None:
            regression, prior, bias = regression.of(rows), prior[rows], None if bias is None else bias[rows]
            metric = restricted(metric, rows)
        elif removal is not None:
            prior = self.teacher.unwhitened(layer, removal.weight)
        elif layer == PROJ and self._heads is not None:
            prior = self._heads.projection
        free = bias is not None
        none = torch.zeros(len(prior), dtype=torch.float64)
        weight, centred = regression.solve(prior, None if free else none)
        whole = regression.whole
        narrowed = layer == QKV and self._narrows_heads
        if narrowed:
            own = whole.best_bias(weight) if free else None
            moment, mean = whole.xx / whole.weight, whole.x / whole.weight
            self._heads = found = narrow_heads(self.teacher, self.form, weight, own, moment, mean, known=self._maps)
            weight, metric = found.weight, found.metric
            full, factors = self._low_rank(layer, weight, centred, metric)
            bias = None if found.bias is None else found.bias + (weight - full) @ mean
            error = (max(found.error, 0.0) / max(found.size, TINY)) ** 0.5
        else:
            full, factors = self._low_rank(layer, weight, centred, metric)
            bias = whole.best_bias(full) if free else None
            error = regression.error(full, none if bias is None else bias)
        for target in (working, self.student.get_submodule(layer)):
            self._set(target, full, bias, factors)
        return error

    def _low_rank(
        self, layer: str, weight: Tensor, moment: Tensor, outputs: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The weight as the layer will have it, and its factors where it is low rank."""
        rank = self.form.ranks.get(layer)
        if rank is None:
            return weight, None
        metric = Metric(cholesky(moment, self.teacher.settings.ridge), factor_of(outputs))
        up, down = spectrum(weight, metric).factors(rank)
        return up @ down, (up, down)

    @staticmethod
    def _set(layer: nn.Module, weight: Tensor, bias: Tensor | None, factors: tuple[Tensor, Tensor] | None) -> None:
        with torch.no_grad():
            if factors is None:
                own = layer.get_parameter("weight")  # of a point-wise convolution with two more dimensions
                own.copy_(weight.reshape(own.shape))
            else:
                assert isinstance(layer, Factored)
                layer.set_factors(*factors)
            if bias is None:
                return
            if isinstance(layer, Factored):
                layer.set_bias(bias)
            else:
                layer.get_parameter("bias").copy_(bias)
