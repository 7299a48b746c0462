"""Choosing the ranks of low-rank layers, with or without a shared weight, within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import nn

from compressvit.fitting.allocate import Budget, Curve, allocate, least_cost, spend
from compressvit.fitting.lowrank import TINY, fit_shared, left_out, spectrum
from compressvit.fitting.moments import tokens_at
from compressvit.fitting.reference import Reference
from compressvit.log import progress
from compressvit.model import cost, surgery, ties
from compressvit.model.backbone import input_size
from compressvit.model.cost import header_bytes
from compressvit.model.linear import weight_shape
from compressvit.transforms.base import Plan
from compressvit.transforms.low_rank.layer import Factored, unfactor

Group = tuple[str, ...]
Kind = Literal["weights", "inputs", "outputs"]


class Spender(Protocol):
    """The interface of a step whose ranks follow from a budget."""

    name: ClassVar[str]

    @property
    def budget(self) -> Budget | None: ...
    @property
    def metric(self) -> Literal["auto"] | Kind: ...
    @property
    def init(self) -> str: ...
    @property
    def pivots(self) -> bool: ...
    @property
    def ridge(self) -> float: ...
    @property
    def output_ridge(self) -> float: ...

    def metric_for(self, groups: Sequence[Group]) -> Kind:
        """The metric in which errors of these groups are measured."""

    def resolved(self, groups: Sequence[Group], ranks: dict[str, int]) -> Plan:
        """The plan for these groups and ranks."""


def original_parameters(model: nn.Module) -> int:
    """The parameter count of the model before anything was shared, added or dropped."""
    added = surgery.added_parameters(model)
    kept = sum(p.numel() for n, p in model.named_parameters(remove_duplicate=False) if n not in added)
    return kept + sum(math.prod(weight_shape(m)) for m in model.modules() if isinstance(m, Factored))


def original_macs(model: nn.Module) -> int:
    """Multiply-accumulates per image of the model before anything was added or dropped."""
    empty = surgery.skeleton(model)
    for path, module in list(empty.named_modules()):
        if isinstance(module, Factored):
            weight = torch.empty(*weight_shape(module), device="meta", dtype=module.down.weight.dtype)
            unfactor(empty, path, nn.Parameter(weight))
    surgery.strip(empty)
    return cost.macs(empty, input_size(model))


class Spending:
    """Allocates the budget of a step to groups of layers of one model; computed errors are cached.

    Args:
        spec: the step, with a budget.
        model: the model after the earlier transforms, possibly on the meta device.
        reference: the values on which errors are computed; without it all errors are assumed equal, and ranks are uniform.
        paths: the layers.
    """

    def __init__(self, spec: Spender, model: nn.Module, reference: Reference | None, paths: Sequence[str]):
        assert spec.budget is not None
        self.spec, self.budget, self.model, self.reference = spec, spec.budget, model, reference
        self.layers: dict[str, Any] = {path: model.get_submodule(path) for path in paths}
        self.tokens = tokens_at(model, paths)
        itemsize = next(model.parameters()).element_size()
        self.unit = {"parameters": 1, "bytes": itemsize}.get(self.budget.unit, 0)
        self._macs = cost.macs(model, input_size(model)) if self.budget.macs else 0
        self._errors: dict[tuple[Group, str], list[list[float]]] = {}

    def ranks(self, groups: Sequence[Group]) -> dict[str, int | None]:
        """The rank of every layer; None for one that stays dense.

        Raises:
            UserError: the budget cannot be met.
        """
        return spend(
            self.budget,
            self._curves(groups, self.spec.metric_for(groups)),
            fixed=self._fixed(groups),
            of_teacher=self._of_teacher,
            by_error=self.reference is not None,
            asker=self.spec.name,
        )

    def choose(self, choices: Sequence[Sequence[list[Group]]]) -> list[Group]:
        """Choose a grouping for each set of layers so that the error at the budget is smallest.

        Starts from the first candidate of each set, and changes one grouping at a time while the error decreases.
        """
        chosen = [ways[0] for ways in choices]
        least = self._error_left(_flat(chosen))
        improved = True
        while improved:
            improved = False
            for place, ways in enumerate(choices):
                for way in ways:
                    trial = [*chosen[:place], way, *chosen[place + 1 :]]
                    error = self._error_left(_flat(trial))
                    if error < least * (1 - 1e-6):
                        chosen, least, improved = trial, error, True
        return _flat(chosen)

    def _error_left(self, groups: Sequence[Group]) -> float:
        # Relative to each layer's output: the metric of the model's output is a poor guide where layers share (see benchmarks/README.md).
        kind = "inputs" if self.spec.metric == "auto" else self.spec.metric
        curves = self._curves(groups, kind)
        left = self.budget.limit(self._of_teacher) - self._fixed(groups)
        if left < least_cost(curves):
            return math.inf
        return sum(0.0 if rank is None else curves[p].errors[rank] for p, rank in allocate(curves, left).items())

    def _curves(self, groups: Sequence[Group], kind: str) -> dict[str, Curve]:
        curves = {}
        measured = self.reference is not None
        for group in progress(groups, "weighing the ranks of layers", len(groups)) if measured else groups:
            errors = self.errors_by_rank(group, kind)
            for position, path in enumerate(group):
                out, inner = weight_shape(self.layers[path])
                curves[path] = Curve(
                    costs=self._costs(path, alone=len(group) == 1),
                    least=1 if len(group) == 1 else 0,
                    most=min(inner, out),
                    dense=(self.unit or self.tokens[path]) * inner * out if len(group) == 1 else None,
                    errors=errors[position] if errors else [0.0] * (min(inner, out) + 1),
                )
        return curves

    def _costs(self, path: str, *, alone: bool) -> Sequence[int]:
        """Of a layer or term of rank 0, 1, …"""
        out, inner = weight_shape(self.layers[path])
        ranks = range(min(inner, out) + 1)
        each = self.unit or self.tokens[path]
        if alone and self.spec.pivots:
            order = min(inner, out) * torch.int64.itemsize if self.budget.bytes else 0
            return [each * rank * (inner + out - rank) + order for rank in ranks]
        step = each * (inner + out)
        if not (self.unit or alone):
            step = min(step, inner * out)  # the choice that the layers' forward makes
        return [step * rank for rank in ranks]

    def _fixed(self, groups: Sequence[Group]) -> int:
        """The cost of everything except the low-rank terms."""
        if self.budget.macs:
            gone = (self.tokens[g[0]] * self.layers[g[0]].weight.numel() for g in groups if len(g) == 1)
            return self._macs - sum(gone)
        weights = {id(layer.weight): layer.weight.numel() for layer in self.layers.values()}
        shared = sum(self.layers[g[0]].weight.numel() for g in groups if len(g) > 1)
        fixed = self.unit * (ties.count_parameters(self.model) - sum(weights.values()) + shared)
        if self.budget.bytes:
            empty = surgery.skeleton(self.model)
            half = {p: max(1, min(weight_shape(layer)) // 2) for p, layer in self.layers.items()}
            self.spec.resolved(groups, half).apply(empty)
            fixed += header_bytes(empty) + 4 * len(self.layers)  # each offset in the file may need one more digit
        return fixed

    @cached_property
    def _of_teacher(self) -> int:
        if self.budget.macs:
            return original_macs(self.model)
        headers = header_bytes(self.model) if self.budget.bytes else 0
        return self.unit * original_parameters(self.model) + headers

    def errors_by_rank(self, group: Group, kind: str) -> list[list[float]] | None:
        """For every layer of a group, the errors with terms of rank 0, 1, …; None without a reference."""
        if self.reference is None:
            return None
        if (group, kind) not in self._errors:
            if kind != "weights":  # of all layers in one pass over the images
                self.reference.moments(list(self.layers), outputs=kind == "outputs")
            metrics = self.reference.metrics(group, kind, self.spec.ridge, self.spec.output_ridge)
            weights = [self.reference.weight(path) for path in group]
            measures = [metrics[path] for path in group]
            first = self.spec.init == "first"
            shared = 0 if len(group) == 1 else weights[0] if first else fit_shared(weights, measures)[0]
            found = []
            for weight, measure in zip(weights, measures, strict=True):
                left = left_out(spectrum(weight - shared, measure).values)
                # Errors of the model's output add up over layers and, within a layer, over the tokens of an image, of which Swin's first
                # stage has 64 times as many as its last. Errors of a layer's own output are taken relative to that output.
                whole = 1 / self.tokens[group[0]] if kind == "outputs" else max(measure.squared_norm(weight), TINY)
                found.append((left / whole).tolist())
            self._errors[group, kind] = found
        return self._errors[group, kind]


def _flat(chosen: Sequence[list[Group]]) -> list[Group]:
    return [group for way in chosen for group in way]
