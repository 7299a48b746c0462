"""The base class of all parts of a recipe: frozen pydantic models that reject unknown keys."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

_LARGEST = 3.4e38  # of 32-bit floats, in which torch computes


class Spec(BaseModel):
    """A frozen set of options. YAML and Python build the same object; unknown keys are rejected."""

    # Keys of earlier versions with their current names, for the error message.
    renamed: ClassVar[dict[str, str]] = {}

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _fits_in_32_bits(cls, value: Any) -> Any:
        if isinstance(value, float) and abs(value) > _LARGEST:
            raise ValueError(f"{value:g} is too large for 32-bit floats, which end at {_LARGEST:g}")
        return value


def first_fault(error: ValidationError) -> str:
    """Where and what the first fault of a file's content is, e.g. 'student.parameters: input should be a valid integer'."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(map(str, fault["loc"]))
    what = fault["msg"].removeprefix("Value error, ")
    return f"{where}: {what[:1].lower()}{what[1:]}" if where else what
