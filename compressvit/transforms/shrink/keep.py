"""A loss as the budget: the smallest student that keeps it, by bisection over its size; every size that is tried is fitted and judged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from pydantic import Field, model_validator

from compressvit.errors import UserError
from compressvit.fitting.judge import FIGURES
from compressvit.spec import Frozen, Spec
from compressvit.transforms.base import Sizes, Tried
from compressvit.transforms.shrink.prices import Unit

log = logging.getLogger("compressvit")

LARGEST = 0.97  # of the teacher's size: the largest student that is tried, where no smaller one keeps what is asked
_DIGITS = 4  # of a size that is tried


class ShrinkKeep(Spec):
    """What the student keeps of its teacher on held-out images: one figure or several, all of which hold."""

    cosine: float | None = Field(
        None, gt=0, lt=1, description="Mean cosine similarity of its outputs to the teacher's, at least; e.g. 0.98."
    )
    top1_drop: float | None = Field(
        None,
        ge=0,
        lt=100,
        description="Points of top-1 accuracy below the teacher's, at most; e.g. 1.0. Needs labels, as the others do.",
    )
    worst_class_drop: float | None = Field(
        None, ge=0, lt=100, description="The same of the class that loses most; a class with few images says little."
    )
    worst_domain_drop: float | None = Field(
        None,
        ge=0,
        lt=100,
        description="The same of the domain that loses most, where images lie in folders of domains inside those of their classes.",
    )

    @model_validator(mode="after")
    def _at_least_one(self) -> ShrinkKeep:
        if not self.wanted:
            raise ValueError(f"keep names at least one of {', '.join(FIGURES)}, e.g. cosine: 0.98")
        return self

    @property
    def wanted(self) -> dict[str, float]:
        """The limits, by figure."""
        return {name: value for name in FIGURES if (value := getattr(self, name)) is not None}

    def holds(self, found: dict[str, float]) -> bool:
        """Whether figures are within the limits."""
        return all(
            found[name] >= limit if FIGURES[name] else found[name] <= limit for name, limit in self.wanted.items()
        )

    def words(self) -> str:
        """What is asked, as 'cosine ≥ 0.98'."""
        return " and ".join(f"{name} {'≥' if FIGURES[name] else '≤'} {limit:g}" for name, limit in self.wanted.items())


class Trial(Frozen):
    """A size that was tried.

    Attributes:
        size: the limit, as a fraction of the teacher's.
        spent: what the student costs, in the unit.
        figures: of the student, by name.
        kept: whether it keeps what is asked.
    """

    size: float
    spent: float
    figures: dict[str, float]
    kept: bool

    def words(self) -> str:
        """Its figures."""
        return said(self.figures)


class PlannedKeep(Frozen):
    """How the size of a student was found.

    Attributes:
        wanted: the limits, by figure.
        unit: of the sizes.
        images: that decided, in words.
        trials: in the order they were made.
    """

    wanted: dict[str, float]
    unit: Unit
    images: str
    trials: tuple[Trial, ...]

    def sizes(self) -> Sizes:
        """The students that were judged; the smallest that keeps what is asked was chosen."""
        chosen = min((trial.size for trial in self.trials if trial.kept), default=None)
        tried = [
            Tried(trial.size, trial.spent, trial.figures, trial.kept, trial.size == chosen) for trial in self.trials
        ]
        return Sizes(ShrinkKeep(**self.wanted).words(), self.unit, self.images, tried)


def said(figures: dict[str, float]) -> str:
    """Figures in words."""
    return ", ".join(
        f"{name} {value:.4f}" if FIGURES[name] else f"{name} {value:.2f}" for name, value in figures.items()
    )


def smallest(
    keep: ShrinkKeep, unit: Unit, least: float, tries: int, attempt: Callable[[float], Trial]
) -> tuple[Trial, list[Trial]]:
    """The smallest size that was found to keep what is asked, and all that were tried.

    Args:
        unit: of the size.
        least: the smallest size there is, as a fraction of the teacher's.
        tries: how many sizes are tried.
        attempt: fits and judges a student.

    Raises:
        UserError: not even the largest student keeps it.
    """
    low, high = min(least, LARGEST), LARGEST
    trials: list[Trial] = []

    def judged(size: float) -> Trial:
        trial = attempt(size)
        trials.append(trial)
        log.info(
            "size %d of %d: %.4g of the teacher's %s, %s, %s",
            len(trials),
            max(tries, len(trials)),
            size,
            unit,
            trial.words(),
            "kept" if trial.kept else f"not {keep.words()}",
        )
        return trial

    best: Trial | None = None
    for _ in range(tries):
        size = round((low + high) / 2, _DIGITS)
        if any(trial.size == size for trial in trials):
            break
        trial = judged(size)
        best, low, high = (trial, low, size) if trial.kept else (best, size, high)
    if best is None:
        best = judged(LARGEST)
        if not best.kept:
            raise UserError(
                f"shrink.keep: {keep.words()} cannot be kept: the largest student that was tried, {LARGEST:g} of the teacher's {unit}, has "
                f"{best.words()}; ask for less, or give more calibration images"
            )
    return best, trials


def stored(trials: Any) -> list[Trial]:
    """Those of a run that is resumed, from JSON; none where they are of another version."""
    try:
        return [Trial.model_validate(trial) for trial in trials or ()]
    except ValueError:
        return []
