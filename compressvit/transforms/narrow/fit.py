"""The values of a block that is made narrower: in closed form from the teacher's, or from what the student's earlier layers produce.

    fc1   the rows of the neurons that are kept
    fc2   the columns of those neurons, and what they take over of the others (`compressvit.fitting.elimination`)
    qkv   the two products of every head, with fewer dimensions (`compressvit.fitting.narrow_heads`); only the heads that are kept
    proj  what reads those

Each can be low rank besides. In the fit in order, `fc1` and `qkv` are first fitted to all of the teacher's outputs from the student's
inputs and then made narrower, with the moments of those inputs; `fc2` and `proj` are fitted from what the narrower layers give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import nn

from compressvit.fitting.elimination import Removal, compensated, eliminate
from compressvit.fitting.in_order import LayerFit, scale_behind
from compressvit.fitting.lowrank import TINY, Metric, Tensor, cholesky, factor_of, spectrum
from compressvit.fitting.moments import Moments, says_something
from compressvit.fitting.narrow_heads import Products, head_blocks, outputs_of, products
from compressvit.fitting.reference import Reference
from compressvit.fitting.regression import Regression
from compressvit.model.family import Branch
from compressvit.transforms.low_rank.layer import Factored
from compressvit.transforms.narrow.form import BlockForm
from compressvit.transforms.narrow.places import FC1, FC2, LAYERS, PROJ, QKV, Place

_LEAST = 1e-3  # of the mean; outputs that count for less count as that
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 30.0, 100.0)  # in parts of the inputs' mean square


class Measured(Protocol):
    """What a step or plan says about its errors, see `NarrowStep`."""

    @property
    def metric(self) -> str: ...
    @property
    def ridge(self) -> float: ...
    @property
    def output_ridge(self) -> float: ...


@dataclass(frozen=True)
class Settings:
    """What errors are measured in: the regularisation of the moments of inputs, relative to their mean, and of gradients, relative to their
    diagonal; and whether there are any, without which the weights alone count."""

    ridge: float
    output_ridge: float
    images: bool = True

    @classmethod
    def of(cls, step: Measured) -> Settings:
        """Those of a step or plan."""
        return cls(step.ridge, step.output_ridge, step.metric != "weights")


class TeacherBlock:
    """What is known of the teacher's block at a place: weights, moments, and which neurons and dimensions to give up first.

    Args:
        branches: of the family, by the layer that ends each.
    """

    def __init__(self, place: Place, reference: Reference, branches: Mapping[str, Branch], settings: Settings):
        self.place, self.reference, self.settings = place, reference, settings
        self.block = reference.model.get_submodule(place.path)
        self._branches = branches

    def path(self, layer: str) -> str:
        """From the model."""
        return f"{self.place.path}.{layer}"

    def weight(self, layer: str) -> Tensor:
        """(out, in), in float64."""
        return self.reference.weight(self.path(layer))

    def bias(self, layer: str) -> Tensor | None:
        """(out,), in float64."""
        found = self.block.get_submodule(layer)._parameters["bias"]
        return None if found is None else found.detach().cpu().double()

    def moments(self, layer: str) -> Moments:
        """Of the inputs and gradients of a layer."""
        if not self.settings.images:
            inputs = self.weight(layer).shape[1]
            moment = torch.eye(inputs, dtype=torch.float64)
            if layer == PROJ:  # what the values are for inputs that all count alike
                values = self.weight(QKV).chunk(3)[2]
                moment = values @ values.mT / (values.square().sum() / inputs)
            return Moments(moment, torch.zeros(inputs, dtype=torch.float64), 1)
        return self.reference.moments([self.path(layer)], outputs=True)[self.path(layer)]

    def centred(self, layer: str) -> Tensor:
        """The moment of a layer's inputs without what a bias takes over, where there is one."""
        found, mean = self.moments(layer), self.mean(layer)
        return found.weighed() if self.bias(layer) is None else found.weighed() - torch.outer(mean, mean)

    def mean(self, layer: str) -> Tensor:
        """Of a layer's inputs, (in,)."""
        return self.moments(layer).weighed_mean()

    def outer(self, layer: str) -> Tensor | None:
        """The factor M of the metric M Mᵀ of a layer's outputs."""
        return factor_of(self.metric(layer))

    def metric(self, layer: str) -> Tensor | None:
        """What errors at a layer's outputs are measured in, (out, out): the moment of the gradients there, with a ridge on its diagonal in
        parts of what is there, since outputs have units of their own; without gradients the LayerScale behind the layer; None where all
        outputs count alike."""
        moment, scale = self.moments(layer).outputs, self.scale(layer)
        if moment is None or not says_something(moment):
            return None if scale is None else torch.diag(scale.square())
        own = moment.diagonal()
        return moment + self.settings.output_ridge * torch.diag(own.clamp(min=_LEAST * own.mean()))

    def scale(self, layer: str) -> Tensor | None:
        """|γ| (out,) of the LayerScale after a layer, if there is one."""
        return scale_behind(self.block, self._branches.get(layer))

    def whitened(self, layer: str) -> Tensor:
        """Mᵀ W, (out, in)."""
        outer, weight = self.outer(layer), self.weight(layer)
        return weight if outer is None else outer.mT @ weight

    def unwhitened(self, layer: str, weight: Tensor) -> Tensor:
        """W of Mᵀ W."""
        outer = self.outer(layer)
        return weight if outer is None else torch.linalg.solve_triangular(outer.mT, weight, upper=True)

    def neurons(self, *widths: int) -> dict[int, Removal]:
        """What is left of the MLP with so many neurons."""
        return self._removals(FC2, widths, 1)

    def heads(self, *counts: int) -> dict[int, Removal]:
        """What is left of the attention with so many heads."""
        size = self.place.head_dim
        found = self._removals(PROJ, tuple(count * size for count in counts), size)
        return {width // size: removal for width, removal in found.items()}

    @cached_property
    def products(self) -> Products:
        """Of all heads, of what `qkv` computes from its inputs."""
        inputs, metric, values = self.moments(QKV), self.metric(QKV), self.centred(PROJ)
        of_inputs = self.weight(QKV), self.bias(QKV), inputs.inputs, inputs.mean
        return heads_products(*of_inputs, metric, self.whitened(PROJ), values, self.place.heads)

    def _removals(self, layer: str, widths: tuple[int, ...], group: int) -> dict[int, Removal]:
        known: dict[int, tuple[Tensor, float]] = self.reference.known((self.path(layer), group, self.settings), dict)
        weight, moment, ridge = self.whitened(layer), self.centred(layer), self.settings.ridge
        if missing := [width for width in widths if width not in known]:
            found = eliminate(weight, moment, ridge, missing, group)
            known |= {
                width: (removal.kept, removal.error) for width, removal in found.items()
            }  # weights would take much memory
            return found if len(missing) == len(widths) else self._removals(layer, widths, group)
        return {width: Removal(*known[width], compensated(weight, moment, ridge, known[width][0])) for width in widths}


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
    """

    weight: Tensor
    bias: Tensor | None
    metric: Tensor | None
    projection: Tensor
    values: Tensor
    mean: Tensor
    error: float
    size: float


def narrow_heads(
    teacher: TeacherBlock,
    form: BlockForm,
    weight: Tensor,
    bias: Tensor | None,
    inputs: Tensor,
    mean: Tensor,
    decomposed: Products | None = None,
) -> Heads:
    """The attention of a narrower block, as a function of what `qkv` computes from given inputs.

    Args:
        weight, bias: of the teacher's `qkv`, or of one fitted to its outputs, (3·H·d, in).
        inputs, mean: E[xᵀx], (in, in), and E[x], (in,), of its inputs.
        decomposed: the products of all heads, if they are known.
    """
    place = teacher.place
    heads, size = form.heads or place.heads, form.head_dim or place.head_dim
    metric, projection, error = teacher.metric(QKV), teacher.whitened(PROJ), 0.0
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
    whole = found.errors[0].item() + error
    if size < place.head_dim:
        error += found.errors[size].item()
        maps = found.maps(size).balanced(weight, bias, teacher.unwhitened(PROJ, projection))
        weight, bias = maps.narrow(weight, bias)
        metric = None if metric is None else maps.of_outputs(metric)
        projection, values = maps.projection(projection), maps.of_values(values)
        mean_of_values = maps.mean_of_values(mean_of_values)
    projection = teacher.unwhitened(PROJ, projection)
    return Heads(weight, bias, metric, projection, values, mean_of_values, error, whole)


def heads_products(
    weight: Tensor,
    bias: Tensor | None,
    inputs: Tensor,
    mean: Tensor,
    gradients: Tensor | None,
    projection: Tensor,
    values: Tensor,
    heads: int,
) -> Products:
    """Decompose the products of heads; see `products` and `outputs_of`."""
    queries, keys = outputs_of(weight, bias, inputs, mean, heads)
    of_query = None
    if gradients is not None and gradients.trace() > 0:
        of_query = head_blocks(gradients[: len(gradients) // 3, : len(gradients) // 3], heads)
    return products(queries, keys, of_query, projection, values)


def restricted(moment: Tensor | None, rows: Tensor) -> Tensor | None:
    """The moment of some outputs alone."""
    return None if moment is None else moment[rows][:, rows]


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
        return [layer for layer in LAYERS if layer in self.form.layers()]

    @torch.no_grad()
    def start(self) -> None:
        """Set all values in closed form, as if the layers before were the teacher's."""
        for layer in self.changed():
            moments, centred = self.teacher.moments(layer), self.teacher.centred(layer)
            weight, bias, mean = self.teacher.weight(layer), self.teacher.bias(layer), self.teacher.mean(layer)
            metric, wanted = self.teacher.metric(layer), weight @ mean  # with the bias, what the layer gives on average
            if layer == QKV and self._narrows_heads:
                known = moments.inputs, moments.mean, self.teacher.products
                self._heads = narrow_heads(self.teacher, self.form, weight, bias, *known)
                weight, bias, metric = self._heads.weight, self._heads.bias, self._heads.metric
                wanted = weight @ mean
            elif layer == PROJ and self._heads is not None:
                weight, centred, mean = self._heads.projection, self._heads.values, self._heads.mean
            elif layer == FC1 and self.form.neurons:
                rows = self._rows
                weight, bias, wanted = weight[rows], None if bias is None else bias[rows], wanted[rows]
                metric = restricted(metric, rows)
            elif layer == FC2 and self.form.neurons:
                kept = self._removal.kept
                weight = self.teacher.unwhitened(FC2, self._removal.weight)
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

    @cached_property
    def _removal(self) -> Removal:
        assert self.form.neurons is not None
        return self.teacher.neurons(self.form.neurons)[self.form.neurons]

    @property
    def _rows(self) -> Tensor:
        return self.teacher.place.rows(self._removal.kept)

    def _fit(self, layer: str, working: nn.Module, regression: Regression) -> float:
        """Fit one layer of the working copy, and the student's; returns the remaining error."""
        regression = replace(regression, ridges=RIDGES)
        metric = self.teacher.metric(layer)
        prior, bias = self.teacher.weight(layer), self.teacher.bias(layer)
        if layer == FC1 and self.form.neurons:
            rows = self._rows
            regression, prior, bias = regression.of(rows), prior[rows], None if bias is None else bias[rows]
            metric = restricted(metric, rows)
        elif layer == FC2 and self.form.neurons:
            prior = self.teacher.unwhitened(FC2, self._removal.weight)
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
            self._heads = found = narrow_heads(self.teacher, self.form, weight, own, moment, mean)
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
