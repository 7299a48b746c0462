"""What a student of `shrink` may cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
from pydantic import Field, model_validator

from compressvit.spec import Spec
from compressvit.transforms.shrink.prices import Row, Unit


class ShrinkBudget(Spec):
    """What the student may cost: one limit or several, all of which hold. Up to 1 each is a fraction of the teacher's."""

    parameters: float | None = Field(None, gt=0, description="Parameters; e.g. 0.5, or 11000000.")
    bytes: float | None = Field(None, gt=0, description="Bytes of model.safetensors.")
    macs: float | None = Field(None, gt=0, description="Multiply-accumulates for one image.")
    latency: float | None = Field(
        None,
        gt=0,
        description="Time of `batch` images on the device of the run, by a table of what its modules take there; above 1 milliseconds.",
    )

    @model_validator(mode="after")
    def _at_least_one(self) -> ShrinkBudget:
        if not self.units:
            raise ValueError(f"a budget names at least one of {', '.join(get_args(Unit))}, e.g. parameters: 0.5")
        return self

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units that have a limit."""
        names: tuple[Unit, ...] = get_args(Unit)
        return tuple(name for name in names if getattr(self, name) is not None)

    def limits(self, units: Sequence[Unit], of_teacher: Row) -> Row:
        """(units,): the most that may be spent, where the teacher costs `of_teacher`."""
        found = []
        for unit, whole in zip(units, of_teacher, strict=True):
            value: float = getattr(self, unit)
            most = value * whole if value <= 1 else value
            found.append(most if unit == "latency" else np.floor(most))
        return np.array(found)

    def unmeasured(self, macs: float) -> ShrinkBudget:
        """What it comes to before latency is measured: as much less of multiply-accumulates, beside the limit that these may have; nothing
        is assumed of milliseconds.

        Args:
            macs: the teacher's.
        """
        assert self.latency is not None
        share = min(1.0, self.latency)
        own = 1.0 if self.macs is None else self.macs if self.macs <= 1 else self.macs / macs
        return self.model_copy(update={"latency": None, "macs": self.macs if self.macs and own <= share else share})
