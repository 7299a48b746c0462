"""What is known of a teacher's block that is made narrower: weights, moments, and which neurons and heads to give up first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from compressvit.fitting.elimination import Removal, compensated, eliminate
from compressvit.fitting.in_order import scale_behind
from compressvit.fitting.lowrank import Tensor, factor_of
from compressvit.fitting.moments import Moments, says_something
from compressvit.fitting.narrow_heads import Products, head_blocks, outputs_of, products
from compressvit.fitting.reference import Reference
from compressvit.model.family import Family
from compressvit.transforms.narrow.form import PROJ
from compressvit.transforms.narrow.places import Place

_LEAST = 1e-3  # of the mean; outputs that count for less count as that


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
        family: of the model.
    """

    def __init__(
        self,
        place: Place,
        reference: Reference,
        family: Family,
        settings: Settings,
    ):
        self.place, self.reference, self.family, self.settings = place, reference, family, settings
        self.block: Any = reference.model.get_submodule(place.path)

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
                values = self.weight(self.place.qkv[-1])
                values = values.chunk(3)[2] if len(self.place.qkv) == 1 else values
                moment = values @ values.mT / (values.square().sum() / inputs)
            return Moments(moment, torch.zeros(inputs, dtype=torch.float64), 1)
        return self.reference.moments([self.path(layer)], outputs=True)[self.path(layer)]

    def vectors(self) -> Tensor | None:
        """The biases of queries, keys and values that the attention adds itself (`Family.of_heads`), (3·H·d,); None without them."""
        names = self.family.of_heads
        found = [vector for name in names if (vector := getattr(self.block.attn, name, None)) is not None]
        return torch.cat([vector.detach().cpu().double() for vector in found]) if found else None

    def first(self) -> Moments:
        """Of the inputs of queries, keys and values."""
        return self.moments(self.place.qkv[0])

    def joined(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weight (3·H·d, in), bias and metric of queries, keys and values together. Of three layers no moment of the gradients of two is
        known, and of one without a bias that is zero."""
        names = self.place.qkv
        if len(names) == 1:
            bias = self.bias(names[0])
            return self.weight(names[0]), self.vectors() if bias is None else bias, self.metric(names[0])
        weight = torch.cat([self.weight(name) for name in names])
        size = len(weight) // 3
        biases, metrics = [self.bias(name) for name in names], [self.metric(name) for name in names]
        zeros = torch.zeros(size, dtype=torch.float64)
        bias = None if all(b is None for b in biases) else torch.cat([zeros if b is None else b for b in biases])
        known = [m for m in metrics if m is not None]
        return weight, bias, torch.block_diag(*known) if len(known) == 3 else None

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
        return scale_behind(self.block, self.family.branches.get(layer))

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
        return self._removals(self.place.fc2, widths, 1)

    def heads(self, *counts: int) -> dict[int, Removal]:
        """What is left of the attention with so many heads."""
        size = self.place.head_dim
        found = self._removals(PROJ, tuple(count * size for count in counts), size)
        return {width // size: removal for width, removal in found.items()}

    @cached_property
    def products(self) -> Products:
        """Of all heads, of what their queries, keys and values are of their inputs."""
        (weight, bias, metric), inputs, values = self.joined(), self.first(), self.centred(PROJ)
        of_inputs = weight, bias, inputs.inputs, inputs.mean
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


def restricted(moment: Tensor | None, rows: Tensor) -> Tensor | None:
    """The moment of some outputs alone."""
    return None if moment is None else moment[rows][:, rows]


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
