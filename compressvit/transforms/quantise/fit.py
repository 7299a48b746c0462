"""The values of rounded weights: plain, with error feedback on given moments, or in the order in which the layers run.

In order, every layer is first fitted anew: by regression from what the rounded layers before it give to what the model gives there, for a
layer that ends a residual branch to what makes the sum with the stream that of the model; the result is rounded with error feedback in the
moment of these inputs, and the bias is fitted to what was rounded. A weight that layers share is rounded once, in the sum of the moments of
their inputs, and so is the weight of a layer to which an earlier step added something.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from compressvit.fitting.in_order import LayerFit
from compressvit.fitting.lowrank import Tensor
from compressvit.fitting.moments import Moments, says_something
from compressvit.fitting.reference import STRONG_RIDGE, Reference
from compressvit.fitting.regression import Regression
from compressvit.fitting.rounding import Feedback, nearest
from compressvit.log import progress
from compressvit.model import surgery, ties
from compressvit.model.linear import effective_weight
from compressvit.transforms.quantise.packed import Packed, Rounded

_OUTPUT_RIDGE = 0.1  # of the gradients' moment, in parts of its diagonal
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # in parts of the inputs' mean square


class Settings(Protocol):
    """What a step or its plan says about rounding, see `Quantise`."""

    @property
    def metric(self) -> str: ...
    @property
    def sequential(self) -> bool: ...
    @property
    def group(self) -> int: ...
    @property
    def ridge(self) -> float: ...
    @property
    def sweeps(self) -> int: ...


class Rounding:
    """Sets the values of one student.

    Args:
        layers: paths of the layers that are rounded by what they compute; all others are rounded plainly.
        reference: the model before it was rounded.
    """

    def __init__(self, student: nn.Module, layers: Sequence[str], reference: Reference, settings: Settings):
        self.student, self.layers, self.reference, self.settings = student, list(layers), reference, settings
        self._shared = {name for group in ties.tied_groups(student) for name in group}

    @property
    def by_moments(self) -> bool:
        """Whether there are moments of inputs."""
        return self.settings.metric != "weights" and bool(self.layers)

    @torch.no_grad()
    def start(self) -> None:
        """Set all values as if the layers before were not rounded; plainly where they are fitted in order afterwards."""
        if self.by_moments:
            moments_of(self.reference, self.layers)
        later = self.in_order()
        owners: dict[Packed, list[str]] = {}
        for path, module in self.student.named_modules():
            if isinstance(module, Rounded):
                owners.setdefault(module.rounded, []).append(path)
        for packed, paths in progress(owners.items(), "rounding weights", len(owners)):
            weight = self._weight(paths[0])
            if self.by_moments and set(paths) <= set(self.layers) and not set(paths) <= later:
                packed.set(self._feedback(paths).round(weight, packed.bits, self.settings.group, self.settings.sweeps))
                self._correct_biases(paths, weight)
            else:
                packed.set(nearest(weight, packed.bits, self.settings.group))

    def in_order(self) -> set[str]:
        """The layers whose weights are fitted in the order they run."""
        if not self.by_moments or not self.settings.sequential or self.reference.too_alike:
            return set()
        return {
            path
            for path in self.layers
            if _is_plain(self.student.get_submodule(path)) and f"{path}.rounded.codes" not in self._shared
        }

    def fits(self) -> dict[str, LayerFit]:
        """By path, for the fit in order; of a layer that shares its weight the bias alone."""
        later = self.in_order()
        if not later:
            return {}
        moments = moments_of(self.reference, self.layers)
        return {
            path: LayerFit(partial(self._fit, path, path in later), moments[path].prefix_weight)
            for path in self.layers
            if path in later or self._has_own_bias(path)
        }

    def _fit(self, path: str, rounds: bool, working: Any, regression: Regression) -> float:
        """Fit one layer of the working copy, and the student's, and round its weight or leave that; returns the remaining error."""
        both: tuple[Any, Any] = (working, self.student.get_submodule(path))
        bias = None if working.bias is None else working.bias.cpu().double()
        free = self._has_own_bias(path)
        fixed = torch.zeros(len(regression.whole.y), dtype=torch.float64) if bias is None else bias
        if rounds:
            regression = replace(regression, ridges=_RIDGES)
            wanted, moment = regression.solve(self.reference.weight(path), None if free else fixed)
            bits = working.rounded.bits
            found = Feedback(moment, self.settings.ridge).round(wanted, bits, self.settings.group, self.settings.sweeps)
            for layer in both:
                layer.rounded.set(found)
        whole = effective_weight(working).cpu().double()
        if free:
            fixed = regression.whole.best_bias(whole)
            for layer in both:
                _set_bias(layer, fixed)
        return regression.error(whole, fixed)

    def _weight(self, path: str) -> Tensor:
        """(out, in), without what earlier steps added to it."""
        layer: Any = self.reference.model.get_submodule(path)
        return layer.weight.detach().cpu().float().flatten(1)

    def _has_own_bias(self, path: str) -> bool:
        bias = self.student.get_submodule(path)._parameters.get("bias")
        return bias is not None and f"{path}.bias" not in self._shared and _is_plain(self.student.get_submodule(path))

    def _feedback(self, paths: Sequence[str]) -> Feedback:
        moments = moments_of(self.reference, self.layers)
        centred = [path for path in paths if self._has_own_bias(path)]
        ridge = max(self.settings.ridge, STRONG_RIDGE) if self.reference.too_alike else self.settings.ridge
        return Feedback(moment_of(moments, paths, centred), ridge)

    def _correct_biases(self, paths: Sequence[str], weight: Tensor) -> None:
        """Give biases what rounding took on average."""
        moments = moments_of(self.reference, self.layers)
        for path in paths:
            if self._has_own_bias(path):
                layer: Any = self.student.get_submodule(path)
                lost = weight.double() - layer.weight.flatten(1).cpu().double()
                _set_bias(layer, layer.bias.cpu().double() + lost @ moments[path].weighed_mean())


def moments_of(reference: Reference, layers: Sequence[str]) -> dict[str, Moments]:
    """Of the layers' inputs and gradients."""
    return reference.moments(list(layers), outputs=True)


def moment_of(moments: Mapping[str, Moments], paths: Sequence[str], centred: Sequence[str]) -> Tensor:
    """The moment (in, in) of the inputs of all layers together, of those in `centred` around the mean, since a bias takes that over."""
    total: Any = 0.0
    for path in paths:
        own, mean = moments[path].weighed(), moments[path].weighed_mean()
        total = total + moments[path].tokens * (own - torch.outer(mean, mean) if path in centred else own)
    found: Tensor = total / sum(moments[path].tokens for path in paths)
    return found


def squared_error(path: str, lost: Tensor, reference: Reference) -> float:
    """What an error (out, in) in a layer's weight costs the model's output on all tokens, to second order."""
    moments = moments_of(reference, [path])[path]
    mean = moments.weighed_mean()
    lost = lost.double()
    seen = lost @ moments.weighed() - torch.outer(lost @ mean, mean)
    if moments.outputs is not None and says_something(moments.outputs):
        seen = (moments.outputs + _OUTPUT_RIDGE * moments.outputs.diagonal().diag()) @ seen
    return moments.tokens * (seen * lost).sum().item()


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes with its weight and bias alone."""
    kind = surgery.kind_of(layer)
    return kind in (nn.Linear, nn.Conv2d) and surgery.mixins_of(layer) in ([], [Rounded])


@torch.no_grad()
def _set_bias(layer: nn.Module, bias: Tensor) -> None:
    layer.get_parameter("bias").copy_(bias)
