"""Correcting the limit of latency where a whole student is measured to be slower than the table of its modules says."""

from __future__ import annotations

import logging
from collections.abc import Callable

from compressvit.errors import UserError
from compressvit.transforms.shrink.plan import ShrinkPlan

log = logging.getLogger("compressvit")

CORRECTIONS = 3  # at most
_ABOVE, _BELOW = 1.02, 0.95  # parts of the limit between which what is measured is near enough


def corrected(
    plan: ShrinkPlan, limit: float, timed: Callable[[ShrinkPlan], ShrinkPlan], within: Callable[[float], ShrinkPlan]
) -> ShrinkPlan:
    """A plan whose student is measured to be within the limit, clearly or nearly; where none is found, the last that was measured.

    What is measured is taken to be a line of what is predicted: through the teacher, which takes 1 of its own time, and a student that was
    measured; or through two students, one above the limit and one below.

    Args:
        plan: within the limit by the table.
        limit: of latency, as a fraction of the teacher's.
        timed: measures the student of a plan and notes that in it.
        within: the plan within another limit. May raise a `UserError`.
    """
    last = timed(plan)
    below: tuple[float, float] | None = None
    above, best = (1.0, 1.0), None
    for trial in range(CORRECTIONS + 1):
        assert last.latency is not None
        assert last.latency.measured is not None
        low, found, _ = last.latency.measured
        if low <= _ABOVE * limit:
            below, best = (last.latency.predicted, found), last
            if trial == 0 or found >= _BELOW * limit:
                break
        else:
            above = (last.latency.predicted, found)
        wanted = _between(above, below or (1.0, 1.0), limit)
        if trial == CORRECTIONS or wanted is None:
            break
        try:
            last = timed(within(wanted))
        except UserError:
            log.warning(
                "latency: a student that is measured to be as fast as asked would be smaller than the methods reach"
            )
            break
    return best or last


def _between(one: tuple[float, float], other: tuple[float, float], limit: float) -> float | None:
    """The predicted value at which a line through two points (predicted, measured) is at the limit; None where it falls or is flat."""
    run, rise = other[0] - one[0], other[1] - one[1]
    if run * rise <= 0:
        return None
    wanted = one[0] + (limit - one[1]) * run / rise
    return wanted if wanted > 0 else None
