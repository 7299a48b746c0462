"""The methods that `frontier` compares: for each, the step of a size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.allocate import Budget
from compressvit.model import cost, surgery
from compressvit.model.backbone import input_size, model_name
from compressvit.transforms.base import Transform
from compressvit.transforms.lors.spec import LORS
from compressvit.transforms.low_rank.spec import LowRank
from compressvit.transforms.narrow.spec import Narrow
from compressvit.transforms.quantise.spec import Quantise
from compressvit.transforms.shrink.spec import Shrink

_SHARES = 64  # of all widths, of which `narrow` tries the largest


def _narrow(model: nn.Module, budget: Budget) -> Narrow:
    """The largest share of the neurons and of the dimensions of heads (of whole heads where these cannot be removed) within a budget, one
    share for all blocks.

    Raises:
        UserError: there is none.
    """
    found = Narrow(neurons=0.5).places_of(model)
    names = ["neurons"] * all(place.neurons for place in found)
    names += [next((name for name in ("head_dim", "heads") if all(name in place.options for place in found)), "")]
    names = [name for name in names if name]
    if not names:
        raise UserError(
            f"narrow: not every block of {model_name(model)} has neurons, dimensions of heads or heads that can be removed, so there is no "
            "one share for all; shrink chooses for each block"
        )
    limit = budget.limit(_cost(model, None, budget.unit))

    def at(part: int) -> Narrow:
        return Narrow.model_validate(dict.fromkeys(names, part / _SHARES))

    # how many of the shares, from the smallest on, are within the limit
    fitting = bisect_left(range(1, _SHARES), True, key=lambda part: _cost(model, at(part), budget.unit) > limit)
    if not fitting:
        least = _cost(model, at(1), budget.unit)
        raise UserError(
            f"narrow: a budget of {limit:,} {budget.unit} cannot be met (with 1/{_SHARES} of all widths there are {least:,}); raise it"
        )
    return at(fitting)


def _cost(model: nn.Module, step: Narrow | None, unit: str) -> int:
    empty = surgery.skeleton(model)
    if step is not None:
        step.plan(empty).apply(empty)
    return cost.cost(empty, input_size(empty)).as_dict()[unit]


@dataclass(frozen=True)
class Method:
    """A method that is compared.

    Attributes:
        step: its step for a model, of a size in a unit.
        units: in which its size can be given.
    """

    step: Callable[[nn.Module, str, float], Transform]
    units: tuple[str, ...]


METHODS: dict[str, Method] = {
    "shrink": Method(lambda _, unit, size: Shrink.model_validate({"budget": {unit: size}}), Shrink.budget_units),
    "narrow": Method(
        lambda model, unit, size: _narrow(model, Budget.model_validate({unit: size})), tuple(Budget.model_fields)
    ),
    "low_rank": Method(lambda _, unit, size: LowRank.model_validate({"budget": {unit: size}}), LowRank.budget_units),
    "lors": Method(
        lambda _, unit, size: LORS.model_validate({"share": "auto", "budget": {unit: size}}), LORS.budget_units
    ),
    "quantise": Method(lambda _, unit, size: Quantise.model_validate({"budget": {unit: size}}), Quantise.budget_units),
}


def budgeted(steps: Sequence[Transform], unit: str) -> int:
    """The place of the last step whose size follows from a budget, if one does from a budget in this unit of such a step."""
    spending = [i for i, step in enumerate(steps) if step.budget_units]
    return max([i for i in spending if unit in steps[i].budget_units] or spending)


def steps_of(
    steps: Sequence[Transform], method: str | None, model: nn.Module, unit: str, size: float
) -> list[Transform]:
    """The steps with a budget: the last that spends one in this unit is given it, or is replaced by the default step of `method`.

    A `shrink` that counts on that step has the same budget, or goes with it.
    """
    last = budgeted(steps, unit)
    before, own, after = steps[:last], steps[last], steps[last + 1 :]
    counting = [step for step in before if isinstance(step, Shrink) and step.rounded]
    if method not in (None, own.name):
        return [*(step for step in before if step not in counting), METHODS[method].step(model, unit, size), *after]
    if counting and unit == "bytes" and size <= 1:
        size = int(size * cost.file_bytes(model))  # of the teacher's file, not of what shrink leaves
    before = [step.with_budget(unit, size) if step in counting else step for step in before]
    return [*before, own.with_budget(unit, size) or own, *after]
