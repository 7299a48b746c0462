"""LORS: the linear layers of a stack share one weight and keep a private low-rank term each.

Paper: LORS: Low-rank Residual Structure for Parameter-Efficient Network Stacking, CVPR 2024, https://arxiv.org/abs/2403.04303

The weight of layer i becomes `W_shared + up_i @ down_i` (static LORS; its K_i groups of rank r are one term of rank K_i·r). Biases
and norms stay private. With `share: 1` nothing is shared and the dense weight is gone: `up_i @ down_i` alone, which also cuts MACs.

The paper trains this from noise (`init: scratch`). From a trained model, the shared weight and the terms are fitted to its
weights, with errors measured where they matter: see `compressvit.lowrank`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from torch import nn

from compressvit.errors import UserError, did_you_mean
from compressvit.fitting.allocate import Budget
from compressvit.fitting.moments import Source
from compressvit.model import surgery, ties
from compressvit.model.backbone import Backbone, describe, model_name, share_groups
from compressvit.transforms.base import TRANSFORMERS_ONLY, Transform, transform
from compressvit.transforms.lors.budget import Spending, group_by_similarity
from compressvit.transforms.lors.layers import FactoredLinear, SharedLowRankLinear
from compressvit.transforms.lors.plan import LORSPlan

TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@transform("lors", LORSPlan)
class LORS(Transform):
    """Share the weights of linear layers, with a private low-rank term each (LORS); or low rank alone."""

    refuses: ClassVar[dict[str, str]] = TRANSFORMERS_ONLY
    changes_at_start = True
    blind_at_start: ClassVar[dict[str, str]] = {
        "low_rank.down": "where the shared weight is exact, or noise, the factor after it starts at zero"
    }

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
    share: int | tuple[int, ...] | Literal["auto"] | None = Field(
        None,
        description="Blocks in a share group: one number, or one per stage. 1 shares nothing and drops the dense weight. "
        "Null: as an earlier step shares them, and where none does, all blocks of a stage. What is not shared then keeps its weight. "
        "auto: for each kind of layer of each stage what leaves the least error in the budget, 1 included.",
    )
    group_by: Literal["consecutive", "similarity"] = Field(
        "consecutive",
        description="similarity: a stage has as many groups as with `share` consecutive blocks, of the layers that lose least by sharing, "
        "wherever they are and however many.",
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
        description="Added to the inputs' second moment, in parts of its mean, at least 1e-6: errors off the images count too.",
    )
    output_ridge: float = Field(
        0.1, ge=0, description="The same for the gradients' second moment; for metric: outputs."
    )

    @field_validator("rank", "groups", "share")
    @classmethod
    def _not_negative(cls, value, info):
        least = 1 if info.field_name == "share" else 0
        for number in (value,) if isinstance(value, int) else () if value == "auto" else value or ():
            if number < least:
                raise ValueError(f"{info.field_name} is at least {least}, not {number}")
        return value

    @model_validator(mode="after")
    def _rank_or_budget(self) -> LORS:
        if (self.rank is None) == (self.budget is None):
            raise ValueError("lors needs a rank or a budget" + (", not both" if self.budget else ""))
        if self.budget and self.init == "scratch":
            raise ValueError("a budget is spent by the errors of a teacher's weights, which init: scratch does not use")
        if self.share == "auto" and not self.budget:
            raise ValueError("share: auto chooses by what is left of a budget; give one, or a number of blocks")
        if self.group_by == "similarity" and self.init == "scratch":
            raise ValueError("layers that start from noise are all alike; leave group_by: similarity out")
        if self.group_by == "similarity" and self.share is None:
            raise ValueError(
                "group_by: similarity makes groups of its own, so it needs share: a number of blocks, or auto"
            )
        if self.budget and self.groups != 1:
            raise ValueError("groups multiply the rank, which a budget chooses; leave groups out")
        return self

    @property
    def needs_images(self) -> bool:
        return self.init != "scratch" and self.metric != "weights"

    @property
    def provisional(self) -> tuple[str, ...]:
        on = "in the weights" if self.metric == "weights" else "on the calibration images"
        notes = []
        if self.budget:
            notes.append(f"ranks are uniform in this plan; apply spends the same budget by the errors it measures {on}")
        if self.share == "auto":
            notes.append(
                "nothing is shared in this plan; apply shares weights where that leaves less error in the budget, and with other groups "
                "MACs, layer pairs and loss memory may be others"
            )
        elif self.group_by == "similarity":
            notes.append(
                f"groups are consecutive in this plan; apply makes as many of the layers that are most alike {on}"
            )
        return tuple(notes)

    @classmethod
    def examples(cls) -> Sequence[Transform]:
        return (
            LORS(rank=2, share=2, metric="weights"),
            LORS(rank=3, groups=2, share=2, targets=("mlp.*",), init="first", metric="weights"),
            LORS(rank=2, targets=("attn.qkv", "attn.proj"), init="scratch"),
            LORS(rank=2, share=1, metric="weights"),
        )

    def plan(self, model: nn.Module, source: Source | None = None) -> LORSPlan:
        backbone = describe(model, "attention")
        targets = self._targets(model, backbone)
        self._refuse_shapes(model, backbone, targets)
        self._refuse_order(model)
        if source is not None and self.group_by == "similarity" and self.metric != "weights":
            every = [f"{block.path}.{target}" for block in backbone.blocks for target in targets]
            # all in one pass over the images, for whatever comes of it
            source.moments(every, outputs=self.metric == "outputs" or (self.metric == "auto" and self.share == "auto"))
        if not self.budget:
            found = [g for target in targets for g in self._groups(model, backbone, target, self.share, source)]
            # a layer that is like no other shares with none, which is no reason to take its weight away
            alone = self.group_by == "similarity" and self.share not in (1, (1,) * len(backbone.stages))
            groups = [g for g in found if len(g) > 1 or not alone]
            ranks = self._ranks(model, backbone, groups)
            self._refuse_conflicts(model, groups, ranks)
            return self.resolved(groups, ranks, dense=[path for g in found if g not in groups for path in g])
        choices = [ways for target in targets for ways in self._choices(model, backbone, target, source)]
        every = [path for ways in choices for group in ways[0] for path in group]
        groups = [group for ways in choices for group in ways[0]]
        self._refuse_conflicts(model, groups, dict.fromkeys(every, 0))
        spending = Spending(self, model, source, every)
        if self.share == "auto" and source is not None:
            groups = spending.choose(choices)
        chosen = spending.ranks(groups)
        kept = [g for g in groups if chosen[g[0]] is not None]
        ranks = {path: rank for path, rank in chosen.items() if rank is not None}
        return self.resolved(kept, ranks, dense=[path for path, rank in chosen.items() if rank is None])

    def resolved(self, groups: Sequence[tuple[str, ...]], ranks: dict[str, int], dense: Sequence[str] = ()) -> LORSPlan:
        """The plan for these groups and ranks, with layers that stay dense."""
        settings = self.model_dump(include={"init", "rounds", "ridge", "output_ridge"})
        sequential = self.sequential and self.needs_images
        return LORSPlan(
            groups=tuple(groups),
            ranks=ranks,
            dense=tuple(dense),
            metric=self.metric_for(groups),
            sequential=sequential,
            **settings,
        )

    def metric_for(self, groups: Sequence[tuple[str, ...]]) -> Literal["weights", "inputs", "outputs"]:
        """What errors of these groups are measured in."""
        if self.metric != "auto":
            return self.metric
        return "inputs" if any(len(g) > 1 for g in groups) else "outputs"

    def _choices(
        self, model: nn.Module, backbone: Backbone, target: str, source: Source | None
    ) -> list[list[list[tuple[str, ...]]]]:
        """For every stage, the ways to group its layers called `target`: one, or with `share: auto` every one that divides it."""
        depths = [len(stage) for stage in backbone.stages]
        shares: list[Any] = [self.share]
        if self.share == "auto":
            shares = [tuple(math.gcd(d, n) for d in depths) for n in range(1, max(depths) + 1)]
        groupings = [self._groups(model, backbone, target, share, source) for share in dict.fromkeys(shares)]
        choices = []
        for stage in backbone.stages:
            paths = {f"{block.path}.{target}" for block in stage}
            ways = [tuple(g for g in groups if g[0] in paths) for groups in groupings]
            choices.append([list(way) for way in dict.fromkeys(ways)])
        return choices

    def _targets(self, model: nn.Module, backbone: Backbone) -> list[str]:
        """The relative paths that the patterns name, which every block has."""
        block = model.get_submodule(backbone.blocks[0].path)
        linear = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        of_steps = surgery.added_modules(block)  # earlier steps' own layers
        known = [name for name, _ in block.named_modules() if name in linear and name not in of_steps]
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

    def _groups(
        self,
        model: nn.Module,
        backbone: Backbone,
        target: str,
        share: int | tuple[int, ...] | None,
        source: Source | None,
    ) -> list[tuple[str, ...]]:
        """The layers called `target`, grouped by `share`."""
        stages = [tuple(f"{block.path}.{target}" for block in stage) for stage in backbone.stages]
        if share is None:
            names = {f"{path}.weight" for stage in stages for path in stage}
            tied = [tuple(n.removesuffix(".weight") for n in g) for g in ties.tied_groups(model) if set(g) <= names]
            return tied or [stage for stage in stages if len(stage) > 1]
        consecutive = [tuple(f"{path}.{target}" for path in g) for g in share_groups(model, share, "lors.share")]
        if self.group_by == "consecutive" or source is None:
            return consecutive
        kind = "weights" if self.metric == "weights" else "inputs"
        return [
            group
            for stage in stages
            for group in group_by_similarity(stage, sum(g[0] in stage for g in consecutive), source, kind, self.ridge)
        ]

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

    def _refuse_shapes(self, model: nn.Module, backbone: Backbone, targets: Sequence[str]) -> None:
        modules = dict(model.named_modules())
        for target in targets:
            for stage in backbone.stages:
                layers = {path: modules.get(path) for path in (f"{block.path}.{target}" for block in stage)}
                for path, layer in layers.items():
                    if not isinstance(layer, nn.Linear):
                        raise UserError(
                            f"lors.targets: {path} of {model_name(model)} is no linear layer, as {target} is in its first block; name "
                            "targets that every block has"
                        )
                if self.share != "auto" and self.group_by != "similarity":
                    continue
                (first, one), *others = layers.items()
                for path, other in others:
                    if (one.in_features, one.out_features) != (other.in_features, other.out_features):  # type: ignore[union-attr]
                        raise UserError(
                            f"lors: {first} and {path} are of different shapes and cannot share a weight, which share: auto and "
                            "group_by: similarity may choose for any layers of a stage; give share as numbers of consecutive blocks of one "
                            "shape, or name other targets"
                        )

    def _refuse_order(self, model: nn.Module) -> None:
        """Steps before this one whose work it would undo, or that left nothing to fit to."""
        done = getattr(model, "_compression", None)
        for plan in done.plans if done else ():
            if plan.transform == "multiplex" and plan.init == "scratch" and self.init != "scratch":
                raise UserError(
                    f"lors.init={self.init} fits the teacher's weights, but an earlier multiplex starts the student from noise; give "
                    "lors.init=scratch, or multiplex.init=mean"
                )
            if plan.transform == "align" and (self.share == "auto" or self.group_by == "similarity"):
                raise UserError(
                    "lors would choose its own groups (share: auto, group_by: similarity), but an earlier align has matched the blocks of "
                    "others; leave align out, or give both steps the same share"
                )

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
                        f"{len(already) - 1}; leave lors.share and group_by out, which keeps that, or give both steps the same share"
                    )
