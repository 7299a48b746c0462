"""Conversion between a plan and its record in a file."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from compressvit import __version__
from compressvit.errors import UserError, did_you_mean
from compressvit.model.stored import MANIFEST, StepRecord, read_manifest
from compressvit.transforms.base import TRANSFORMS, Plan


def record_of(plan: Plan) -> StepRecord:
    """The record of a transform for a file."""
    package = TRANSFORMS.package_of(plan.transform)
    return StepRecord(transform=plan.transform, plan=plan.model_dump(mode="json"), package=package)


def read_plans(path: str | Path) -> list[Plan]:
    """The resolved transforms of the artifact at `path`, in order.

    Raises:
        UserError: the manifest is unreadable, or names a transform or a setting that this version does not have.
    """
    return [resolve_plan(step, Path(path) / MANIFEST) for step in read_manifest(path).transforms]


def resolve_plan(step: StepRecord, file: Path) -> Plan:
    """The plan that a file records.

    Raises:
        UserError: it names a transform that neither this version nor an installed package has, or a setting that the transform does not
            have, or lacks one.
    """
    known = TRANSFORMS.get(step.transform)
    if known is None:
        if broken := TRANSFORMS.fault(step.transform):
            raise UserError(f"{file} uses {broken}")
        if step.package is not None:
            raise UserError(
                f"{file} uses the transform {step.transform!r} of the package {step.package}, which is not installed here or no longer has "
                f"it; install it, e.g. with `pip install {step.package}`"
            )
        raise UserError(
            f"{file} uses the transform {step.transform!r}, which this compressvit ({__version__}) does not have; "
            + did_you_mean(step.transform, TRANSFORMS)
        )
    try:
        return known.plan_class.model_validate(step.plan)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise UserError(
            f"{file}: the plan of {step.transform!r} is not valid: {where}: {fault['msg'].lower()}; it was changed, or written by another "
            "version, and what is missing is not guessed"
        ) from error
