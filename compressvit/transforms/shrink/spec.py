"""One budget over everything: every attention and MLP of the backbone keeps what the model's output needs most for its price.

Each may lose hidden neurons, dimensions of its heads or whole heads, and its layers may be low rank, alone or together. Which of these
loses least at a price differs from block to block, so one budget chooses among all of them: the errors of all forms are computed in
closed form from unlabelled images, in units of the model's output (`compressvit.transforms.shrink.offers`), and the forms with the least
sum of errors within the budget are chosen (`compressvit.fitting.hull`). All layers are then fitted in the order they run.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.hull import Forms
from compressvit.fitting.reference import Reference
from compressvit.log import progress
from compressvit.model import surgery
from compressvit.model.backbone import describe
from compressvit.model.linear import weight_shape
from compressvit.transforms.applying import fitted_copy
from compressvit.transforms.base import Transform, transform
from compressvit.transforms.low_rank.budget import original_macs
from compressvit.transforms.narrow.form import BlockForm
from compressvit.transforms.narrow.places import Place
from compressvit.transforms.narrow.plan import smaller
from compressvit.transforms.narrow.spec import NarrowStep
from compressvit.transforms.narrow.teacher import Settings, TeacherBlock
from compressvit.transforms.quantise.spec import Quantise
from compressvit.transforms.shrink.budget import ShrinkBudget
from compressvit.transforms.shrink.corrected import corrected
from compressvit.transforms.shrink.keep import PlannedKeep, ShrinkKeep, Trial, smallest, stored
from compressvit.transforms.shrink.latency import LatencyTable
from compressvit.transforms.shrink.offers import Methods, Offer, offers
from compressvit.transforms.shrink.plan import PlannedLatency, ShrinkPlan
from compressvit.transforms.shrink.prices import Prices, Unit
from compressvit.transforms.shrink.search import Search
from compressvit.transforms.shrink.stopwatch import measure, ratio

log = logging.getLogger("compressvit")

Method = Literal["neurons", "head_dim", "heads", "rank"]
_TRIES, _BATCH = 6, 1  # by default
_SHARES = 64  # of all widths, of which a plan without values tries the largest
_ASSUMED = 0.5  # of the teacher's size, in a plan without values where the size follows from what is kept


@transform("shrink", ShrinkPlan)
class Shrink(NarrowStep):
    """Make every attention and MLP of the backbone as small as a budget asks, each in the way that loses least."""

    budget_units: ClassVar[tuple[str, ...]] = tuple(ShrinkBudget.model_fields)

    budget: ShrinkBudget | None = Field(
        None, description="What the student may cost: several limits all hold. Alternatively give `keep`."
    )
    keep: ShrinkKeep | None = Field(
        None,
        description="Instead of a budget: what the student keeps on held-out images. The smallest one that does is searched for, by "
        "bisection.",
    )
    unit: Unit | None = Field(None, description="With `keep`: in which the student is the smallest. Null: parameters.")
    tries: int = Field(_TRIES, ge=1, le=20, description="With `keep`: sizes that are tried; each is fitted and judged.")
    methods: tuple[Method, ...] = Field(
        ("neurons", "head_dim", "heads", "rank"),
        min_length=1,
        description="What may be reduced: hidden neurons of MLPs, dimensions of heads, whole heads, and the rank of linear layers.",
    )
    pivoted: Literal["auto"] | bool = Field(
        "auto",
        description="The form of low-rank layers. True: pivoted, the same function with fewer numbers. False: two factors. auto: "
        "pivoted or, where latency is a unit of the budget, whichever of them is faster for a layer.",
    )
    multiple: int = Field(8, ge=1, description="Widths and ranks are multiples of it, which hardware prefers.")
    rounded: bool = Field(
        False,
        description="True: a `quantise` step follows, and the budget's bytes are those of the file that it leaves. What rounding loses "
        "with the bits that it may give each weight counts as what is removed does.",
    )
    _rounding: Quantise | None = PrivateAttr(None)  # the step behind this one

    batch: int = Field(_BATCH, ge=1, description="Where latency is a unit: images at once for which it counts.")

    @model_validator(mode="after")
    def _budget_or_keep(self) -> Shrink:
        if (self.budget is None) == (self.keep is None):
            raise ValueError(
                "shrink needs a budget or keep" + (", not both" if self.budget else ", e.g. budget: {parameters: 0.5}")
            )
        if self.unit is not None and self.keep is None:
            raise ValueError("unit is for keep; a budget names its own units")
        # a resolved recipe has them at their defaults
        if self.tries != _TRIES and self.keep is None:
            raise ValueError("tries is for keep; the student of a budget is fitted once; leave it out")
        if self.rounded and (self.budget is None or self.budget.bytes is None):
            raise ValueError(
                "rounded is for a budget of bytes; give one, e.g. budget: {bytes: 8.0e+6}, or leave it out"
            )
        if self.batch != _BATCH and "latency" not in self.target.units:
            raise ValueError("batch is for latency, which is no unit here; leave it out")
        return self

    def before(self, later: Sequence[Transform]) -> Shrink:
        if not self.rounded:
            return self
        step = next((step for step in later if isinstance(step, Quantise)), self._rounding)
        if step is None:
            raise UserError(
                "shrink.rounded counts on a quantise step behind it, and there is none; add one, e.g. "
                "quantise: {budget: {bytes: 8.0e+6}}, or leave rounded out"
            )
        if step.budget is not None and step.budget.bytes <= 1:
            raise UserError(
                f"shrink.rounded: the budget of the quantise step behind it, {step.budget.bytes:g}, is a fraction of what shrink "
                "leaves; give the bytes of the file there, e.g. quantise: {budget: {bytes: 8.0e+6}}"
            )
        found = self.model_copy()
        found._rounding = step
        return found

    @property
    def target(self) -> ShrinkBudget:
        """The budget; with `keep` half of the teacher's, until more is known."""
        return self.budget or ShrinkBudget(**{self._unit: _ASSUMED})

    @property
    def _unit(self) -> Unit:
        return self.unit or "parameters"

    @property
    def needs_images(self) -> bool:
        return self.metric != "weights" or self.keep is not None

    @property
    def judged(self) -> tuple[str, ...]:
        return () if self.keep is None else tuple(self.keep.wanted)

    def with_budget(self, unit: str, value: float) -> Shrink:
        alone: dict[str, Any] = {"budget": ShrinkBudget(**{unit: value}), "keep": None, "unit": None, "tries": _TRIES}
        if unit != "latency":
            alone["batch"] = _BATCH
        return self.model_copy(update=alone if unit == "bytes" else {**alone, "rounded": False})

    @property
    def provisional(self) -> tuple[str, ...]:
        found = [
            "widths are uniform in this plan; the run chooses the form of every block by the errors it measures on the calibration images"
        ]
        if self.keep is not None:
            found.append(
                f"the student has {_ASSUMED:g} of the teacher's {self._unit} in this plan; the run fits and judges {self.tries} students "
                f"on held-out images and takes the smallest with {self.keep.words()}"
            )
        if self.rounded:
            found.append(
                "bytes are those of the file that a quantise step after this one leaves; in this plan every weight has the fewest bits"
            )
        if self.target.latency is not None:
            assumed = (
                "latency is taken to fall as multiply-accumulates do"
                if self.target.latency <= 1
                else "nothing is assumed of a latency in milliseconds, so this plan does not follow it"
            )
            found.append(f"{assumed}; the run first measures what modules take on its device")
        return tuple(found)

    @classmethod
    def examples(cls) -> Sequence[Transform]:
        return (
            Shrink(budget=ShrinkBudget(parameters=0.7), metric="weights", multiple=8),
            Shrink(
                budget=ShrinkBudget(macs=0.8, parameters=0.8),
                metric="weights",
                methods=("neurons", "head_dim"),
                multiple=4,
            ),
        )

    def plan(self, model: nn.Module, reference: Reference | None = None) -> ShrinkPlan:
        found = self.places_of(model)
        if reference is None:
            known = tuple(unit for unit in self.target.units if unit != "latency")
            if known and self.budget:
                search = Search(self, model, self._prices(model, found, known), self.budget)
                search.refuse(found, large=known == self.budget.units)
                self._refuse_two_limits(search)
            budget = self.target
            if budget.latency is not None:
                budget = budget.unmeasured(original_macs(model))
            search = Search(self, model, self._prices(model, found, budget.units), budget)
            return self.resolved(self._uniform(model, found, search))
        search = self._search(model, found, reference)
        parts = self._offers(found, search.prices, reference)
        chosen = search.within(parts) if self.keep is None else self._smallest(model, search, parts, reference)
        if search.prices.table is None:
            return chosen
        timed = partial(self._timed, model=model, search=search, device=reference.device)
        if self.keep is not None:
            return timed(chosen)
        whole, i = search.prices.table.whole, search.prices.units.index("latency")

        def within(limit: float) -> ShrinkPlan:
            search.limits[i] = limit * whole
            return search.within(parts)

        return corrected(chosen, float(search.limits[i] / whole), timed, within)

    def refuse_by_device(self, model: nn.Module, reference: Reference) -> None:
        if self.keep is not None or "latency" in self.target.units:
            self._search(model, self.places_of(model), reference)

    def _search(self, model: nn.Module, found: Sequence[Place], reference: Reference) -> Search:
        """What is wanted and what it costs. Raises a `UserError` for what cannot be met, before an image is read."""
        if self.keep is not None:
            reference.judge.refuse(list(self.judged))
        table = self._table(model, found, reference) if "latency" in self.target.units else None
        search = Search(self, model, self._prices(model, found, self.target.units, table), self.target)
        if self.budget is not None:
            search.refuse(found)
        return search

    def _refuse_two_limits(self, search: Search) -> None:
        """Raise a `UserError` where this step and the one that rounds behind it have other limits of the same file."""
        if self._rounding is None or self._rounding.budget is None:
            return
        ours, theirs = (
            int(search.limits[search.prices.units.index("bytes")]),
            int(self._rounding.budget.bytes),
        )
        if ours != theirs:
            raise UserError(
                f"shrink: with rounded its {ours:,} bytes and the {theirs:,} of the quantise step behind it are limits of one file; give "
                f"both the same, e.g. quantise: {{budget: {{bytes: {ours}}}}}"
            )

    def _prices(
        self, model: nn.Module, found: Sequence[Place], units: Sequence[Unit], table: LatencyTable | None = None
    ) -> Prices:
        return Prices.of(model, found, units, table, self.pivoted, self._rounding if self.rounded else None)

    def _smallest(
        self, model: nn.Module, search: Search, parts: Mapping[str, Forms[Offer]], reference: Reference
    ) -> ShrinkPlan:
        """The smallest student that keeps what is asked, of those that are tried. What was tried before an interruption is known."""
        assert self.keep is not None
        keep, judge, unit = self.keep, reference.judge, self._unit
        whole, least = float(search.of_teacher[0]), float(search.smallest(parts)[0])
        name = f"sizes tried for {self.model_dump_json()} on {judge.images}"
        known = {trial.size: trial for trial in stored(reference.choices.get(name))}

        def plan_of(size: float) -> ShrinkPlan:
            search.limits = ShrinkBudget(**{unit: size}).limits((unit,), search.of_teacher)
            return search.within(parts)

        def attempt(size: float) -> Trial:
            if size not in known:
                plan = plan_of(size)
                figures = judge.figures(fitted_copy(model, plan, reference), list(self.judged))
                spent = float(search.cost(plan)[0])
                known[size] = Trial(size=size, spent=spent, figures=figures, kept=keep.holds(figures))
                reference.choices.put(name, [trial.model_dump(mode="json") for trial in known.values()])
            return known[size]

        log.info("the smallest student with %s on %s: %d sizes are tried", keep.words(), judge.images, self.tries)
        best, trials = smallest(keep, unit, least / whole, self.tries, attempt)
        found = PlannedKeep(wanted=keep.wanted, unit=unit, images=judge.images, trials=tuple(trials))
        return plan_of(best.size).model_copy(update={"kept": found})

    def _table(self, model: nn.Module, found: Sequence[Place], reference: Reference) -> LatencyTable:
        """Measured once for a model, also where several students are made of it."""
        dtype = next(model.parameters()).dtype
        name = f"latency of batches of {self.batch} in {dtype}".replace("torch.", "")
        with suppress(ValueError):  # none, or of another version
            table = LatencyTable.model_validate(reference.choices.get(name))
            if table.is_of(reference.device):
                return table
        table = measure(reference.model, found, batch=self.batch, device=reference.device, dtype=dtype)
        reference.choices.put(name, table.model_dump(mode="json"))
        return table

    def _timed(self, plan: ShrinkPlan, model: nn.Module, search: Search, device: torch.device) -> ShrinkPlan:
        """The plan with what is known of its latency, for which the whole student is measured."""
        table = search.prices.table
        assert table is not None
        predicted = float(search.cost(plan)[search.prices.units.index("latency")] / table.whole)
        student = surgery.deep_copy(model)
        plan.apply(student)
        measured = ratio(student, surgery.deep_copy(model), batch=self.batch, device=device)
        log.info(
            "latency: %.2f of the teacher's predicted, %.2f (%.2f–%.2f) measured in turns, on %s",
            predicted,
            measured[1],
            measured[0],
            measured[2],
            table.where(),
        )
        known = PlannedLatency(table=table, predicted=predicted, measured=measured)
        return plan.model_copy(update={"latency": known})

    def resolved(self, forms: Mapping[str, BlockForm]) -> ShrinkPlan:
        settings = self.model_dump(include={"metric", "sequential", "ridge", "output_ridge"})
        return ShrinkPlan(forms=smaller(forms), pivoted=bool(self.pivoted), **settings)

    @property
    def may(self) -> Methods:
        return Methods(**{name: name in self.methods for name in get_args(Method)}, multiple=self.multiple)

    def _offers(self, found: Sequence[Place], prices: Prices, reference: Reference) -> dict[str, Forms[Offer]]:
        settings = Settings.of(self)
        if settings.images:  # of all layers in one pass over them
            reference.require_images(self.name)
            reference.moments([f"{p.path}.{layer}" for p in found for layer in p.layers], outputs=True)
        family = describe(reference.model).family
        result: dict[str, Forms[Offer]] = {}
        for place in progress(found, "measuring what each block can become", len(found)):
            result |= offers(place, prices, self.may, TeacherBlock(place, reference, family, settings))
        return result

    def _uniform(self, model: nn.Module, found: Sequence[Place], search: Search) -> dict[str, BlockForm]:
        """The largest share of all widths alike that meets the limits; the smallest of all where none does."""

        def at(part: int) -> dict[str, BlockForm]:
            return {place.path: self._of_share(model, place, part / _SHARES) for place in found}

        def too_large(part: int) -> bool:
            return bool((search.cost(self.resolved(at(part))) > search.limits).any())

        return at(max(1, bisect_left(range(1, _SHARES), True, key=too_large)))

    def _of_share(self, model: nn.Module, place: Place, share: float) -> BlockForm:
        def near(whole: int) -> int | None:
            step = self.multiple if whole >= 2 * self.multiple else 1
            width = max(step, int(share * whole / step) * step)
            return None if width == whole else width

        def of_heads(name: Literal["heads", "head_dim"]) -> bool:
            return name in self.methods and name in place.options

        form = place.form(
            neurons=near(place.neurons) if place.neurons and "neurons" in self.methods else None,
            head_dim=near(place.head_dim) if of_heads("head_dim") else None,
            heads=max(1, int(share * place.heads)) if of_heads("heads") and not of_heads("head_dim") else None,
        )
        if form.layers() or "rank" not in self.methods:
            return form
        shapes = {layer: weight_shape(model.get_submodule(f"{place.path}.{layer}")) for layer in place.layers}
        return place.form(ranks={layer: _rank_of(share, *shape, bool(self.pivoted)) for layer, shape in shapes.items()})


def _rank_of(share: float, outputs: int, inputs: int, pivoted: bool) -> int:
    """The rank at which a layer has about this share of its numbers."""
    both, numbers = outputs + inputs, share * outputs * inputs
    rank = (both - (both**2 - 4 * numbers) ** 0.5) / 2 if pivoted else numbers / both
    return min(max(1, int(rank)), min(outputs, inputs) - 1)
