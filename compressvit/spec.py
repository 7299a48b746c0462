"""The base of everything a recipe can say: frozen pydantic models that refuse unknown keys."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError


class Spec(BaseModel):
    """A frozen description. YAML and Python build the same object; unknown keys are refused."""

    # Keys of earlier versions and what they are called now, for the message that refuses them.
    renamed: ClassVar[dict[str, str]] = {}

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def first_fault(error: ValidationError) -> str:
    """Where and what the first fault of a file's content is, e.g. 'student.parameters: input should be a valid integer'."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(map(str, fault["loc"]))
    what = fault["msg"].removeprefix("Value error, ")
    return f"{where}: {what[:1].lower()}{what[1:]}" if where else what
