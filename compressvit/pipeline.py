"""From a model and transforms to a student: plan everything on a skeleton, then change a copy."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from compressvit import surgery, ties
from compressvit.transforms import LedgerEntry, Plan, Transform


@dataclass
class Compression:
    """What was done to a model; it travels with it (through `deepcopy` too) and goes into its artifact."""

    plans: list[Plan] = field(default_factory=list)
    ties: list[list[str]] = field(default_factory=list)
    ledger: list[LedgerEntry] = field(default_factory=list)


def compression_of(model: nn.Module) -> Compression:
    """The record of a compressed model; an empty one for a model that no transform has touched."""
    return getattr(model, "_compression", None) or Compression()


def plan_transforms(model: nn.Module, transforms: Sequence[Transform]) -> list[Plan]:
    """Resolve transforms one after the other on a skeleton of `model`, which is not changed.

    Raises:
        UserError: a transform does not fit the model, or an earlier one.
    """
    scratch = surgery.skeleton(model)
    plans = []
    for spec in transforms:
        plan = spec.plan(scratch)
        plan.apply(scratch)
        plans.append(plan)
    return plans


def apply_plans(model: nn.Module, plans: Sequence[Plan]) -> list[LedgerEntry]:
    """Change the structure of `model` in place and record it; values are whatever the tensors held. Returns the ledger."""
    ledger = [entry for plan in plans for entry in plan.apply(model)]
    done = compression_of(model)
    model._compression = Compression([*done.plans, *plans], ties.tied_groups(model), [*done.ledger, *ledger])  # type: ignore[assignment]
    return ledger


def transform_(model: nn.Module, transforms: Sequence[Transform]) -> list[LedgerEntry]:
    """Plan, apply and initialise transforms on `model`, in place. All are planned before the first change.

    The transforms of one call see the same `source`, the model as it was before the first of them: a low-rank step after a
    sharing step can still read what sharing lost. A step that loads values makes a new source for those after it.
    """
    plans = plan_transforms(model, transforms)
    for spec in transforms:
        spec.require_inputs()
    source = copy.deepcopy(model)
    ledger = []
    for plan in plans:
        ledger += apply_plans(model, [plan])
        plan.initialise(model, source)
        if plan.loads_values:
            source = copy.deepcopy(model)
    return ledger


def compress(model: nn.Module, transforms: Sequence[Transform]) -> nn.Module:
    """A compressed copy of a timm model. `model` itself is untouched.

    Args:
        model: a timm ViT, DeiT or Swin; see `compressvit.backbone.SUPPORTED`.
        transforms: applied in order, e.g. `[Multiplex(share=2)]`.

    Returns:
        A timm model of the same class, whose paths and keys are those of `model` plus what the transforms added.

    Raises:
        UserError: the model is not supported, or a transform does not fit it or an earlier one.

    Example:
        >>> import timm, compressvit
        >>> teacher = timm.create_model("deit_tiny_patch16_224")
        >>> student = compressvit.compress(teacher, [compressvit.Multiplex(share=2)])
        >>> compressvit.count_parameters(student)
        3053056
    """
    student = copy.deepcopy(model)
    transform_(student, transforms)
    return student
