"""The interface of a transform, and the registry of transforms.

A `Transform` is what a user asks for. Its `plan(model)` resolves names, shapes and widths on a model that may live on the meta
device; the `Plan` it returns is data (it goes into the artifact) and rebuilds the structure without the teacher or any images:

    plan = spec.plan(model)            # pure; every fault is found here
    plan = spec.plan(model, reference)    # the same, with what is learned from values and calibration images (ranks, groups)
    ledger = plan.apply(model)         # structure only, in place
    plan.initialise(student, reference)   # values, from the model as it was before
    plan.layer_fits(student, reference)   # for values that depend on those of all transforms of one call
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.in_order import LayerFit
from compressvit.fitting.moments import Reference
from compressvit.model import ties
from compressvit.model.backbone import Backbone, describe
from compressvit.model.family import Need
from compressvit.registry import Registry
from compressvit.spec import Spec
from compressvit.transforms.claims import Claim


@dataclass(frozen=True)
class LedgerEntry:
    """What a transform did at one path. `before` and `after` count the path's own parameters, a shared tensor at its first path only."""

    path: str
    change: str
    before: int
    after: int
    step: str = ""  # the transform's word, filled in by whoever applies it
    # Relative errors of an approximation of the path's weight: of the weight itself, and of the layer's outputs on calibration images.
    # The latter are from the teacher's on its inputs, or for a layer fitted in order from what it was asked for on the student's.
    weight_error: float | None = None
    output_error: float | None = None


class Plan(Spec):
    """A resolved transform: enough to rebuild the structure on a fresh model of the same architecture."""

    transform: ClassVar[str]
    # True: it replaces the values of the whole model, and later transforms start from them.
    loads_values: ClassVar[bool] = False
    # Fields that only say how values start; two plans that differ in nothing else make the same structure.
    starts: ClassVar[tuple[str, ...]] = ()
    # True: it is a `BottleneckPlan` with `remove(model, path)` and dense projections, and the `prune` phase may change its widths.
    prunable: ClassVar[bool] = False
    # True: `fold` works.
    foldable: ClassVar[bool] = False
    # True: it adds what weights are to be fitted without, and `set_aside` takes it out.
    sets_aside: ClassVar[bool] = False
    # True: what it folds into must have taken in everything else before.
    folds_last: ClassVar[bool] = False

    def structure(self) -> dict[str, Any]:
        """The plan without the fields that only affect initial values."""
        return self.model_dump(mode="json", exclude=set(self.starts))

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        """Change the structure of `model` in place; the values of new tensors are set by `initialise` or by a checkpoint."""
        raise TypeError(f"{type(self).__name__} does not define apply")

    def initialise(self, student: nn.Module, reference: Reference) -> None:
        """Set values: `student` has the new structure, `reference` knows the model as it was before the transforms."""
        raise TypeError(f"{type(self).__name__} does not define initialise")

    def layer_fits(self, student: nn.Module, reference: Reference) -> dict[str, LayerFit]:
        """By path, how layers take values that depend on those of all transforms of one call: they are called in the order the layers
        run (`compressvit.fitting.in_order`), once every transform has set its own. None by default."""
        return {}

    def trains(self, model: nn.Module) -> set[str] | None:
        """Names of the parameters, except the classifier's, that a phase may change; all others are frozen. None: freezes nothing."""
        return None

    def claims(self, model: nn.Module) -> list[Claim]:
        """What it claims of `model`, as it is before the transform: steps whose claims exclude each other are refused."""
        return []

    def set_aside(self, model: nn.Module) -> None:
        """Where `sets_aside`: take out of `model`, in place, what must not be there while weights are fitted to a teacher's."""

    def drops(self, model: nn.Module) -> set[str]:
        """Names of the tensors of `model`, as it is before the transform, that are replaced by others. None by default: every key stays."""
        return set()

    def fitted(self) -> set[str]:
        """Names of tensors that were fitted together with what it added; a later step must not overwrite them."""
        return set()

    def errors(self, student: nn.Module, reference: Reference) -> dict[str, tuple[float, float | None]]:
        """After all values are set: by path, how far a weight is from the reference's, relative to it, and its outputs from theirs (None
        where no calibration images were used)."""
        return {}

    def fold(self, model: nn.Module) -> Plan | None:
        """Turn the transform back into plain timm layers, in place.

        Returns:
            None, or the plan of what is left where that is not plain, but simpler.

        Raises:
            UserError: the algebra does not allow it; the text says why and what to do instead.
        """
        raise UserError(f"{self.transform} cannot be folded into plain layers")


class Transform(Spec):
    """The options of a transform, as given in a recipe or a Python call."""

    name: ClassVar[str]
    plan_class: ClassVar[type[Plan]]
    # Whether it freezes what it does not train (its plan's `trains`).
    freezes: ClassVar[bool] = False
    # Fields that name an artifact's folder which `initialise` reads: `--overwrite` must not delete it.
    reads: ClassVar[tuple[str, ...]] = ()

    # What it needs of a family of backbones; models of the others are refused (`backbone`), which the contract checks.
    needs: ClassVar[tuple[Need, ...]] = ()
    # What else a user can do with such a model; the families it works on are listed if nothing is said.
    instead: ClassVar[str] = ""

    # What the contract (`compressvit.testing`) allows a method to differ in.
    # True: the student does not begin with the outputs of the model as it was before.
    changes_at_start: ClassVar[bool] = False
    # Added parameters without a gradient, by the end of their names, with the reason: in the first step, or in every one.
    blind_at_start: ClassVar[dict[str, str]] = {}
    blind: ClassVar[dict[str, str]] = {}

    @classmethod
    def examples(cls) -> Sequence[Transform]:
        """Settings for the contract tests, which together exercise every option; by default only the default settings."""
        return (cls(),)

    def needed(self) -> tuple[Need, ...]:
        """What these settings need of a family; `needs` unless it depends on them."""
        return self.needs

    def backbone(self, model: nn.Module) -> Backbone:
        """The model's blocks.

        Raises:
            UserError: the model's family is not known, or lacks something that is needed.
        """
        return describe(model, *self.needed(), asker=self.name, instead=self.instead)

    def plan(self, model: nn.Module, reference: Reference | None = None) -> Plan:
        """Resolve the options for a model, which is not changed.

        Args:
            model: what earlier transforms made of it, possibly on the meta device.
            reference: the values before them. Without it, what is learned from values is provisional, at the size that is asked for.

        Raises:
            UserError: the transform does not fit the model or what was done to it before; the text offers ways out.
        """
        raise TypeError(f"{type(self).__name__} does not define plan")

    @property
    def needs_images(self) -> bool:
        """Whether it needs calibration images."""
        return False

    @property
    def provisional(self) -> tuple[str, ...]:
        """What a plan without a reference assumes and one with a reference determines, one sentence each."""
        return ()

    def require_inputs(self) -> None:
        """Check that the files the transform reads are there. `apply` calls it before anything runs; `plan` does not need the files.

        Raises:
            UserError: one is missing.
        """


def record(
    model: nn.Module, paths: Iterable[str], change: Callable[[str], str], then: Callable[[], Any] | None = None
) -> list[LedgerEntry]:
    """Ledger of what `change` does to the module at each path, with parameters counted before the first and after the last.

    Args:
        change: takes a path, changes the module there and says how.
        then: is called after the last change, before parameters are counted.
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
    """Register a transform under the word that recipes use.

    Raises:
        TypeError: when the class is defined: another one has that word.
    """

    def register(spec: _Spec) -> _Spec:
        TRANSFORMS.add(name, spec, spec.__module__)
        spec.name, spec.plan_class, plan_class.transform = name, plan_class, name
        return spec

    return register
