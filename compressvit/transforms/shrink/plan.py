"""The plan of `shrink`: that of `narrow`, and how it came about."""

from __future__ import annotations

from typing import ClassVar

from compressvit.spec import Frozen
from compressvit.transforms.narrow.plan import NarrowPlan
from compressvit.transforms.shrink.keep import PlannedKeep
from compressvit.transforms.shrink.latency import LatencyTable


class PlannedLatency(Frozen):
    """What `shrink` knows of the student's latency.

    Attributes:
        table: what it was planned by.
        predicted: latency of the student by that table, relative to the teacher's.
        measured: the same measured, teacher and student in turns: the median of the ratios, between the ends of its interval.
    """

    table: LatencyTable
    predicted: float
    measured: tuple[float, float, float] | None = None


class ShrinkPlan(NarrowPlan):
    """A resolved `Shrink`.

    Attributes:
        latency: where that is a unit.
        kept: where its size followed from what students lost.
    """

    starts: ClassVar[tuple[str, ...]] = (*NarrowPlan.starts, "latency", "kept")

    latency: PlannedLatency | None = None
    kept: PlannedKeep | None = None
