"""The base of everything a recipe can say: frozen pydantic models that refuse unknown keys."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """A frozen description. YAML and Python build the same object; unknown keys are refused."""

    # Keys of earlier versions and what they are called now, for the message that refuses them.
    renamed: ClassVar[dict[str, str]] = {}

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
