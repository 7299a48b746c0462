"""Low rank alone: the weight of a linear layer becomes a product `up @ down`, two smaller linear layers.

A layer then has r·(in + out) parameters and multiply-accumulates per token instead of in·out or, in the pivoted form of the same function,
r·(in + out − r): see `compressvit.fitting.pivoted`. Of all steps here it loses least at a given budget, and it reduces parameters, bytes,
MACs and (below a rank that `plan` prints) latency.

The factors are the truncated singular value decomposition of the teacher's weight, in a metric that weighs errors by their effect on
outputs for calibration images; see `compressvit.fitting.lowrank`. The whitened form is that of SVD-LLM, ICLR 2025,
https://arxiv.org/abs/2403.07378. Where layers should share a weight beside such a term, use `lors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.lowrank import spectrum
from compressvit.fitting.reference import Reference
from compressvit.log import progress
from compressvit.model.linear import weight_shape
from compressvit.transforms.base import Transform, transform
from compressvit.transforms.claims import Claim, drops
from compressvit.transforms.low_rank.base import RankPlan, RankStep
from compressvit.transforms.low_rank.budget import Group, Spending
from compressvit.transforms.low_rank.layer import Factored, factor
from compressvit.transforms.low_rank.pivoted_layer import pivot


class LowRankPlan(RankPlan):
    """A resolved `LowRank`: the rank of each layer whose weight is replaced by two factors."""

    init: Literal["fit", "scratch"]
    pivoted: bool = False  # the value in artifacts from before the option existed

    def change(self, model: nn.Module) -> dict[str, str]:
        for path, rank in self.ranks.items():
            (pivot if self.pivoted else factor)(model, path, rank)
        kind = "pivoted rank" if self.pivoted else "low rank"
        return {path: f"{kind} {rank} in place of the weight" for path, rank in self.ranks.items()}

    def claims(self, model: nn.Module) -> list[Claim]:
        use_lors = "use `lors`, which keeps that and adds a low-rank term to each, or leave one of the two steps out"
        return [*super().claims(model), *drops(self.drops(model), use_lors)]

    def drops(self, model: nn.Module) -> set[str]:
        return dropped(model, self.paths)

    @torch.no_grad()
    def initialise(self, student: nn.Module, reference: Reference) -> None:
        if self.init == "fit":
            metrics = reference.metrics(self.paths, self.metric, self.ridge, self.output_ridge)
        for path, rank in progress(self.ranks.items(), "making layers low rank", len(self.ranks)):
            layer = student.get_submodule(path)
            assert isinstance(layer, Factored)
            if self.init == "fit":
                layer.set_factors(*spectrum(reference.weight(path), metrics[path]).factors(rank))
            else:
                start_from_noise_(layer)

    def errors(self, student: nn.Module, reference: Reference) -> dict[str, tuple[float | None, float | None]]:
        return super().errors(student, reference) if self.init == "fit" else {}

    def fitted(self) -> set[str]:
        return factor_names(self.paths)


@transform("low_rank", LowRankPlan)
class LowRank(RankStep):
    """Make linear layers low rank: two smaller layers in place of each, fitted to the teacher.

    A target is an `nn.Linear` of a block, which becomes two, or an `nn.Conv2d` with a 1×1 kernel, stride 1, no padding and no groups
    (the MLP of a ConvNeXt built with `conv_mlp`), which becomes two point-wise convolutions. Convolutions with larger kernels or groups
    are not targets, because they do not multiply the channels of each position by one weight matrix.
    """

    needs = ()
    changes_at_start = True
    convolutions = True

    init: Literal["fit", "scratch"] = Field(
        "fit",
        description="fit: from the teacher's weights; scratch: random (these layers only; student: {weights: random} for the whole "
        "student).",
    )
    pivoted: Literal["auto"] | bool = Field(
        "auto",
        description="True: store r rows or columns of each weight and the coefficients of the others, r·(in + out − r) parameters and "
        "multiply-accumulates, instead of two factors, r·(in + out), for the same function. auto: with a budget, which then buys "
        "higher ranks; two factors where a rank is given.",
    )
    metric: Literal["outputs", "inputs", "weights"] = Field(
        "outputs",
        description="The metric of an error. outputs: the model's output on calibration images. inputs: the layer's output on "
        "them (whitening). weights: the weight itself, without images.",
    )

    @model_validator(mode="after")
    def _rank_or_budget(self) -> LowRank:
        self.require_rank_or_budget(self.init)
        if self.pivoted is True and self.init == "scratch":
            raise ValueError(
                "pivoted: true stores rows of the teacher's weights, which init: scratch does not use; leave one of the two out"
            )
        return self

    @property
    def pivots(self) -> bool:
        return self.budget is not None if self.pivoted == "auto" else self.pivoted

    @property
    def needs_images(self) -> bool:
        return self.init != "scratch" and self.metric != "weights"

    @property
    def provisional(self) -> tuple[str, ...]:
        return tuple(self.budget_note(self.metric))

    @classmethod
    def examples(cls) -> Sequence[Transform]:
        return (
            LowRank(rank=2, metric="weights"),
            LowRank(rank=3, targets=("mlp.*",), init="scratch"),
            LowRank(rank=3, metric="weights", pivoted=True),
        )

    def plan(self, model: nn.Module, reference: Reference | None = None) -> LowRankPlan:
        backbone = self.backbone(model)
        blocks = self.target_paths(model, backbone)
        paths = list(blocks)
        groups: list[Group] = [(path,) for path in paths]
        if self.budget:
            self._refuse(model, dict.fromkeys(paths, 1))
            chosen = Spending(self, model, reference, paths).ranks(groups)
            ranks = {path: rank for path, rank in chosen.items() if rank is not None}
            return self._resolved(ranks, dense=[path for path, rank in chosen.items() if rank is None])
        of_block = self.per_block(model, backbone, "rank")
        ranks = {path: of_block[block] for path, block in blocks.items()}
        self._refuse(model, ranks)
        return self._resolved(ranks)

    def resolved(self, groups: Sequence[Group], ranks: dict[str, int]) -> LowRankPlan:
        """The plan for these ranks; every group has one layer."""
        return self._resolved({path: ranks[path] for group in groups for path in group})

    def _resolved(self, ranks: dict[str, int], dense: Sequence[str] = ()) -> LowRankPlan:
        settings = self.model_dump(include={"init", "metric", "ridge", "output_ridge"})
        return LowRankPlan(
            ranks=ranks, dense=tuple(dense), sequential=self.fits_in_order, pivoted=self.pivots, **settings
        )

    def metric_for(self, groups: Sequence[Group]) -> Literal["weights", "inputs", "outputs"]:
        """The metric in which errors are measured."""
        return self.metric

    def _refuse(self, model: nn.Module, ranks: dict[str, int]) -> None:
        self.refuse_ranks(model, ranks)
        for path, rank in ranks.items():
            if not rank:
                raise UserError(f"low_rank: rank 0 would leave {path} without a weight; give a rank of at least 1")
            full = min(weight_shape(model.get_submodule(path)))
            if self.pivots and rank == full:
                raise UserError(
                    f"low_rank.pivoted: rank {rank} is the full rank of {path}, which would be as large as before; give a rank of at most "
                    f"{full - 1}, or leave the layer out of targets"
                )


def start_from_noise_(layer: Factored) -> None:
    """Initialise `down` Kaiming-uniform and `up` like timm's linear layers: a zero product would grow slowly."""
    layer.reset_zero()
    nn.init.trunc_normal_(layer.up.weight, std=0.02)


def factor_names(paths: Sequence[str]) -> set[str]:
    """Names of the factors of the layers at `paths`."""
    return {f"{path}.{side}.weight" for path in paths for side in ("down", "up")}


def dropped(model: nn.Module, paths: Sequence[str]) -> set[str]:
    """Names of the tensors of `model` that disappear when the linear layers at `paths` are factored."""
    return {f"{path}.{name}" for path in paths for name, _ in model.get_submodule(path).named_parameters(recurse=False)}
