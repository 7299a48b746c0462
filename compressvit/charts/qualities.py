"""What an evaluation measures of a model: order, names and formats, for every table, message and chart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Quality:
    """One figure of an evaluation.

    Attributes:
        key: in `results.json` and `metrics.jsonl`.
        short: in the heading of a column.
        long: in the name of a row or an axis.
        said: in a sentence, before the value.
        unit: '%', or nothing for a share of 1.
        digits: after the point.
    """

    key: str
    short: str
    long: str
    said: str
    unit: str
    digits: int

    @property
    def heading(self) -> str:
        """`short` with the unit."""
        return f"{self.short} ({self.unit})" if self.unit else self.short

    @property
    def axis(self) -> str:
        """`long` with the unit."""
        return f"{self.long} ({self.unit})" if self.unit else self.long

    def number(self, value: float) -> str:
        """A value without its unit."""
        return f"{value:.{self.digits}f}"

    def text(self, value: float) -> str:
        """A value with its unit."""
        return f"{self.number(value)} {self.unit}".rstrip()


# In the order in which they are shown.
QUALITIES = {
    quality.key: quality
    for quality in (
        Quality("top1", "top-1", "top-1", "top-1", "%", 2),
        Quality("top5", "top-5", "top-5", "top-5", "%", 2),
        Quality("agreement", "same class", "same first class as the teacher", "agreement with the teacher", "%", 2),
        Quality("cosine", "cosine", "cosine of the outputs", "cosine", "", 4),
        Quality("cosine_patches", "of patches", "cosine of the patch tokens", "of the patch tokens", "", 4),
    )
}
# Those that say how good a model is, the first that was measured before the others.
RANKING = ("top1", "agreement", "cosine")


def measured(scores: Mapping[str, Any]) -> list[Quality]:
    """Those that were measured, without top-5."""
    return [quality for key, quality in QUALITIES.items() if key != "top5" and scores.get(key) is not None]


def words(scores: Mapping[str, Any]) -> str:
    """The scores that were measured, in a few words."""
    return ", ".join(f"{q.said} {q.number(scores[q.key])}{q.unit}" for q in measured(scores))
