"""What a budget buys for `lors`: the ranks of its terms, and which layers share a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import nn

from compressvit.fitting.allocate import Budget, Curve, allocate, least_cost, spend
from compressvit.fitting.lowrank import TINY, fit_shared, spectrum
from compressvit.fitting.moments import Source, tokens_at
from compressvit.model import cost, surgery, ties
from compressvit.model.backbone import input_size
from compressvit.model.cost import header_bytes
from compressvit.transforms.base import Plan
from compressvit.transforms.lors.layers import FactoredLinear

Group = tuple[str, ...]
Kind = Literal["weights", "inputs", "outputs"]


class Spender(Protocol):
    """What a step must say so that a budget can be spent for it."""

    @property
    def budget(self) -> Budget | None: ...
    @property
    def metric(self) -> Literal["auto"] | Kind: ...
    @property
    def init(self) -> str: ...
    @property
    def ridge(self) -> float: ...
    @property
    def output_ridge(self) -> float: ...

    def metric_for(self, groups: Sequence[Group]) -> Kind:
        """What errors of these groups are measured in."""

    def resolved(self, groups: Sequence[Group], ranks: dict[str, int]) -> Plan:
        """The plan for these groups and ranks."""


def original_parameters(model: nn.Module) -> int:
    """What the model had before anything was shared, added or dropped: every path counts."""
    added = surgery.added_parameters(model)
    kept = sum(p.numel() for n, p in model.named_parameters(remove_duplicate=False) if n not in added)
    return kept + sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, FactoredLinear))


def original_macs(model: nn.Module) -> int:
    """Multiply-accumulates for one image of the model as it was before anything was added or dropped."""
    empty: Any = surgery.skeleton(model)
    dropped = [module for module in empty.modules() if isinstance(module, FactoredLinear)]
    surgery.strip(empty)
    for module in dropped:
        weight = torch.empty(module.out_features, module.in_features, device="meta")
        module.register_parameter("weight", nn.Parameter(weight))
    return cost.macs(empty, input_size(model))


class Spending:
    """Spends the budget of a `lors` step on groups of layers of one model; errors that were computed once are kept.

    Args:
        spec: the step, with a budget.
        model: what earlier transforms made of it, possibly on the meta device.
        source: where errors come from; without it all are taken to be alike, and ranks are uniform.
        paths: the layers.
    """

    def __init__(self, spec: Spender, model: nn.Module, source: Source | None, paths: Sequence[str]):
        assert spec.budget is not None
        self.spec, self.budget, self.model, self.source = spec, spec.budget, model, source
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
            of_teacher=self._of_teacher(),
            by_error=self.source is not None,
            asker="lors",
        )

    def choose(self, choices: Sequence[Sequence[list[Group]]]) -> list[Group]:
        """One way to group each set of layers, so that the least error is left at the budget.

        Starts from the first way of each and changes one at a time, as long as that helps.
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
        # Relative to each layer's output: the metric of the model's output says little where layers share (see README).
        kind = "inputs" if self.spec.metric == "auto" else self.spec.metric
        curves = self._curves(groups, kind)
        left = self.budget.limit(self._of_teacher()) - self._fixed(groups)
        if left < least_cost(curves):
            return math.inf
        return sum(0.0 if rank is None else curves[p].errors[rank] for p, rank in allocate(curves, left).items())

    def _curves(self, groups: Sequence[Group], kind: str) -> dict[str, Curve]:
        curves = {}
        for group in groups:
            errors = self.errors_by_rank(group, kind)
            for position, path in enumerate(group):
                inner, out = self.layers[path].in_features, self.layers[path].out_features
                curves[path] = Curve(
                    step=self.unit * (inner + out) or self._macs_of_a_rank(path, alone=len(group) == 1),
                    least=1 if len(group) == 1 else 0,
                    most=min(inner, out),
                    dense=(self.unit or self.tokens[path]) * inner * out if len(group) == 1 else None,
                    errors=errors[position] if errors else [0.0] * (min(inner, out) + 1),
                )
        return curves

    def _macs_of_a_rank(self, path: str, *, alone: bool) -> int:
        inner, out = self.layers[path].in_features, self.layers[path].out_features
        by_tokens = self.tokens[path] * (inner + out)
        return by_tokens if alone else min(by_tokens, inner * out)  # as the layers' forward chooses it

    def _fixed(self, groups: Sequence[Group]) -> int:
        """What everything but the terms costs."""
        if self.budget.macs:
            gone = (self.tokens[g[0]] * self.layers[g[0]].weight.numel() for g in groups if len(g) == 1)
            return self._macs - sum(gone)
        weights = {id(layer.weight): layer.weight.numel() for layer in self.layers.values()}
        shared = sum(self.layers[g[0]].weight.numel() for g in groups if len(g) > 1)
        fixed = self.unit * (ties.count_parameters(self.model) - sum(weights.values()) + shared)
        if self.budget.bytes:
            empty = surgery.skeleton(self.model)
            half = {p: max(1, min(layer.in_features, layer.out_features) // 2) for p, layer in self.layers.items()}
            self.spec.resolved(groups, half).apply(empty)
            fixed += header_bytes(empty) + 4 * len(self.layers)  # the offsets may have a digit more each
        return fixed

    def _of_teacher(self) -> int:
        if self.budget.macs:
            return original_macs(self.model)
        headers = header_bytes(self.model) if self.budget.bytes else 0
        return self.unit * original_parameters(self.model) + headers

    def errors_by_rank(self, group: Group, kind: str) -> list[list[float]] | None:
        """For every layer of a group, the error that a term of rank 0, 1, … leaves; None without a source."""
        if self.source is None:
            return None
        if (group, kind) not in self._errors:
            if kind != "weights":  # of all layers in one pass over the images
                self.source.moments(list(self.layers), outputs=kind == "outputs")
            metrics = self.source.metrics(group, kind, self.spec.ridge, self.spec.output_ridge)
            weights = [self.source.weight(path) for path in group]
            measures = [metrics[path] for path in group]
            first = self.spec.init == "first"
            shared = 0 if len(group) == 1 else weights[0] if first else fit_shared(weights, measures)[0]
            found = []
            for weight, measure in zip(weights, measures, strict=True):
                left = spectrum(weight - shared, measure).values.square().flip(0).cumsum(0).flip(0)
                # What the model's output loses adds up over layers, and in a layer over the tokens of an image, of which Swin's first
                # stage has 64 times as many as its last; a layer's own errors are taken relative to what it computes.
                whole = 1 / self.tokens[group[0]] if kind == "outputs" else max(measure.squared_norm(weight), TINY)
                found.append([*(left / whole).tolist(), 0.0])
            self._errors[group, kind] = found
        return self._errors[group, kind]


def group_by_similarity(paths: Sequence[str], count: int, source: Source, kind: str, ridge: float) -> list[Group]:
    """Put layers of one shape into `count` groups of layers that lose least by sharing one weight, wherever in the model they are.

    Average-linkage clustering; the distance of two layers is the difference of their weights in the mean of their metrics, relative to
    the weights, which is twice what is lost where both take their mean. Groups are of any size: a layer that is like no other is one by
    itself. Within a group, and groups by their first layer, the order stays.

    Args:
        paths: linear layers of one shape.
        count: from 1 to the number of layers.
        source: their values and moments.
        kind: 'weights' or 'inputs'.
        ridge: of the metric.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import squareform

    if count >= len(paths):
        return [(path,) for path in paths]
    metrics = source.metrics(paths, kind, ridge, 0.0)
    weights = [source.weight(path) for path in paths]
    own = [metrics[path].squared_norm(weight) for path, weight in zip(paths, weights, strict=True)]
    distances = torch.zeros(len(paths), len(paths), dtype=torch.float64)
    for i in range(len(paths)):
        for j in range(i):
            lost = sum(metrics[paths[k]].squared_norm(weights[i] - weights[j]) for k in (i, j))
            distances[i, j] = distances[j, i] = (lost / max(own[i] + own[j], TINY)) ** 0.5
    tree = linkage(squareform(distances.numpy(), checks=False), method="average")
    labels = cut_tree(tree, n_clusters=count)[:, 0]  # exactly so many, ties or not
    groups: dict[int, list[str]] = {}
    for path, label in zip(paths, labels, strict=True):
        groups.setdefault(int(label), []).append(path)
    return [tuple(group) for group in groups.values()]


def _flat(chosen: Sequence[list[Group]]) -> list[Group]:
    return [group for way in chosen for group in way]
