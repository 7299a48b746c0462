"""LORS: the linear layers of a stack share one weight and keep a private low-rank term each.

Paper: LORS: Low-rank Residual Structure for Parameter-Efficient Network Stacking, CVPR 2024, https://arxiv.org/abs/2403.04303

The weight of layer i becomes `W_shared + up_i @ down_i` (static LORS; its K_i terms of rank r are one term of rank K_i·r). Biases and
norms stay private. Parameters and bytes fall, MACs do not. A layer that shares with no other is only low rank, as with `low_rank`.

The paper trains from random initialisation (`init: scratch`). Given a trained model, the shared weight and the terms are fitted to its
weights, with the error measured in the layers' or the model's outputs: see `compressvit.fitting.lowrank`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.reference import Reference
from compressvit.model import ties
from compressvit.model.backbone import Backbone, share_groups
from compressvit.model.family import Need
from compressvit.model.linear import weight_shape
from compressvit.transforms.base import Transform, transform
from compressvit.transforms.claims import regroups
from compressvit.transforms.lors.grouping import group_by_similarity
from compressvit.transforms.lors.plan import LORSPlan
from compressvit.transforms.low_rank.base import RankStep, at_least, measured_on
from compressvit.transforms.low_rank.budget import Group, Spending
from compressvit.transforms.record import require_free


@transform("lors", LORSPlan)
class LORS(RankStep):
    """Share the weights of linear layers, with a private low-rank term each (LORS)."""

    needs: ClassVar[tuple[Need, ...]] = ("attention", "alike_blocks")
    changes_at_start = True
    blind_at_start: ClassVar[dict[str, str]] = {
        "low_rank.down": "where the shared weight is exact, or noise, the factor after it starts at zero"
    }

    renamed: ClassVar[dict[str, str]] = {"groups": "terms"}

    terms: int | tuple[int, ...] = Field(
        1,
        description="The paper's K: number of terms of rank r in each layer, for a total rank of K·r; one number, or one per block.",
    )
    share: int | tuple[int, ...] | Literal["auto"] | None = Field(
        None,
        description="Blocks in a share group: one number, or one per stage (1: low rank alone there; for all stages use `low_rank`). "
        "Null: the groups of an earlier step or, without one, all blocks of a stage. Layers that are not shared then keep their weight. "
        "auto: for each kind of layer of each stage the size, 1 included, with the least error within the budget.",
    )
    group_by: Literal["consecutive", "similarity"] = Field(
        "consecutive",
        description="similarity: as many groups per stage as with `share` consecutive blocks, but of the layers that lose least by "
        "sharing, anywhere in the stage and of any number.",
    )
    init: Literal["fit", "first", "scratch"] = Field(
        "fit",
        description="fit: shared weight and terms from the teacher's weights; first: the shared weight is the first layer's; "
        "scratch: random as in the released code (these layers only; student: {weights: random} for the whole student): shared weights "
        "truncated normal of std 0.02 in attention and Xavier-uniform in the MLP (see shared_init); in the terms, the first factor "
        "Kaiming-uniform and the second zero.",
    )
    shared_init: Literal["released", "kaiming"] = Field(
        "released",
        description="Start of the shared weights with init: scratch. released: those of the released code; kaiming: Kaiming-uniform within "
        "±√(6/in) in attention and MLP, as the paper says.",
    )
    metric: Literal["auto", "outputs", "inputs", "weights"] = Field(
        "auto",
        description="The metric of an error. weights: the weight itself. inputs: the layer's output on calibration images "
        "(whitening). outputs: the model's output on them. auto: the best in our measurements, inputs for layers that share a "
        "weight and outputs for the others.",
    )
    rounds: int = Field(
        4, ge=0, description="Number of times the shared weight is refitted to the residual of the private terms."
    )

    @field_validator("terms", "share")
    @classmethod
    def _positive(cls, value: Any, info: Any) -> Any:
        return value if value == "auto" else at_least(1 if info.field_name == "share" else 0, info.field_name, value)

    @model_validator(mode="after")
    def _consistent(self) -> LORS:
        self.require_rank_or_budget(self.init)
        shares = (self.share,) if isinstance(self.share, int) else self.share
        if isinstance(shares, tuple) and set(shares) == {1}:
            raise ValueError(
                "share: 1 shares nothing; use `low_rank` instead: `low_rank: {budget: {parameters: 0.5}}` (Python: LowRank)"
            )
        if self.shared_init != "released" and self.init != "scratch":
            raise ValueError(f"shared_init: {self.shared_init} starts shared weights at random; give init: scratch too")
        if self.share == "auto" and not self.budget:
            raise ValueError("share: auto needs a budget; give one, or a number of blocks")
        if self.group_by == "similarity" and self.init == "scratch":
            raise ValueError("randomly initialised layers have no similarity; leave out group_by: similarity")
        if self.group_by == "similarity" and self.share is None:
            raise ValueError(
                "group_by: similarity forms its own groups, so it needs share: a number of blocks, or auto"
            )
        if self.budget and self.terms != 1:
            raise ValueError("terms multiply the rank, which a budget chooses; leave terms out")
        return self

    def with_budget(self, unit: str, value: float) -> LORS:
        return self.model_validate({**self.model_dump(), "rank": None, "terms": 1, "budget": {unit: value}})

    @property
    def needs_images(self) -> bool:
        return self.init != "scratch" and self.metric != "weights"

    @property
    def provisional(self) -> tuple[str, ...]:
        notes = self.budget_note(self.metric)
        if self.share == "auto":
            notes.append(
                "nothing is shared in this plan; the run shares weights where that leaves less error in the budget, and with other groups "
                "MACs, layer pairs and loss memory may be others"
            )
        elif self.group_by == "similarity":
            notes.append(
                "groups are consecutive in this plan; the run forms as many of the most similar layers "
                + measured_on(self.metric)
            )
        return tuple(notes)

    @classmethod
    def examples(cls) -> Sequence[Transform]:
        return (
            LORS(rank=2, share=2, metric="weights"),
            LORS(rank=3, terms=2, share=2, targets=("mlp.*",), init="first", metric="weights"),
            LORS(rank=2, targets=("attn.qkv", "attn.proj"), init="scratch"),
        )

    def plan(self, model: nn.Module, reference: Reference | None = None) -> LORSPlan:
        backbone = self.backbone(model)
        targets = self.find_targets(model, backbone)
        self._refuse_shapes(model, backbone, targets)
        if self.share == "auto" or self.group_by == "similarity":
            require_free(model, self.name, [regroups("", "lors (share: auto, group_by: similarity)")])
        if reference is not None and self.group_by == "similarity" and self.metric != "weights":
            every = [f"{block.path}.{target}" for block in backbone.blocks for target in targets]
            # the moments of all layers in one pass over the images
            reference.moments(
                every, outputs=self.metric == "outputs" or (self.metric == "auto" and self.share == "auto")
            )
        if not self.budget:
            assert self.share != "auto"  # refused without a budget
            found = [g for target in targets for g in self._groups(model, backbone, target, self.share, reference)]
            # a layer without similar ones shares with none, and may then keep its dense weight
            groups = [g for g in found if len(g) > 1 or self.group_by != "similarity"]
            ranks = self._ranks(model, backbone, groups)
            self._refuse_conflicts(model, groups, ranks)
            return self.resolved(groups, ranks, dense=[path for g in found if g not in groups for path in g])
        choices = [ways for target in targets for ways in self._choices(model, backbone, target, reference)]
        every = [path for ways in choices for group in ways[0] for path in group]
        groups = [group for ways in choices for group in ways[0]]
        self._refuse_conflicts(model, groups, dict.fromkeys(every, 0))
        spending = Spending(self, model, reference, every)
        if self.share == "auto" and reference is not None:
            groups = spending.choose(choices)
        chosen = spending.ranks(groups)
        kept = [g for g in groups if chosen[g[0]] is not None]
        ranks = {path: rank for path, rank in chosen.items() if rank is not None}
        return self.resolved(kept, ranks, dense=[path for path, rank in chosen.items() if rank is None])

    def resolved(self, groups: Sequence[tuple[str, ...]], ranks: dict[str, int], dense: Sequence[str] = ()) -> LORSPlan:
        """The plan for these groups and ranks; layers whose rank is None stay dense."""
        settings = self.model_dump(include={"init", "shared_init", "rounds", "ridge", "output_ridge"})
        return LORSPlan(
            groups=tuple(groups),
            ranks=ranks,
            dense=tuple(dense),
            metric=self.metric_for(groups),
            sequential=self.fits_in_order,
            **settings,
        )

    def metric_for(self, groups: Sequence[tuple[str, ...]]) -> Literal["weights", "inputs", "outputs"]:
        """The metric in which errors of these groups are measured."""
        if self.metric != "auto":
            return self.metric
        return "inputs" if any(len(g) > 1 for g in groups) else "outputs"

    def _choices(
        self, model: nn.Module, backbone: Backbone, target: str, reference: Reference | None
    ) -> list[list[list[tuple[str, ...]]]]:
        """For every stage, the candidate groupings of its `target` layers: one, or with `share: auto` one per divisor of its depth."""
        depths = [len(stage) for stage in backbone.stages]
        shares: list[Any] = [self.share]
        if self.share == "auto":
            shares = [tuple(math.gcd(d, n) for d in depths) for n in range(1, max(depths) + 1)]
        groupings = [self._groups(model, backbone, target, share, reference) for share in dict.fromkeys(shares)]
        choices = []
        for stage in backbone.stages:
            paths = {f"{block.path}.{target}" for block in stage}
            ways = [tuple(g for g in groups if g[0] in paths) for groups in groupings]
            choices.append([list(way) for way in dict.fromkeys(ways)])
        return choices

    def _groups(
        self,
        model: nn.Module,
        backbone: Backbone,
        target: str,
        share: int | tuple[int, ...] | None,
        reference: Reference | None,
    ) -> list[Group]:
        """The `target` layers, grouped by `share`."""
        stages = [tuple(f"{block.path}.{target}" for block in stage) for stage in backbone.stages]
        if share is None:
            names = {f"{path}.weight" for stage in stages for path in stage}
            tied = [tuple(n.removesuffix(".weight") for n in g) for g in ties.tied_groups(model) if set(g) <= names]
            return tied or [stage for stage in stages if len(stage) > 1]
        consecutive = [
            tuple(f"{path}.{target}" for path in g) for g in share_groups(model, share, "lors.share", self.of)
        ]
        if self.group_by == "consecutive" or reference is None:
            return consecutive
        kind = "weights" if self.metric == "weights" else "inputs"
        return [
            group
            for stage in stages
            for group in group_by_similarity(
                stage, sum(g[0] in stage for g in consecutive), reference, kind, self.ridge
            )
        ]

    def _ranks(self, model: nn.Module, backbone: Backbone, groups: Sequence[Group]) -> dict[str, int]:
        ranks, terms = (self.per_block(model, backbone, name) for name in ("rank", "terms"))
        of_block = {block: ranks[block] * terms[block] for block in ranks}
        return {path: next(r for b, r in of_block.items() if path.startswith(f"{b}.")) for g in groups for path in g}

    def _refuse_shapes(self, model: nn.Module, backbone: Backbone, targets: Sequence[str]) -> None:
        if self.share != "auto" and self.group_by != "similarity":
            return
        for target in targets:
            for stage in backbone.stages:
                shapes = {
                    p: weight_shape(model.get_submodule(p)) for p in (f"{block.path}.{target}" for block in stage)
                }
                (first, shape), *others = shapes.items()
                for path, other in others:
                    if other != shape:
                        raise UserError(
                            f"lors: {first} and {path} are of different shapes and cannot share a weight, which share: auto and "
                            "group_by: similarity may choose for any layers of a stage; give share as numbers of consecutive blocks of one "
                            "shape, or name other targets"
                        )

    def _refuse_conflicts(self, model: nn.Module, groups: Sequence[Group], ranks: dict[str, int]) -> None:
        self.refuse_ranks(model, ranks)
        for group in groups:
            for path in group:
                if len(group) == 1 and not ranks[path] and not self.budget:
                    raise UserError(
                        f"lors: rank 0 with share 1 would leave {path} without a weight; give a rank of at least 1, or share more blocks"
                    )
