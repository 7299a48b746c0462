"""Correcting the limit of latency where a whole student is measured to be slower than the table of its modules says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from compressvit.errors import UserError
from compressvit.transforms.shrink.plan import ShrinkPlan, Timing

log = logging.getLogger("compressvit")

CORRECTIONS = 3  # at most
_ABOVE, _BELOW = 1.02, 0.95  # parts of the limit between which what is measured is near enough


def corrected(
    plan: ShrinkPlan, limit: float, timed: Callable[[ShrinkPlan], ShrinkPlan], within: Callable[[float], ShrinkPlan]
) -> ShrinkPlan:
    """A plan whose student is measured to be within the limit, clearly or nearly; where none is found the fastest, and a warning. All that
    were measured stand in it.

    What is measured is taken to be a line of what is predicted: through the teacher, which takes 1 of its own time, and a student that was
    measured; or through two students, one above the limit and one below.

    Args:
        plan: within the limit by the table.
        limit: of latency, as a fraction of the teacher's.
        timed: measures the student of a plan and notes that in it.
        within: the plan within another limit. May raise a `UserError`.
    """
    trials = [timed(plan)]
    below: tuple[float, float] | None = None
    above, best, why = (1.0, 1.0), None, ""
    while True:
        predicted, (low, found, _) = _figures(trials[-1])
        if low <= _ABOVE * limit:
            below, best = (predicted, found), trials[-1]
            if len(trials) == 1 or found >= _BELOW * limit:
                break
        else:
            above = (predicted, found)
        if len(trials) > CORRECTIONS:
            why = f"{CORRECTIONS} corrections were not enough"
            break
        wanted = _between(above, below or (1.0, 1.0), limit)
        if wanted is None:
            why = "too little of what the table predicts to be saved is"
            break
        try:
            trials.append(timed(within(wanted)))
        except UserError:
            why = "a faster student would be smaller than the methods reach"
            break
    if best is not None:
        return _beside(best, trials, limit)
    fastest = min(trials, key=lambda trial: _figures(trial)[1][1])
    _, (low, found, high) = _figures(fastest)
    log.warning("latency: asked for %.2f, measured %.2f (%.2f–%.2f): %s", limit, found, low, high, why)
    return _beside(fastest, trials, limit)


def _beside(plan: ShrinkPlan, trials: Sequence[ShrinkPlan], limit: float) -> ShrinkPlan:
    """The plan with what was measured of all that were tried."""
    assert plan.latency is not None
    timings = []
    for trial in trials:
        predicted, measured = _figures(trial)
        timings.append(Timing(predicted=predicted, measured=measured, kept=measured[0] <= _ABOVE * limit))
    known = plan.latency.model_copy(update={"limit": limit, "trials": tuple(timings)})
    return plan.model_copy(update={"latency": known})


def _figures(plan: ShrinkPlan) -> tuple[float, tuple[float, float, float]]:
    """Predicted, and measured."""
    assert plan.latency is not None
    assert plan.latency.measured is not None
    return plan.latency.predicted, plan.latency.measured


def _between(one: tuple[float, float], other: tuple[float, float], limit: float) -> float | None:
    """The predicted value at which a line through two points (predicted, measured) is at the limit; None where it falls or is flat."""
    run, rise = other[0] - one[0], other[1] - one[1]
    if run * rise <= 0:
        return None
    wanted = one[0] + (limit - one[1]) * run / rise
    return wanted if wanted > 0 else None
