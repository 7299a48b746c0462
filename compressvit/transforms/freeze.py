"""Partial fine-tuning: train some of the model's own parameters, without adding any.

BitFit: BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models, ACL 2022,
https://arxiv.org/abs/2106.10199

`freeze` trains the classifier and one part of every block (its attention or its MLP), or only the classifier (a linear probe);
`bitfit` trains the classifier and every bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.reference import Reference
from compressvit.model.backbone import head_names, model_name
from compressvit.transforms.base import LedgerEntry, Plan, Transform, transform
from compressvit.transforms.low_rank.layer import current_names


class FreezePlan(Plan):
    """A resolved `Freeze`: names of the parameters that are trained in addition to the classifier."""

    names: tuple[str, ...]

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        return []

    def initialise(self, student: nn.Module, reference: Reference) -> None:
        """Nothing to initialise: no parameter was added."""

    def trains(self, model: nn.Module) -> set[str]:
        return current_names(model, self.names)

    def fold(self, model: nn.Module) -> None:
        """Nothing to fold: no structure was added."""

    foldable = True


class BitFitPlan(FreezePlan):
    """A resolved `BitFit`: names of the biases."""


@transform("freeze", FreezePlan)
class Freeze(Transform):
    """Train one part of every block and the classifier, or only the classifier."""

    freezes = True

    train: Literal["head", "attention", "mlp"] = Field(
        description="What is trained in addition to the classifier: head for nothing (a linear probe), attention, or mlp."
    )

    @classmethod
    def examples(cls) -> Sequence[Transform]:
        return (Freeze(train="mlp"),)

    def plan(self, model: nn.Module, reference: Reference | None = None) -> FreezePlan:
        if self.train == "head":
            if not head_names(model):
                raise UserError(
                    f"freeze.train=head trains the classifier alone, but {model_name(model)} has none; "
                    "give the student one with student.head=new"
                )
            return FreezePlan(names=())
        backbone = self.backbone(model)
        part = {"attention": "attn", "mlp": "mlp"}[self.train]
        if part not in backbone.parts:
            raise UserError(
                f"freeze.train={self.train}: the blocks of {model_name(model)} have no attention; train mlp or head"
            )
        inside = tuple(f"{info.path}.{part}." for info in backbone.blocks)
        return FreezePlan(names=tuple(n for n, _ in model.named_parameters() if n.startswith(inside)))


@transform("bitfit", BitFitPlan)
class BitFit(Transform):
    """Train every bias and the classifier (BitFit)."""

    needs = ()
    freezes = True

    position_tables: bool = Field(
        False, description="Also train Swin's relative position bias tables, which are added to logits like biases."
    )

    def plan(self, model: nn.Module, reference: Reference | None = None) -> BitFitPlan:
        ends = (".bias", ".relative_position_bias_table") if self.position_tables else (".bias",)
        heads = head_names(model)
        return BitFitPlan(names=tuple(n for n, _ in model.named_parameters() if n.endswith(ends) and n not in heads))
