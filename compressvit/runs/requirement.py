"""What `evaluate --require` asks of a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from compressvit.errors import UserError, did_you_mean
from compressvit.tasks.qualities import qualities

COSTS = ("parameters", "bytes", "macs", "loss", "images", "broken_images")


class Requirement(NamedTuple):
    """What a figure has to reach, as `top1>=85`; `value` is in the unit of the figure."""

    text: str
    key: str
    least: bool
    value: float

    @classmethod
    def of(cls, text: str) -> Requirement:
        """The requirement that a user wrote. Of a figure in percent a number up to 1 is a share of 1.

        Raises:
            UserError: it is none, or of no figure.
        """
        sign = ">=" if ">=" in text else "<="
        key, _, number = (part.strip() for part in text.partition(sign))
        try:
            value = float(number)
        except ValueError:
            raise UserError(
                f"--require {text}: give FIGURE>=NUMBER or FIGURE<=NUMBER in quotes, e.g. 'top1>=85'"
            ) from None
        known = qualities()
        if key not in (*COSTS, *known):
            raise UserError(
                f"--require {text}: there is no figure '{key}'; {did_you_mean(key, [*COSTS, *known], list_at_most=99)}"
            )
        percent = key in known and known[key].unit == "%"
        return cls(text, key, sign == ">=", 100 * value if percent and value <= 1 else value)

    def met(self, result: Mapping[str, Any]) -> bool:
        """Whether a figure reaches it.

        Raises:
            UserError: it was not measured.
        """
        found = result.get(self.key)
        if found is None:
            raise UserError(f"--require {self.text}: {self.key} was not measured here")
        return bool(found >= self.value if self.least else found <= self.value)  # NaN reaches nothing
