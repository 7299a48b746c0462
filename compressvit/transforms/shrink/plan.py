"""The plan of `shrink`: that of `narrow`, and how it came about."""

from __future__ import annotations

from typing import ClassVar

from compressvit.spec import Frozen
from compressvit.transforms.base import Sizes, Tried
from compressvit.transforms.narrow.plan import NarrowPlan
from compressvit.transforms.shrink.keep import PlannedKeep
from compressvit.transforms.shrink.latency import LatencyTable


class Timing(Frozen):
    """A student that was measured.

    Attributes:
        predicted, measured: as in `PlannedLatency`.
        kept: whether it is within the limit, clearly or nearly.
    """

    predicted: float
    measured: tuple[float, float, float]
    kept: bool


class PlannedLatency(Frozen):
    """What `shrink` knows of the student's latency.

    Attributes:
        table: what it was planned by.
        predicted: latency of the student by that table, relative to the teacher's.
        measured: the same measured, teacher and student in turns: the median of the ratios, between the ends of its interval.
        limit: of latency, relative to the teacher's; None where it had none.
        trials: all students that were measured for it, in their order.
    """

    table: LatencyTable
    predicted: float
    measured: tuple[float, float, float] | None = None
    limit: float | None = None
    trials: tuple[Timing, ...] = ()

    def sizes(self) -> Sizes:
        """The students that were measured."""
        tried = [
            Tried(
                size=trial.predicted,
                spent=trial.predicted * self.table.whole,
                figures={"latency": trial.measured[1]},
                kept=trial.kept,
                chosen=(trial.predicted, trial.measured) == (self.predicted, self.measured),
                intervals={"latency": (trial.measured[0], trial.measured[2])},
            )
            for trial in self.trials
        ]
        return Sizes(f"latency ≤ {self.limit:.2f}", "latency", self.table.where(), tried)


class ShrinkPlan(NarrowPlan):
    """A resolved `Shrink`.

    Attributes:
        latency: where that is a unit.
        kept: where its size followed from what students lost.
    """

    starts: ClassVar[tuple[str, ...]] = (*NarrowPlan.starts, "latency", "kept")

    latency: PlannedLatency | None = None
    kept: PlannedKeep | None = None

    def sizes(self) -> list[Sizes]:
        found = [] if self.kept is None else [self.kept.sizes()]
        return found if self.latency is None or not self.latency.trials else [*found, self.latency.sizes()]
