"""The search for the forms of all blocks whose errors are least within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import nn

from compressvit.errors import UnmetBudget, UserError
from compressvit.fitting.hull import Forms, choose, least
from compressvit.model import surgery
from compressvit.transforms.narrow.form import BlockForm
from compressvit.transforms.narrow.places import Place
from compressvit.transforms.shrink.budget import ShrinkBudget
from compressvit.transforms.shrink.offers import Methods, Offer, offers
from compressvit.transforms.shrink.plan import ShrinkPlan
from compressvit.transforms.shrink.prices import Prices, Row, Unit

_ALMOST = 1e-9  # of a limit, by which sums of prices may be above it
_ROUNDS = 10  # of exact counts, after each of which the limits are corrected


class Step(Protocol):
    """The interface of the step that searches."""

    name: ClassVar[str]

    @property
    def methods(self) -> tuple[str, ...]: ...
    @property
    def may(self) -> Methods: ...
    def resolved(self, forms: Mapping[str, BlockForm]) -> ShrinkPlan:
        """The plan of these forms of blocks."""


class Search:
    """The search for the forms of all blocks within the limits of a budget.

    Attributes:
        prices: of what blocks are made of.
        of_teacher, limits: (units,).
    """

    def __init__(self, step: Step, model: nn.Module, prices: Prices, budget: ShrinkBudget):
        self.step, self.model, self.prices = step, model, prices
        self.of_teacher = prices.of_teacher(model)
        self.limits = budget.limits(prices.units, self.of_teacher)
        as_they_are = np.sum([prices.part(*part) for part in prices.parts()], axis=0)
        self._fixed = prices.student(model, {}) - as_they_are  # what everything else costs

    def refuse(self, found: Sequence[Place], *, large: bool = True) -> None:
        """Raise an `UnmetBudget` if the budget asks for less than the forms can reach, or, with `large`, a `UserError` if for nothing; no
        values are needed."""
        units = self.prices.units
        if large and (self.limits >= self.of_teacher).all():
            asked, has = (
                " and ".join(amount(unit, value) for unit, value in zip(units, values, strict=True))
                for values in (self.limits, self.of_teacher)
            )
            raise UserError(
                f"{self.step.name}: a budget of {asked} is no smaller than the teacher, which has {has}; give less, or leave the step out"
            )
        parts = self._without_errors(found)
        smallest = self.smallest(parts)
        if (smallest > self.limits).any():
            raise self._too_small(smallest)

    def within(self, parts: Mapping[str, Forms[Offer]]) -> ShrinkPlan:
        """The plan whose forms lose least within the limits."""
        wanted, lowest = self.limits - self._fixed, least(parts)
        for tried in range(_ROUNDS):
            chosen = choose(parts, wanted.tolist())
            if chosen is None:
                break
            found = _together(chosen)
            over = self._cost_of(found) - self.limits
            if (over <= _ALMOST * self.limits).all():
                return self._plan(found)
            less = wanted - 2**tried * np.maximum(over, 0)  # more each time: forms have steps
            wanted = np.maximum(less, np.minimum(wanted, (wanted + lowest) / 2))  # but what some forms still meet
        cheapest = self._cheapest(parts)
        if (self._cost_of(cheapest) <= self.limits).all():
            return self._plan(cheapest)
        raise self._too_small(self.smallest(parts))

    def cost(self, plan: ShrinkPlan, bits: Mapping[str, int] = {}) -> Row:
        """(units,): of the student of a plan.

        Args:
            bits: of layers, by path, where a step after this one rounds them; of others the fewest.
        """
        empty = surgery.skeleton(self.model)
        plan.apply(empty)
        return self.prices.student(empty, plan.forms, bits)

    def _cost_of(self, found: Mapping[str, Offer]) -> Row:
        bits = {f"{block}.{layer}": own for block, offer in found.items() for layer, own in offer.bits.items()}
        return self.cost(self._plan(found), bits)

    def _plan(self, found: Mapping[str, Offer]) -> ShrinkPlan:
        return self.step.resolved({block: offer.form() for block, offer in found.items()})

    def _without_errors(self, found: Sequence[Place]) -> dict[str, Forms[Offer]]:
        """The forms that cost least, of all parts; those of blocks that are alike are found once."""
        known: dict[Any, dict[str, Forms[Offer]]] = {}
        result: dict[str, Forms[Offer]] = {}
        for place in found:
            own = known.setdefault(self.prices.key(place.path), {})
            if not own:
                own |= {
                    name.removeprefix(f"{place.path}."): forms
                    for name, forms in offers(place, self.prices, self.step.may, None).items()
                }
            result |= {f"{place.path}.{part}": forms for part, forms in own.items()}
        return result

    def _cheapest(self, parts: Mapping[str, Forms[Offer]]) -> dict[str, Offer]:
        return _together({name: _cheapest(forms) for name, forms in parts.items()})

    def smallest(self, parts: Mapping[str, Forms[Offer]]) -> Row:
        """(units,): the least that the forms reach, each unit by itself."""
        smallest = self._fixed + least(parts)
        if "bytes" in self.prices.units:  # with the names in the file's header
            i = self.prices.units.index("bytes")
            smallest[i] = max(smallest[i], self._cost_of(self._cheapest(parts))[i])
        return smallest

    def _too_small(self, smallest: Row) -> UnmetBudget:
        met = not (smallest > self.limits).any()
        bits = {"bytes": f" and {min(self.prices.bits)} bits a weight"} if self.prices.bits else {}
        texts = [
            f"{amount(unit, limit)} (the smallest that {', '.join(self.step.methods)}{bits.get(unit, '')} reach is {amount(unit, low)}, "
            f"{low / whole:.3f} of the teacher's {amount(unit, whole, short=True)})"
            for unit, limit, low, whole in zip(self.prices.units, self.limits, smallest, self.of_teacher, strict=True)
            if low > limit or met
        ]
        together = " together" if met else ""
        table = self.prices.table
        where = f", measured on {table.where()}" if table is not None else ""
        return UnmetBudget(
            f"{self.step.name}: a budget of {' and '.join(texts)} cannot be met{together}{where}; raise it, or allow more methods"
        )


def amount(unit: Unit, value: float, *, short: bool = False) -> str:
    """A price in words."""
    if unit == "latency":
        return f"{value:,.2f} ms" if short else f"{value:,.2f} ms latency"
    return f"{int(value):,}" if short else f"{int(value):,} {unit}"


def _cheapest(forms: Forms[Offer]) -> Offer:
    """The form that costs least, in the first unit."""
    return forms.forms[int(np.lexsort(forms.prices.T[::-1])[0])]


def _together(chosen: Mapping[str, Offer]) -> dict[str, Offer]:
    """What blocks become, from what their sublayers do."""
    found: dict[str, Offer] = {}
    for path, offer in chosen.items():
        block = path.rpartition(".")[0]
        other = found.get(block, Offer())
        own = {
            name: value for name, value in offer if name in ("neurons", "heads", "head_dim", "parts", "qkv") and value
        }
        both = {
            "ranks": other.ranks | offer.ranks,
            "factored": (*other.factored, *offer.factored),
            "bits": other.bits | offer.bits,
        }
        found[block] = other.model_copy(update={**own, **both})
    return found
