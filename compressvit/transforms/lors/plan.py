"""A resolved `LORS`: its structure, and the values it starts with."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from compressvit.fitting.in_order import LayerFit
from compressvit.fitting.lowrank import TINY, Metric, cholesky, fit_shared, spectrum
from compressvit.fitting.moments import Source
from compressvit.fitting.regression import Regression
from compressvit.model import surgery, ties
from compressvit.transforms.base import LedgerEntry, Plan
from compressvit.transforms.lors.layers import FactoredLinear, LowRank, SharedLowRankLinear


class LORSPlan(Plan):
    """A resolved `LORS`: groups of linear layers that share a weight (alone: it is gone), and the rank of each layer's term."""

    foldable: ClassVar[bool] = True
    starts: ClassVar[tuple[str, ...]] = ("init", "metric", "sequential", "rounds", "ridge", "output_ridge")

    groups: tuple[tuple[str, ...], ...]
    ranks: dict[str, Annotated[int, Field(ge=0)]]
    dense: tuple[str, ...] = ()  # layers that were looked at and stay as they are
    init: Literal["fit", "first", "scratch"]
    metric: Literal["weights", "inputs", "outputs"]
    sequential: bool = False  # as artifacts have it that were written before there was a choice
    rounds: int
    ridge: float
    output_ridge: float

    @property
    def paths(self) -> list[str]:
        """All layers, group by group."""
        return [path for group in self.groups for path in group]

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        before = ties.count_at_paths(model, self.paths)
        ties.tie(model, [[f"{path}.weight" for path in group] for group in self.groups if len(group) > 1])
        for group in self.groups:
            for path in group:
                if self.ranks[path]:
                    self._add_term(model, path, alone=len(group) == 1)
        after = ties.count_at_paths(model, self.paths)
        whole = ties.count_at_paths(model, self.dense)
        return [
            LedgerEntry(path, self._change(group, path), before[path], after[path])
            for group in self.groups
            for path in group
        ] + [LedgerEntry(path, "stays dense", count, count) for path, count in whole.items()]

    def _add_term(self, model: nn.Module, path: str, *, alone: bool) -> None:
        layer = model.get_submodule(path)
        like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        term = LowRank(layer.in_features, layer.out_features, self.ranks[path], **like)
        surgery.specialise(model, path, FactoredLinear if alone else SharedLowRankLinear)
        if alone:
            surgery.drop_parameter(model, path, "weight")
        surgery.fill_slot(model, path, "low_rank", term)

    def _change(self, group: tuple[str, ...], path: str) -> str:
        rank = self.ranks[path]
        if len(group) == 1:
            return f"low rank {rank} in place of the weight"
        owner = f"owns the weight of {len(group)} layers" if path == group[0] else f"shares the weight of {group[0]}"
        return f"{owner}; + private rank {rank}" if rank else owner

    @torch.no_grad()
    def initialise(self, student: nn.Module, source: Source) -> None:
        terms = {path: student.get_submodule(path).low_rank for path in self.paths if self.ranks[path]}
        if self.init == "scratch":
            for group in self.groups:
                layer = student.get_submodule(group[0])
                if len(group) > 1:
                    nn.init.trunc_normal_(layer.weight, std=0.02)  # as timm starts its linear layers
            for path, term in terms.items():
                term.reset_zero()
                if isinstance(
                    student.get_submodule(path), FactoredLinear
                ):  # a product with zero would stay zero for long
                    nn.init.trunc_normal_(term.up, std=0.02)
            return
        metrics = source.metrics(self.paths, self.metric, self.ridge, self.output_ridge)
        for group in self.groups:
            weights = [source.weight(path) for path in group]
            ranks = [self.ranks[path] for path in group]
            measures = [metrics[path] for path in group]
            if len(group) == 1:
                factors = [spectrum(weights[0], measures[0]).factors(ranks[0])]
            elif self.init == "first":
                student.get_submodule(group[0]).weight.copy_(weights[0])
                factors = [
                    spectrum(w - weights[0], m).factors(r) for w, m, r in zip(weights, measures, ranks, strict=True)
                ]
            else:
                shared, factors = fit_shared(weights, measures, ranks, self.rounds)
                student.get_submodule(group[0]).weight.copy_(shared)
            for path, pair in zip(group, factors, strict=True):
                if path in terms:
                    terms[path].set_factors(*pair)

    def layer_fits(self, student: nn.Module, source: Source) -> dict[str, LayerFit]:
        """Private terms and biases are fitted again to what the fitted layers before them produce."""
        if not (self.sequential and self.paths):
            return {}
        by_gradient = self.metric == "outputs"
        moments = source.moments(self.paths, outputs=by_gradient)
        if source.too_alike:
            return {}
        shared = {name for group in ties.tied_groups(student) for name in group}
        return {
            path: LayerFit(
                partial(self._fit, student.get_submodule(path), path, f"{path}.bias" not in shared, source),
                moments[path].prefix_weight if by_gradient else 1.0,
            )
            for path in self.paths
        }

    def _fit(
        self, target: Any, path: str, own_bias: bool, source: Source, working: Any, regression: Regression
    ) -> float:
        """Fit one layer of the working copy and give `target`, the student's, the same values; returns the error that is left."""
        zeros = torch.zeros(working.out_features, dtype=torch.float64)
        bias = zeros if working.bias is None else working.bias.cpu().double()
        free = own_bias and working.bias is not None
        if self.ranks[path]:
            fixed: Any = working.weight.cpu().double() if isinstance(working, SharedLowRankLinear) else 0.0
            wanted, moment = regression.solve(source.weight(path), None if free else bias)
            ridge = self.output_ridge if self.metric == "outputs" else None
            outer = source.moments([path], outputs=False)[path].output_factor(ridge, regression.scale)
            factors = spectrum(wanted - fixed, Metric(cholesky(moment, self.ridge), outer)).factors(self.ranks[path])
            for layer in (working, target):
                layer.low_rank.set_factors(*factors)
        weight = (working.effective_weight() if self.ranks[path] else working.weight).cpu().double()
        if free:
            bias = regression.whole.best_bias(weight)
            for layer in (working, target):
                layer.bias.copy_(bias)
        return regression.error(weight, bias)

    def drops(self) -> set[str]:
        return {f"{path}.weight" for group in self.groups if len(group) == 1 for path in group if self.ranks[path]}

    def fitted(self) -> set[str]:
        return {f"{path}.weight" for path in self.paths}

    @torch.no_grad()
    def errors(self, student: nn.Module, source: Source) -> dict[str, tuple[float, float | None]]:
        if self.init == "scratch":
            return {}
        measures = source.metrics(self.paths, "inputs", 0.0, 0.0) if self.metric != "weights" else {}
        result = {}
        for path in self.paths:
            layer: Any = student.get_submodule(path)
            weight = source.weight(path)
            lost = weight - (layer.effective_weight() if self.ranks[path] else layer.weight).cpu().double()
            output_error = None
            if path in measures:
                output_error = (
                    measures[path].squared_norm(lost) / max(measures[path].squared_norm(weight), TINY)
                ) ** 0.5
            result[path] = ((lost.norm() / weight.norm().clamp(min=TINY)).item(), output_error)
        return result

    def fold(self, model: nn.Module) -> None:
        """Every layer becomes timm's own linear layer with its effective weight: nothing is shared any more."""
        # All weights first: assigning one would change its siblings, which still share it.
        weights = {}
        for path in self.paths:
            layer = model.get_submodule(path)
            weight = layer.effective_weight() if self.ranks[path] else layer.weight
            trained = any(p.requires_grad for p in layer.parameters())
            weights[path] = nn.Parameter(weight.detach().clone(), requires_grad=trained)
        for path, weight in weights.items():
            if self.ranks[path]:
                surgery.generalise(model, path, nn.Linear)
            model.get_submodule(path).weight = weight
