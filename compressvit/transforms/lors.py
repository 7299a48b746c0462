"""LORS: the linear layers of a stack share one weight and keep a private low-rank term each.

Paper: LORS: Low-rank Residual Structure for Parameter-Efficient Network Stacking, CVPR 2024, https://arxiv.org/abs/2403.04303

The weight of layer i becomes `W_shared + up_i @ down_i` (static LORS; its K_i groups of rank r are one term of rank K_i·r). Biases
and norms stay private. With `share: 1` nothing is shared and the dense weight is gone: `up_i @ down_i` alone, which also cuts MACs.

The paper trains this from noise (`init: scratch`). From a trained model, the shared weight and the terms are fitted to its
weights, with errors measured where they matter: see `compressvit.lowrank`.
"""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from torch import nn

from compressvit import cost, surgery, ties
from compressvit.allocate import Budget, Curve, header_bytes, original_macs, original_parameters, spend
from compressvit.backbone import Backbone, describe, input_size, model_name, share_groups
from compressvit.errors import UserError, did_you_mean
from compressvit.layers.linear import FactoredLinear, SharedLowRankLinear
from compressvit.lowrank import TINY, fit_shared, spectrum
from compressvit.source import Source, tokens_at
from compressvit.transforms.base import Transform, transform
from compressvit.transforms.lors_plan import LORSPlan

TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@transform("lors", LORSPlan)
class LORS(Transform):
    """Share the weights of linear layers, with a private low-rank term each (LORS); or low rank alone."""

    rank: int | tuple[int, ...] | None = Field(
        None, description="Rank r of the private terms: one number, or one per block; 0 for none. Or give a budget."
    )
    budget: Budget | None = Field(
        None,
        description="Instead of ranks: what the student may cost. Ranks go where they remove the most error for it; with `share: 1` "
        "a layer stays dense where that is cheaper.",
    )
    groups: int | tuple[int, ...] = Field(
        1,
        description="The paper's K: terms of rank r in each layer, so that its rank is K·r; one number, or one per block.",
    )
    share: int | tuple[int, ...] | None = Field(
        None,
        description="Blocks in a share group: one number, or one per stage. 1 shares nothing and drops the dense weight. "
        "Null: as an earlier step shares them, and where none does, all blocks of a stage. What is not shared then keeps its weight.",
    )
    targets: tuple[str, ...] = Field(
        TARGETS, min_length=1, description="Linear layers of a block, by path within it; * matches any part."
    )
    init: Literal["fit", "first", "scratch"] = Field(
        "fit",
        description="fit: shared weight and terms from the teacher's weights; first: the shared weight is the first layer's; "
        "scratch: from noise as in the paper, the terms at zero (these layers only; student: {weights: random} is noise all over).",
    )
    metric: Literal["auto", "outputs", "inputs", "weights"] = Field(
        "auto",
        description="What an error is measured in. weights: the weight itself. inputs: the layer's output on calibration images "
        "(whitening). outputs: what the model computes on them. auto: what wins in our measurements, inputs for layers that share a "
        "weight and outputs for the others.",
    )
    sequential: bool = Field(
        True,
        description="Fit layers in the order they run, each on what the fitted layers before it produce, towards the teacher's hidden "
        "states, biases too. False: each as if all others were the teacher's. Ignored where nothing is measured on images.",
    )
    rounds: int = Field(
        4, ge=0, description="How often the shared weight is fitted again to what the private terms leave over."
    )
    ridge: float = Field(
        1e-3,
        ge=0,
        description="Added to the inputs' second moment, in parts of its mean: errors off the images count too.",
    )
    output_ridge: float = Field(
        0.1, ge=0, description="The same for the gradients' second moment; for metric: outputs."
    )

    @field_validator("rank", "groups", "share")
    @classmethod
    def _not_negative(cls, value, info):
        least = 1 if info.field_name == "share" else 0
        for number in (value,) if isinstance(value, int) else value or ():
            if number < least:
                raise ValueError(f"{info.field_name} is at least {least}, not {number}")
        return value

    @model_validator(mode="after")
    def _rank_or_budget(self) -> LORS:
        if (self.rank is None) == (self.budget is None):
            raise ValueError("lors needs a rank or a budget" + (", not both" if self.budget else ""))
        if self.budget and self.init == "scratch":
            raise ValueError("a budget is spent by the errors of a teacher's weights, which init: scratch does not use")
        if self.budget and self.groups != 1:
            raise ValueError("groups multiply the rank, which a budget chooses; leave groups out")
        return self

    @property
    def needs_images(self) -> bool:
        return self.init != "scratch" and self.metric != "weights"

    @property
    def provisional(self) -> bool:
        return self.budget is not None

    def plan(self, model: nn.Module, source: Source | None = None) -> LORSPlan:
        backbone = describe(model)
        groups = [g for target in self._targets(model, backbone) for g in self._groups(model, backbone, target)]
        ranks = (
            dict.fromkeys((path for g in groups for path in g), 0)
            if self.budget
            else self._ranks(model, backbone, groups)
        )
        self._refuse_conflicts(model, groups, ranks)
        if self.budget:
            chosen = self._spend(self.budget, model, groups, source)
            groups = [g for g in groups if chosen[g[0]] is not None]  # the others stay dense
            ranks = {path: rank for path, rank in chosen.items() if rank is not None}
        return self._resolved(groups, ranks)

    def _resolved(self, groups: list[tuple[str, ...]], ranks: dict[str, int]) -> LORSPlan:
        settings = self.model_dump(include={"init", "rounds", "ridge", "output_ridge"})
        sequential = self.sequential and self.needs_images
        return LORSPlan(
            groups=tuple(groups), ranks=ranks, metric=self._metric(groups), sequential=sequential, **settings
        )

    def _metric(self, groups: list[tuple[str, ...]]) -> Literal["weights", "inputs", "outputs"]:
        if self.metric != "auto":
            return self.metric
        return "inputs" if any(len(g) > 1 for g in groups) else "outputs"

    def _spend(
        self, budget: Budget, model: nn.Module, groups: list[tuple[str, ...]], source: Source | None
    ) -> dict[str, int | None]:
        """Ranks within a budget; without a source, uniform ones."""
        errors = self._errors(groups, source) if source is not None else {}
        layers: dict[str, Any] = {path: model.get_submodule(path) for g in groups for path in g}
        itemsize = next(model.parameters()).element_size()
        tokens = tokens_at(model, list(layers)) if budget.macs else {}
        unit = {"parameters": 1, "bytes": itemsize}.get(budget.unit, 0)
        curves = {}
        for group in groups:
            for path in group:
                inner, out = layers[path].in_features, layers[path].out_features
                # as the layers' forward chooses it
                macs = (
                    inner * out
                    if len(group) > 1 and tokens.get(path, 0) * (inner + out) >= inner * out
                    else (tokens.get(path, 0) * (inner + out))
                )
                most = min(inner, out)
                curves[path] = Curve(
                    step=unit * (inner + out) or macs,
                    least=1 if len(group) == 1 else 0,
                    most=most,
                    dense=(unit or tokens[path]) * inner * out if len(group) == 1 else None,
                    errors=errors.get(path, [0.0] * (most + 1)),
                )
        weights = {id(layer.weight): layer.weight.numel() for layer in layers.values()}
        shared = sum(layers[g[0]].weight.numel() for g in groups if len(g) > 1)
        if budget.macs:
            size = input_size(model)
            fixed = cost.macs(model, size) - sum(
                tokens[g[0]] * layers[g[0]].weight.numel() for g in groups if len(g) == 1
            )
            of_teacher = original_macs(model)
        else:
            fixed = unit * (ties.count_parameters(model) - sum(weights.values()) + shared)
            of_teacher = unit * original_parameters(model)
            if budget.bytes:
                empty = surgery.skeleton(model)
                half = {path: max(1, curve.most // 2) for path, curve in curves.items()}
                self._resolved(groups, half).apply(empty)
                fixed += header_bytes(empty) + 4 * len(layers)  # the offsets may have a digit more each
                of_teacher += header_bytes(model)
        return spend(budget, curves, fixed=fixed, of_teacher=of_teacher, by_error=source is not None, asker="lors")

    def _errors(self, groups: list[tuple[str, ...]], source: Source) -> dict[str, list[float]]:
        """For every layer, the error that a term of rank 0, 1, … leaves."""
        kind = self._metric(groups)
        metrics = source.metrics([path for g in groups for path in g], kind, self.ridge, self.output_ridge)
        errors = {}
        for group in groups:
            weights = [source.weight(path) for path in group]
            measures = [metrics[path] for path in group]
            shared = 0 if len(group) == 1 else weights[0] if self.init == "first" else fit_shared(weights, measures)[0]
            for path, weight, measure in zip(group, weights, measures, strict=True):
                left = spectrum(weight - shared, measure).values.square().flip(0).cumsum(0).flip(0)
                # What the model's output loses adds up over layers; a layer's own errors are taken relative to what it computes.
                whole = 1.0 if kind == "outputs" else max(measure.squared_norm(weight), TINY)
                errors[path] = [*(left / whole).tolist(), 0.0]
        return errors

    def _targets(self, model: nn.Module, backbone: Backbone) -> list[str]:
        """The relative paths that the patterns name, which every block has."""
        block = model.get_submodule(backbone.blocks[0].path)
        known = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        found: list[str] = []
        for pattern in self.targets:
            matches = [name for name in known if fnmatch(name, pattern)]
            if not matches:
                raise UserError(
                    f"lors.targets: {pattern!r} matches no linear layer of {backbone.blocks[0].path} of {model_name(model)}; "
                    + did_you_mean(pattern, known)
                )
            found += [name for name in matches if name not in found]
        return found

    def _groups(self, model: nn.Module, backbone: Backbone, target: str) -> list[tuple[str, ...]]:
        """The layers called `target`, grouped by `share`."""
        if self.share is not None:
            return [tuple(f"{path}.{target}" for path in g) for g in share_groups(model, self.share, "lors.share")]
        stages = [tuple(f"{block.path}.{target}" for block in stage) for stage in backbone.stages]
        names = {f"{path}.weight" for stage in stages for path in stage}
        tied = [tuple(n.removesuffix(".weight") for n in g) for g in ties.tied_groups(model) if set(g) <= names]
        return tied or [stage for stage in stages if len(stage) > 1]

    def _ranks(self, model: nn.Module, backbone: Backbone, groups: list[tuple[str, ...]]) -> dict[str, int]:
        blocks = [block.path for block in backbone.blocks]
        columns = {}
        for name in ("rank", "groups"):
            value: Any = getattr(self, name)
            columns[name] = (value,) * len(blocks) if isinstance(value, int) else value
            if len(columns[name]) != len(blocks):
                raise UserError(
                    f"lors.{name} lists {len(columns[name])} numbers, but {model_name(model)} has {len(blocks)} blocks; "
                    "give one number, or one per block"
                )
        of_block = {b: r * k for b, r, k in zip(blocks, columns["rank"], columns["groups"], strict=True)}
        return {path: next(r for b, r in of_block.items() if path.startswith(f"{b}.")) for g in groups for path in g}

    def _refuse_conflicts(self, model: nn.Module, groups: list[tuple[str, ...]], ranks: dict[str, int]) -> None:
        tied = {n: group for group in ties.tied_groups(model) for n in group}
        for group in groups:
            for path in group:
                layer: Any = model.get_submodule(path)
                if isinstance(layer, (SharedLowRankLinear, FactoredLinear)):
                    raise UserError(
                        f"lors is applied twice: {path} has a low-rank term already; give the two steps different targets, "
                        "or merge them into one with a larger rank"
                    )
                most = min(layer.in_features, layer.out_features)
                if ranks[path] > most:
                    raise UserError(
                        f"lors: rank {ranks[path]} of {path} is larger than its {layer.out_features}×{layer.in_features} weight "
                        f"allows; it can be at most {most}"
                    )
                if len(group) == 1 and not ranks[path] and not self.budget:
                    raise UserError(
                        f"lors: rank 0 with share 1 would leave {path} without a weight; give a rank of at least 1, or share more blocks"
                    )
                already = tied.get(f"{path}.weight")
                if already and already != [f"{p}.weight" for p in group]:
                    raise UserError(
                        f"lors wants {path} to share its weight with {len(group) - 1} other layers, but an earlier step shares it with "
                        f"{len(already) - 1}; leave lors.share out, which keeps that, or give both steps the same share"
                    )
