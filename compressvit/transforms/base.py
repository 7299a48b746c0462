"""The interface of a transform, and the registry of transforms.

A `Transform` holds the options that a user gives. Its `plan(model)` resolves names, shapes and widths on a model that may be on the meta
device. The `Plan` that it returns is plain data: it is stored in the artifact and rebuilds the structure without teacher or images.

    plan = spec.plan(model)               # changes nothing; every error is raised here
    plan = spec.plan(model, reference)    # the same, with ranks and groups chosen from values and calibration images
    ledger = plan.apply(model)            # structure only, in place
    plan.initialise(student, reference)   # values, from the model before the transforms
    plan.layer_fits(student, reference)   # values that depend on the other transforms of the same call
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.in_order import LayerFit
from compressvit.fitting.reference import Reference
from compressvit.model import ties
from compressvit.model.backbone import Backbone, describe
from compressvit.model.family import Need
from compressvit.registry import Registry
from compressvit.spec import Frozen, Spec
from compressvit.transforms.claims import Claim


@dataclass(frozen=True)
class LedgerEntry:
    """What a transform did at one path. `before` and `after` count its parameters; a shared tensor counts only at its first path."""

    path: str
    change: str
    before: int
    after: int
    step: str = ""  # the transform's recipe key, filled in by the caller of `apply`
    # Relative errors of the approximation: of the weight itself, and of the layer's outputs on calibration images. The latter are
    # relative to the teacher's outputs on its own inputs or, for a layer fitted in order, to its target on the student's inputs.
    weight_error: float | None = None
    output_error: float | None = None


@dataclass(frozen=True)
class Tried:
    """A size that a step tried.

    Attributes:
        size: as a fraction of the teacher's.
        spent: what the student costs, in the unit.
        figures: measured of the student, by name; `intervals`: of those that have one.
        kept: whether they are what was asked.
        chosen: whether it is the size of the student.
    """

    size: float
    spent: float
    figures: dict[str, float]
    kept: bool
    chosen: bool
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """How a step came to the size of the student.

    Attributes:
        asked: in words, as 'cosine ≥ 0.98'.
        unit: of the sizes.
        where: the images or the device that decided, in words.
        tried: in the order they were made.
        step: as in `LedgerEntry`.
    """

    asked: str
    unit: str
    where: str
    tried: list[Tried]
    step: str = ""


class Plan(Frozen):
    """A resolved transform: enough to rebuild the structure on a fresh model of the same architecture."""

    transform: ClassVar[str]
    # True: the plan replaces the values of the whole model, and later transforms start from the new ones.
    loads_values: ClassVar[bool] = False
    # Fields that only affect initial values; plans that differ in no other field produce the same structure.
    starts: ClassVar[tuple[str, ...]] = ()
    # True: the plan is a `BottleneckPlan` with dense projections and `remove(model, path)`; the `prune` phase may change its widths.
    prunable: ClassVar[bool] = False
    # True: `fold` is supported.
    foldable: ClassVar[bool] = False
    # Where `fold` leaves a plan of this class: what the merged model is then, in words.
    left: ClassVar[str] = ""
    # True: the plan adds modules that must be absent while weights are fitted; `set_aside` removes them.
    sets_aside: ClassVar[bool] = False
    # True: the plan must be folded last, after all others have been folded into the same weight.
    folds_last: ClassVar[bool] = False
    # Not empty: the plan is the last one, after which neither another transform nor a phase can come; says why. What the transforms before
    # it fit is fitted first, its reference is the model that they made, and it is folded before them.
    last: ClassVar[str] = ""

    def structure(self) -> dict[str, Any]:
        """The plan without the fields that only affect initial values."""
        return self.model_dump(mode="json", exclude=set(self.starts))

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        """Change the structure of `model` in place; the values of new tensors are set by `initialise` or by a checkpoint."""
        raise TypeError(f"{type(self).__name__} does not define apply")

    def initialise(self, student: nn.Module, reference: Reference) -> None:
        """Set the values of `student`, which has the new structure; `reference` is the model before the transforms."""
        raise TypeError(f"{type(self).__name__} does not define initialise")

    def layer_fits(self, student: nn.Module, reference: Reference) -> dict[str, LayerFit]:
        """Functions, by layer path, that fit values which depend on the other transforms of the same call. They are called in the order
        in which the layers run (`compressvit.fitting.in_order`), after every `initialise`. Empty by default."""
        return {}

    def trains(self, model: nn.Module) -> set[str] | None:
        """Names of the parameters, besides the classifier's, that phases may train; all others are frozen. None: nothing is frozen."""
        return None

    def claims(self, model: nn.Module) -> list[Claim]:
        """Claims on `model` as it is before the transform; steps whose claims exclude each other are refused."""
        return []

    def set_aside(self, model: nn.Module) -> None:
        """With `sets_aside`: remove from `model`, in place, the modules that must be absent while weights are fitted to a teacher's."""

    def drops(self, model: nn.Module) -> set[str]:
        """Names of tensors of `model`, as it is before the transform, that the plan replaces by others. Empty by default."""
        return set()

    def resizes(self, model: nn.Module) -> set[str]:
        """Names of tensors of `model`, as it is before the transform, that get another shape under the same name. Empty by default."""
        return set()

    def fitted(self) -> set[str]:
        """Names of tensors that were fitted together with those the plan added; a later step must not overwrite them."""
        return set()

    def errors(self, student: nn.Module, reference: Reference) -> dict[str, tuple[float | None, float | None]]:
        """After all values are set: by path, the relative error of a weight (None where it has another size), and that of the layer's
        outputs (None without calibration images), both with respect to the reference."""
        return {}

    def sizes(self) -> list[Sizes]:
        """How the size of the student was found, where several were tried. Empty by default."""
        return []

    def fold(self, model: nn.Module) -> Plan | None:
        """Turn the transform back into plain timm layers, in place.

        Returns:
            None, or the plan of the simpler structure that is left if the result is not plain.

        Raises:
            UserError: the transform cannot be folded; the message says why and what to do instead.
        """
        raise UserError(f"{self.transform} cannot be folded into plain layers")


class Transform(Spec):
    """The options of a transform, as given in a recipe or a Python call."""

    name: ClassVar[str]
    plan_class: ClassVar[type[Plan]]
    # Whether the transform freezes every parameter that its plan does not name in `trains`.
    freezes: ClassVar[bool] = False
    # Fields that name an artifact folder which `initialise` reads: `--overwrite` must not delete it.
    reads: ClassVar[tuple[str, ...]] = ()

    # What the transform needs of a family of backbones. `backbone` refuses models of other families, and the contract checks that.
    needs: ClassVar[tuple[Need, ...]] = ("blocks",)
    # What a user can do instead with an unsupported model; by default the message lists the supported families.
    instead: ClassVar[str] = ""
    # The units of the budgets that `with_budget` takes; none where the size does not follow from a budget.
    budget_units: ClassVar[tuple[str, ...]] = ()

    # Permitted deviations from the contract (`compressvit.testing`).
    # True: the student's initial outputs differ from those of the model before the transform.
    changes_at_start: ClassVar[bool] = False
    # Added parameters without a gradient, by name suffix, with the reason: in the first step only, or in every step.
    blind_at_start: ClassVar[dict[str, str]] = {}
    blind: ClassVar[dict[str, str]] = {}

    @classmethod
    def examples(cls) -> Sequence[Transform]:
        """Settings that the contract tests try, which together exercise every option. By default: the default settings."""
        return (cls(),)

    def needed(self) -> tuple[Need, ...]:
        """What these settings need of a family; `needs` unless that depends on the settings."""
        return self.needs

    def backbone(self, model: nn.Module) -> Backbone:
        """The model's blocks.

        Raises:
            UserError: the model's family is unknown, or lacks something that the transform needs.
        """
        return describe(model, *self.needed(), asker=self.name, instead=self.instead)

    def plan(self, model: nn.Module, reference: Reference | None = None) -> Plan:
        """Resolve the options for a model, which is not changed.

        Args:
            model: the model after the earlier transforms, possibly on the meta device.
            reference: the values before those transforms. Without it, data-driven choices are provisional, at the requested size.

        Raises:
            UserError: the transform does not fit the model or an earlier transform; the message says what would work.
        """
        raise TypeError(f"{type(self).__name__} does not define plan")

    @property
    def needs_images(self) -> bool:
        """Whether these settings need calibration images."""
        return False

    @property
    def judged(self) -> tuple[str, ...]:
        """The figures of students that these settings make and judge on images that are held out (`Reference.judge`)."""
        return ()

    @property
    def provisional(self) -> tuple[str, ...]:
        """What a plan assumes without a reference and determines with one, one sentence each."""
        return ()

    def before(self, later: Sequence[Transform]) -> Transform:
        """The step as it is planned where these follow it in the recipe; itself, unless it counts on one of them.

        Raises:
            UserError: that one is not there, or is another than it counts on.
        """
        return self

    def with_budget(self, unit: str, value: float) -> Transform | None:
        """A copy that may cost so much in one of its `budget_units`, in place of its own sizes or budget; None for a step whose size does
        not follow from a budget."""
        return None

    def refuse_by_device(self, model: nn.Module, reference: Reference) -> None:
        """Measure what depends on `reference.device`, keep it in `reference.choices`, and refuse what it rules out. A run asks its first
        step before anything is written; no images are read.

        Raises:
            UserError: the options cannot be met on that device.
        """

    def require_inputs(self) -> None:
        """Check that the files the transform reads exist. `apply` calls it before anything runs; `plan` does not need the files.

        Raises:
            UserError: a file is missing.
        """


def record(
    model: nn.Module, paths: Iterable[str], change: Callable[[str], str], then: Callable[[], Any] | None = None
) -> list[LedgerEntry]:
    """Call `change` for every path and return the ledger; parameters are counted before the first and after the last change.

    Args:
        change: takes a path, changes the module there and returns a description of the change.
        then: called after the last change, before parameters are counted.
    """
    paths = list(paths)
    before = ties.count_at_paths(model, paths)
    texts = [change(path) for path in paths]
    if then is not None:
        then()
    after = ties.count_at_paths(model, paths)
    return [LedgerEntry(path, text, before[path], after[path]) for path, text in zip(paths, texts, strict=True)]


TRANSFORMS: Registry[type[Transform]] = Registry("transform", "compressvit.transforms")
_Spec = TypeVar("_Spec", bound=type[Transform])


def transform(name: str, plan_class: type[Plan]) -> Callable[[_Spec], _Spec]:
    """Register a transform under its key in recipes.

    Raises:
        TypeError: at class definition, if the key is taken.
    """

    def register(spec: _Spec) -> _Spec:
        TRANSFORMS.add(name, spec, spec.__module__)
        spec.name, spec.plan_class, plan_class.transform = name, plan_class, name
        return spec

    return register
