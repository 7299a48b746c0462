"""Applying transforms to a model: all of them are planned on a skeleton before the first change."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.in_order import fit_in_order
from compressvit.fitting.kept import Kept
from compressvit.fitting.reference import Images, Reference
from compressvit.model import surgery, ties
from compressvit.transforms.base import TRANSFORMS, LedgerEntry, Plan, Transform
from compressvit.transforms.record import (
    Compression,
    claims_of,
    compression_of,
    require_free,
    require_open,
    set_compression,
    trained_names,
)


def plan_transforms(model: nn.Module, transforms: Sequence[Transform]) -> list[Plan]:
    """Resolve transforms one after the other on a skeleton of `model`, which itself is not changed.

    Raises:
        UserError: a transform does not fit the model, or an earlier one.
    """
    scratch = surgery.skeleton(model)
    plans = []
    for spec in in_context(transforms):
        require_open(scratch, spec.name)
        plan = spec.plan(scratch)
        apply_plans(scratch, [plan])
        plans.append(plan)
    return plans


def in_context(transforms: Sequence[Transform]) -> list[Transform]:
    """The transforms, each as it is before those that follow it."""
    return [spec.before(transforms[i + 1 :]) for i, spec in enumerate(transforms)]


def apply_plans(model: nn.Module, plans: Sequence[Plan]) -> list[LedgerEntry]:
    """Change the structure of `model` in place and record the plans; new tensors are uninitialised. Returns the ledger.

    Raises:
        UserError: a claim of a plan excludes a claim of an earlier one; nothing of that plan has been applied.
    """
    ledger: list[LedgerEntry] = []
    for plan in plans:
        wanted = claims_of(plan, model)
        require_free(model, plan.transform, wanted)
        rows = [replace(entry, step=plan.transform) for entry in plan.apply(model)]
        done = compression_of(model)
        whole = [*done.plans, plan], ties.tied_groups(model), [*done.ledger, *rows]
        taken = [*done.claims, *((plan.transform, claim) for claim in wanted)]
        set_compression(model, Compression(*whole, claims=taken))
        ledger += rows
    names = trained_names(model)
    if names is not None:
        surgery.train_only(model, names)
    return ledger


def transform_(
    model: nn.Module,
    transforms: Sequence[Transform],
    calibration: Images | Reference | None = None,
    *,
    tokens: int | None = None,
) -> list[LedgerEntry]:
    """Plan, apply and initialise transforms on `model`, in place. All are planned before the first change.

    All transforms of one call see the same `reference`, the model before the first of them, so a low-rank step after a sharing step
    can still recover what sharing lost. After a step that loads values, the loaded model is the reference.

    Args:
        calibration: images for data-driven transforms, or a `Reference` of an identical model.
        tokens: of every image that are summed up, besides its prefix tokens; None for all.
    """
    transforms = in_context(transforms)
    plan_transforms(model, transforms)  # without values: finds every conflict
    reference = (
        calibration if isinstance(calibration, Reference) else Reference(surgery.deep_copy(model), calibration, tokens)
    )
    for spec in transforms:
        spec.require_inputs()
        if spec.needs_images:
            _require_images(spec, reference)
    ledger: list[LedgerEntry] = []
    fresh: list[Plan] = []  # since values were last loaded, or fitted
    for spec in transforms:
        if spec.plan_class.last and fresh:
            _finish_fit(fresh, model, reference)
            reference, fresh = reference.with_model(surgery.deep_copy(model)), []
        plan = spec.plan(model, reference)
        ledger += apply_plans(model, [plan])
        plan.initialise(model, reference)
        fresh.append(plan)
        if plan.loads_values:
            reference = reference.with_model(surgery.deep_copy(model))
            fresh = []
    _finish_fit(fresh, model, reference)
    record = compression_of(model).ledger
    return record[len(record) - len(ledger) :]


def _finish_fit(plans: Sequence[Plan], model: nn.Module, reference: Reference) -> None:
    """Fit what the plans fit in order, and put the errors that are left into the model's ledger."""
    fitted = _fit_in_order(plans, model, reference)
    errors = {(plan.transform, path): found for plan in plans for path, found in plan.errors(model, reference).items()}
    record = compression_of(model).ledger
    for i, entry in enumerate(record):
        if (entry.step, entry.path) in errors:
            weight_error, output_error = errors[entry.step, entry.path]
            output_error = fitted.get(entry.path, output_error)
            record[i] = replace(entry, weight_error=weight_error, output_error=output_error)


def _require_images(spec: Transform, reference: Reference) -> None:
    try:
        reference.require_images(spec.name)
    except UserError as error:
        if not spec.judged:
            raise
        raise UserError(
            f"{spec.name}: keep judges students on images, and none were given: pass compress(…, calibration=images), where a few hundred "
            "without labels are enough, or give a budget"
        ) from error


def _fit_in_order(plans: Sequence[Plan], student: nn.Module, reference: Reference) -> dict[str, float]:
    """Fit the layers that the plans name, in a single pass through the model; returns the remaining relative errors by path."""
    fits = {path: fit for plan in plans for path, fit in plan.layer_fits(student, reference).items()}
    if not fits:
        return {}
    walk = without_what_is_set_aside(surgery.deep_copy(student)).float()
    teacher = without_what_is_set_aside(reference.model)
    kept, folder = None, reference.choices.folder
    if folder is not None and not any(plan.sets_aside for plan in compression_of(student).plans):
        what = json.dumps([plan.model_dump(mode="json") for plan in plans])
        own = (
            folder / plans[-1].transform if plans[-1].last else folder
        )  # beside what the plans before it were fitted with
        kept = Kept(own, what, (walk, student))
    with reference.asks("fit", [walk, teacher], prefix_weights={path: fit.prefix_weight for path, fit in fits.items()}):
        return fit_in_order(walk, teacher, reference.batches(), fits, reference.held_out, reference.sample(), kept)


def fitted_copy(model: nn.Module, plan: Plan, reference: Reference) -> nn.Module:
    """A copy of a model with one plan applied and its values set: what `transform_` would make of it."""
    student = surgery.deep_copy(model)
    apply_plans(student, [plan])
    plan.initialise(student, reference)
    _fit_in_order([plan], student, reference)
    return student


def without_what_is_set_aside(model: nn.Module) -> nn.Module:
    """The model itself, or a copy without the modules that its transforms set aside (`Plan.set_aside`) while weights are fitted."""
    plans = [plan for plan in compression_of(model).plans if plan.sets_aside]
    if plans:
        model = surgery.deep_copy(model)
    for plan in plans:
        plan.set_aside(model)
    return model


def materialise(model: nn.Module) -> nn.Module:
    """A copy of a compressed model in which low-rank layers and mergeable adapters are plain timm layers with their effective weights.

    The copy computes the same, with the latency of the teacher's layers. Its layers no longer share weights, so it is meant for running
    a model, not for storing it: `save` refuses it unless only plain timm layers and adapters are left. Adapters made of Kronecker
    products become dense.

    Raises:
        UserError: nothing in the model can be materialised.
    """
    model = surgery.deep_copy(model)
    done = compression_of(model)
    foldable = [i for i, plan in enumerate(done.plans) if plan.foldable]
    if not foldable:
        names = ", ".join(plan.transform for plan in done.plans) or "no transform"
        raise UserError(
            f"there is nothing to materialise: the model was made by {names}; only low-rank terms, linear adapters and those of "
            "Kronecker products can be"
        )
    trained = trained_names(model)
    # From the weight outwards: what rounds it, what replaces it, what is added to or after it in the order applied, what precedes it.
    left: list[Plan | None] = list(done.plans)
    for i in sorted(
        foldable, key=lambda i: (not done.plans[i].last, not done.plans[i].fitted(), done.plans[i].folds_last)
    ):
        left[i] = done.plans[i].fold(model)
    if hasattr(model, "_adapter"):  # the values that `remove_adapter` would restore have been folded
        del model._adapter
    rest = [plan for plan in left if plan is not None and not plan.loads_values]
    if not rest:  # now a plain model without adapters
        model.requires_grad_(True)
        set_compression(model, None)
        return model
    shared = ties.tied_groups(model)
    # Modules added to a frozen backbone share none of its tensors, so without another step there are no ties to restore.
    ties_backbone = any(plan.trains(model) is None for plan in rest)
    folded = {plan.transform for plan in rest if plan not in done.plans}  # to a simpler structure, which claims less
    words = {plan.transform for plan in rest} - folded
    claims = [(word, claim) for word, claim in done.claims if word in words]
    claims += [(plan.transform, claim) for plan in rest if plan.transform in folded for claim in claims_of(plan, model)]
    record = Compression(rest, shared, done.ledger, materialised=ties_backbone and shared != done.ties, claims=claims)
    set_compression(model, record)
    if trained is not None:  # a frozen weight that became dense stays frozen; an adapter that did stays trainable
        surgery.train_only(model, trained | (trained_names(model) or set()))
    return model


def compress(model: nn.Module, transforms: Sequence[Transform], calibration: Images | None = None) -> nn.Module:
    """Return a compressed copy of a timm model. `model` itself is not changed.

    Args:
        model: a model of a family that compressvit knows (`compressvit.model.families`).
        transforms: applied in order, e.g. `[Multiplex(share=2)]`.
        calibration: a few hundred unlabelled images, normalised for the model, for data-driven transforms: a tensor (N, C, H, W), or
            batches that can be iterated more than once; batches may be `compressvit.data.photographs.Photographed`.

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
    if torch.is_inference_mode_enabled():
        raise UserError(
            "compress makes parameters that can be trained, which torch.inference_mode() forbids; call it outside"
        )
    if not isinstance(model, nn.Module):
        raise UserError(f"compress takes a model, not a {type(model).__name__}; build one with timm.create_model(NAME)")
    if not isinstance(transforms, Sequence) or not all(isinstance(t, Transform) for t in transforms):
        raise UserError(
            f"compress takes a list of transforms, e.g. [Multiplex(share=2)], not {transforms!r}{_in_python(transforms)}"
        )
    student = surgery.deep_copy(model)
    transform_(student, transforms, calibration)
    return student


def _in_python(given: Any) -> str:
    """The class of the first step that is given by its name in recipes, in words."""
    for item in [given] if isinstance(given, str | Mapping) else given if isinstance(given, Sequence) else ():
        name = next(iter(item), None) if isinstance(item, Mapping) else item
        if isinstance(name, str) and name in TRANSFORMS:
            kind = TRANSFORMS[name]
            package = "compressvit" if kind.__module__.startswith("compressvit.") else kind.__module__
            return f"; {name} is {package}.{kind.__name__} in Python"
    return ""
