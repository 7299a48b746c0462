"""One budget over everything: every attention and MLP of the backbone keeps what the model's output needs most for its price.

Each may lose hidden neurons, dimensions of its heads or whole heads, and its layers may be low rank, alone or together. Which of these
loses least at a price differs from block to block, so one budget chooses among all of them: the errors of all forms are computed in
closed form from unlabelled images, in units of the model's output (`compressvit.transforms.shrink.offers`), and the forms with the least
sum of errors within the budget are chosen (`compressvit.fitting.hull`). All layers are then fitted in the order they run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
from pydantic import Field, model_validator
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.allocate import Budget
from compressvit.fitting.hull import Forms, choose, least
from compressvit.fitting.reference import Reference
from compressvit.log import progress
from compressvit.model import surgery
from compressvit.model.backbone import describe
from compressvit.model.linear import weight_shape
from compressvit.spec import Spec
from compressvit.transforms.base import Transform, transform
from compressvit.transforms.narrow.fit import Settings, TeacherBlock
from compressvit.transforms.narrow.form import BlockForm
from compressvit.transforms.narrow.places import LAYERS, Place
from compressvit.transforms.narrow.plan import NarrowPlan, smaller
from compressvit.transforms.narrow.spec import NarrowStep
from compressvit.transforms.shrink.offers import Methods, offers
from compressvit.transforms.shrink.prices import Prices, Unit

Method = Literal["neurons", "head_dim", "heads", "rank"]
_SHARES = 64  # of all widths, of which a plan without values tries the largest
_MEASURED = 256  # images that say what each form costs; more of them only fit the one that is chosen
_ROUNDS = 5  # of exact counts, after each of which the limits are corrected


class ShrinkBudget(Spec):
    """What the student may cost: one limit or several, all of which hold. Up to 1 each is a fraction of the teacher's."""

    parameters: float | None = Field(None, gt=0, description="Parameters; e.g. 0.5, or 11000000.")
    bytes: float | None = Field(None, gt=0, description="Bytes of model.safetensors.")
    macs: float | None = Field(None, gt=0, description="Multiply-accumulates for one image.")

    @model_validator(mode="after")
    def _at_least_one(self) -> ShrinkBudget:
        if not self.units:
            raise ValueError("a budget names at least one of parameters, bytes, macs, e.g. parameters: 0.5")
        return self

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units that have a limit."""
        names: tuple[Unit, ...] = ("parameters", "bytes", "macs")
        return tuple(name for name in names if getattr(self, name) is not None)

    def limits(self, of_teacher: np.ndarray) -> np.ndarray:
        """(units,): the most that may be spent, where the teacher costs `of_teacher`."""
        values = [float(getattr(self, unit)) for unit in self.units]
        return np.array(
            [np.floor(value * whole if value <= 1 else value) for value, whole in zip(values, of_teacher, strict=True)]
        )


class ShrinkPlan(NarrowPlan):
    """A resolved `Shrink`."""


@transform("shrink", ShrinkPlan)
class Shrink(NarrowStep):
    """Make every attention and MLP of the backbone as small as a budget asks, each in the way that loses least."""

    budget: ShrinkBudget = Field(description="What the student may cost: several limits all hold.")
    methods: tuple[Method, ...] = Field(
        ("neurons", "head_dim", "heads", "rank"),
        min_length=1,
        description="What may be reduced: hidden neurons of MLPs, dimensions of heads, whole heads, and the rank of linear layers.",
    )
    pivoted: bool = Field(
        True,
        description="The form of low-rank layers: pivoted (the same function with fewer numbers), or two factors, which are faster at a "
        "rank.",
    )
    multiple: int = Field(8, ge=1, description="Widths and ranks are multiples of it, which hardware prefers.")

    def with_budget(self, budget: Budget) -> Shrink:
        only = {name: getattr(budget, name) for name in ShrinkBudget.model_fields}
        return self.model_copy(update={"budget": ShrinkBudget(**only)})

    @property
    def provisional(self) -> tuple[str, ...]:
        return (
            "widths are uniform in this plan; apply chooses the form of every block by the errors it measures on the calibration images",
        )

    @classmethod
    def examples(cls) -> Sequence[Transform]:
        return (
            Shrink(budget=ShrinkBudget(parameters=0.7), metric="weights", multiple=4),
            Shrink(
                budget=ShrinkBudget(macs=0.8, parameters=0.8),
                metric="weights",
                methods=("neurons", "head_dim"),
                multiple=4,
            ),
        )

    def plan(self, model: nn.Module, reference: Reference | None = None) -> ShrinkPlan:
        found = self.places_of(model)
        prices = Prices.of(model, found, self.budget.units)
        whole, of_teacher = prices.whole(model), prices.of_teacher(model)
        limits = self.budget.limits(of_teacher)
        self._refuse_large(limits, of_teacher)
        if reference is None:
            return self._resolved(self._uniform(model, found, prices, limits))
        parts = self._offers(model, found, prices, reference)
        fixed = whole - np.sum([forms.prices.max(axis=0) for forms in parts.values()], axis=0)
        cheapest = self._resolved(_together({name: _cheapest(forms) for name, forms in parts.items()}))
        smallest = fixed + least(parts)
        if "bytes" in self.budget.units:  # with the names in the file's header
            smallest = np.maximum(smallest, self._cost(model, cheapest, prices))
        self._refuse_small(limits, smallest, of_teacher)
        wanted = limits - fixed
        for _ in range(_ROUNDS):
            chosen = choose(parts, wanted.tolist())
            if chosen is None:
                break
            plan = self._resolved(_together(chosen))
            over = self._cost(model, plan, prices) - limits
            if (over <= 0).all():
                return plan
            wanted = wanted - np.maximum(over, 0)
        if (self._cost(model, cheapest, prices) <= limits).all():
            return cheapest
        raise self._too_small(limits, smallest, of_teacher)

    def _resolved(self, forms: Mapping[str, BlockForm]) -> ShrinkPlan:
        settings = self.model_dump(include={"pivoted", "metric", "sequential", "ridge", "output_ridge"})
        return ShrinkPlan(forms=smaller(forms), **settings)

    def _offers(
        self, model: nn.Module, found: Sequence[Place], prices: Prices, reference: Reference
    ) -> dict[str, Forms[BlockForm]]:
        images = self.metric != "weights"
        if images:  # of all layers in one pass over them
            reference.require_images(self.name)
            paths = [f"{p.path}.{layer}" for p in found for layer in LAYERS if _changes(p, layer)]
            reference.moments(paths, outputs=True, most=_MEASURED)
        settings = Settings(self.ridge, self.output_ridge, images)
        branches = describe(reference.model).family.branches
        may = Methods(
            **{name: name in self.methods for name in get_args(Method)}, multiple=self.multiple, pivoted=self.pivoted
        )
        result: dict[str, Forms[BlockForm]] = {}
        for place in progress(found, "measuring what each block can become", len(found)):
            result |= offers(TeacherBlock(place, reference, branches, settings), prices, may)
        return result

    def _uniform(
        self, model: nn.Module, found: Sequence[Place], prices: Prices, limits: np.ndarray
    ) -> dict[str, BlockForm]:
        """The largest share of all widths alike that meets the limits; the smallest of all where none does."""

        def at(part: int) -> dict[str, BlockForm]:
            return {place.path: self._of_share(model, place, part / _SHARES) for place in found}

        low, high = 1, _SHARES  # the least share of all, and one that is too large
        while high - low > 1:
            middle = (low + high) // 2
            fits = (self._cost(model, self._resolved(at(middle)), prices) <= limits).all()
            low, high = (middle, high) if fits else (low, middle)
        return at(low)

    def _of_share(self, model: nn.Module, place: Place, share: float) -> BlockForm:
        def near(whole: int) -> int | None:
            step = self.multiple if whole >= 2 * self.multiple else 1
            width = max(step, int(share * whole / step) * step)
            return None if width == whole else width

        def of_heads(name: Literal["heads", "head_dim"]) -> bool:
            return name in self.methods and name in place.options

        form = BlockForm(
            neurons=near(place.neurons) if place.neurons and "neurons" in self.methods else None,
            head_dim=near(place.head_dim) if of_heads("head_dim") else None,
            heads=max(1, int(share * place.heads)) if of_heads("heads") and not of_heads("head_dim") else None,
        )
        if form.layers() or "rank" not in self.methods:
            return form
        layers = [layer for layer in LAYERS if _changes(place, layer)]
        shapes = {layer: weight_shape(model.get_submodule(f"{place.path}.{layer}")) for layer in layers}
        return BlockForm(ranks={layer: _rank_of(share, *shape, self.pivoted) for layer, shape in shapes.items()})

    def _cost(self, model: nn.Module, plan: ShrinkPlan, prices: Prices) -> np.ndarray:
        empty = surgery.skeleton(model)
        plan.apply(empty)
        return prices.whole(empty)

    def _refuse_large(self, limits: np.ndarray, of_teacher: np.ndarray) -> None:
        if (limits >= of_teacher).all():
            asked, has = (
                " and ".join(f"{int(value):,} {unit}" for unit, value in zip(self.budget.units, values, strict=True))
                for values in (limits, of_teacher)
            )
            raise UserError(
                f"{self.name}: a budget of {asked} is no smaller than the teacher, which has {has}; give less, or leave the step out"
            )

    def _refuse_small(self, limits: np.ndarray, smallest: np.ndarray, of_teacher: np.ndarray) -> None:
        if (smallest > limits).any():
            raise self._too_small(limits, smallest, of_teacher)

    def _too_small(self, limits: np.ndarray, smallest: np.ndarray, of_teacher: np.ndarray) -> UserError:
        texts = [
            f"{int(limit):,} {unit} (the smallest that {', '.join(self.methods)} reach is {int(low):,}, {low / whole:.3f} of the teacher's "
            f"{int(whole):,})"
            for unit, limit, low, whole in zip(self.budget.units, limits, smallest, of_teacher, strict=True)
            if low > limit or not (smallest > limits).any()
        ]
        return UserError(
            f"{self.name}: a budget of {' and '.join(texts)} cannot be met; raise it, or allow more methods"
        )


def _rank_of(share: float, outputs: int, inputs: int, pivoted: bool) -> int:
    """The rank at which a layer has about this share of its numbers."""
    both, numbers = outputs + inputs, share * outputs * inputs
    rank = (both - (both**2 - 4 * numbers) ** 0.5) / 2 if pivoted else numbers / both
    return min(max(1, int(rank)), min(outputs, inputs) - 1)


def _cheapest(forms: Forms[BlockForm]) -> BlockForm:
    """The form that costs least, in the first unit."""
    return forms.forms[int(np.lexsort(forms.prices.T[::-1])[0])]


def _changes(place: Place, layer: str) -> bool:
    return bool(place.options) if layer.startswith("attn.") else bool(place.neurons)


def _together(chosen: Mapping[str, BlockForm]) -> dict[str, BlockForm]:
    """The forms of blocks from those of their sublayers."""
    found: dict[str, BlockForm] = {}
    for path, form in chosen.items():
        block = path.rpartition(".")[0]
        other = found.get(block, BlockForm())
        own = {name: value for name, value in form if name != "ranks" and value is not None}
        found[block] = other.model_copy(update={**own, "ranks": other.ranks | form.ranks})
    return found
