"""A resolved `LORS`: its structure and its initial values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from compressvit.fitting.lowrank import Metric, fit_shared, spectrum
from compressvit.fitting.reference import Reference
from compressvit.log import working
from compressvit.model import surgery, ties
from compressvit.transforms.claims import Claim, drops, tie
from compressvit.transforms.lors.layers import LowRankTerm, SharedLowRankLinear
from compressvit.transforms.low_rank.base import RankPlan
from compressvit.transforms.low_rank.layer import Factored, factor
from compressvit.transforms.low_rank.spec import dropped, factor_names, start_from_noise_


class LORSPlan(RankPlan):
    """A resolved `LORS`: groups of linear layers that share a weight, and the rank of each layer's term. The layer of a group of one
    is only low rank."""

    starts: ClassVar[tuple[str, ...]] = (*RankPlan.starts, "rounds", "shared_init")

    groups: tuple[tuple[str, ...], ...]
    init: Literal["fit", "first", "scratch"]
    rounds: int
    shared_init: Literal["released", "kaiming"] = "released"

    @property
    def paths(self) -> list[str]:
        return [path for group in self.groups for path in group]

    @property
    def _alone(self) -> list[str]:
        return [group[0] for group in self.groups if len(group) == 1]

    def claims(self, model: nn.Module) -> list[Claim]:
        keep = "leave lors.share and group_by out, which keeps that, or give both steps the same share"
        ties = [tie([f"{path}.weight" for path in group], keep) for group in self.groups if len(group) > 1]
        return [*super().claims(model), *ties, *drops(self.drops(model), keep)]

    def drops(self, model: nn.Module) -> set[str]:
        return dropped(model, self._alone)

    def change(self, model: nn.Module) -> dict[str, str]:
        ties.tie(model, [[f"{path}.weight" for path in group] for group in self.groups if len(group) > 1])
        texts = {}
        for group in self.groups:
            for path in group:
                rank = self.ranks[path]
                if len(group) == 1:
                    factor(model, path, rank)
                    texts[path] = f"low rank {rank} in place of the weight"
                    continue
                owner = f"owns the weight of {len(group)} layers"
                texts[path] = owner if path == group[0] else f"shares the weight of {group[0]}"
                if rank:
                    self._add_term(model, path)
                    texts[path] += f"; + private rank {rank}"
        return texts

    def _add_term(self, model: nn.Module, path: str) -> None:
        layer = surgery.specialise(model, path, SharedLowRankLinear)
        like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        term = LowRankTerm(layer.in_features, layer.out_features, self.ranks[path], **like)
        surgery.fill_slot(model, path, "low_rank", term)

    @torch.no_grad()
    def initialise(self, student: nn.Module, reference: Reference) -> None:
        layers: dict[str, Any] = {path: student.get_submodule(path) for path in self.paths}
        if self.init == "scratch":
            self._start_from_noise(layers)
            return
        metrics = reference.metrics(self.paths, self.metric, self.ridge, self.output_ridge)
        parts = [(self.rounds + 1) * (len(group) + 1) if self._is_fitted(group) else 1 for group in self.groups]
        with working("fitting layers that share weights", sum(parts)) as advance:
            self._fit_groups(layers, metrics, reference, advance)

    def _is_fitted(self, group: Sequence[str]) -> bool:
        """Whether the weight that a group shares is fitted to all of them."""
        return len(group) > 1 and self.init == "fit"

    def _fit_groups(
        self,
        layers: Mapping[str, Any],
        metrics: Mapping[str, Metric],
        reference: Reference,
        advance: Callable[..., object],
    ) -> None:
        for group in self.groups:
            weights = [reference.weight(path) for path in group]
            ranks = [self.ranks[path] for path in group]
            measures = [metrics[path] for path in group]
            if self._is_fitted(group):
                shared, factors = fit_shared(weights, measures, ranks, self.rounds, advance=advance)
                layers[group[0]].weight.copy_(shared)
            elif len(group) == 1:
                factors = [spectrum(weights[0], measures[0]).factors(ranks[0])]
                advance()
            else:
                layers[group[0]].weight.copy_(weights[0])
                factors = [
                    spectrum(w - weights[0], m).factors(r) for w, m, r in zip(weights, measures, ranks, strict=True)
                ]
                advance()
            for path, pair in zip(group, factors, strict=True):
                if self.ranks[path]:
                    layers[path].set_factors(*pair)

    def _start_from_noise(self, layers: dict[str, Any]) -> None:
        for group in self.groups:
            if len(group) > 1:
                weight = layers[group[0]].weight
                if self.shared_init == "kaiming":
                    nn.init.kaiming_uniform_(weight)
                elif ".mlp." in group[0]:
                    nn.init.xavier_uniform_(weight)
                else:
                    nn.init.trunc_normal_(weight, std=0.02)
        for path, layer in layers.items():
            if isinstance(layer, Factored):
                start_from_noise_(layer)
            elif self.ranks[path]:
                layer.low_rank.reset_zero()

    def errors(self, student: nn.Module, reference: Reference) -> dict[str, tuple[float | None, float | None]]:
        return {} if self.init == "scratch" else super().errors(student, reference)

    def fitted(self) -> set[str]:
        return factor_names(self._alone) | {f"{path}.weight" for path in self.paths if path not in self._alone}
