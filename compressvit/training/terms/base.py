"""The interface of a loss term, and the registry of terms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from pydantic import Field

from compressvit.registry import Registry
from compressvit.spec import Spec

if TYPE_CHECKING:  # reading a recipe does not need timm
    from torch import nn

    from compressvit.model.taps import Tap
    from compressvit.tasks.base import Task
    from compressvit.training.pairs import LayerPair
    from compressvit.training.tokens import Layout


OF_TERMS = "_of_terms"  # a model's module with what its loss terms train, while a phase runs
FEATURES = "norm"  # where a model's features come out, unless its family says otherwise: the final norm


@dataclass(frozen=True)
class Batch:
    """The inputs of the loss terms in one step. Logits are (B, classes), or what else a model returns; taps are {path: {'input' | 'output':
    tensor}}.

    Attributes:
        unread: how often terms have yet to read each tap of the student and of the teacher; taps that it does not name are kept.
    """

    student_logits: torch.Tensor
    teacher_logits: torch.Tensor | None
    student_taps: dict[str, dict[str, Any]]
    teacher_taps: dict[str, dict[str, Any]]
    targets: Any  # as the task defines them: classes (B,), or (B, classes) after mixup
    unread: tuple[Counter[Tap], Counter[Tap]] = field(default_factory=lambda: (Counter(), Counter()))

    def used(self, student: Iterable[Tap], teacher: Iterable[Tap]) -> None:
        """For a term to say that it has read these taps: what no term reads after it is dropped, and leaves the memory before the loss is
        complete. A term that says nothing has its taps to the end of the step."""
        for taps, unread, read in zip(
            (self.student_taps, self.teacher_taps), self.unread, (student, teacher), strict=True
        ):
            for path, io in read:
                unread[path, io] -= 1
                if unread[path, io] == 0:
                    del taps[path][io]


@dataclass(frozen=True)
class Term:
    """One weighted term.

    Attributes:
        function: returns the unweighted loss, a scalar, and further scalars to log, by name. All must stay on the device: reading a
            value would make every step wait.
        student_taps, teacher_taps: the module inputs and outputs that the term reads of each model.
        module: what the term needs besides, e.g. a projection; it is trained with the student, and dropped when the phase ends.
        note: what a user should know of how the two are compared; empty for nothing.
    """

    name: str
    weight: float
    function: Callable[[Batch], tuple[torch.Tensor, Mapping[str, torch.Tensor]]]
    student_taps: tuple[Tap, ...] = ()
    teacher_taps: tuple[Tap, ...] = ()
    module: nn.Module | None = None
    note: str = ""


@dataclass(frozen=True)
class TermSetting:
    """What a term needs to know of models and options when it is built.

    Attributes:
        pairs: the pairs of layers to distil.
        prefix_tokens: number of tokens before the patches in the student's sequence.
        smoothing: label smoothing of the ground truth.
        task: what the student's outputs mean; None: classes.
        features, teacher_features: the paths of the modules whose outputs are the features of student and teacher.
        layout, teacher_layout: how these are arranged; None where that is not known.
        absent: why one of the two has no features; empty where both have.
        device: of the student.
    """

    pairs: tuple[LayerPair, ...] = ()
    prefix_tokens: int = 0
    smoothing: float = 0.0
    task: Task | None = None
    features: str = FEATURES
    teacher_features: str = FEATURES
    layout: Layout | None = None
    teacher_layout: Layout | None = None
    absent: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class LossTerm(Spec):
    """A term as given in a recipe. The docstring and fields of a subclass document its key in the schema."""

    name: ClassVar[str]
    # True: the term reads the student's logits, so the student needs a classifier.
    needs_classes: ClassVar[bool] = False
    # True: the term compares the student's logits with the teacher's, so both need the same classes.
    compares_logits: ClassVar[bool] = False
    # True: the term uses the ground truth.
    needs_labels: ClassVar[bool] = False
    # True: the key takes a list of any number of such terms.
    listed: ClassVar[bool] = False

    weight: float = Field(1.0, ge=0)

    def build(self, setting: TermSetting) -> Term | None:
        """Build the term with its taps; None if it has nothing to compare, e.g. without layer pairs.

        Raises:
            UserError: the term does not fit the models or its options.
        """
        raise TypeError(f"{type(self).__name__} does not define build")


def deepest_first(pairs: Iterable[Any]) -> list[Any]:
    """The order in which terms go through pairs: tokens are fewest in the last stage, so that when the gradient of a large pair is
    made, the taps of the smaller ones have left the memory."""
    return list(pairs)[::-1]


def between_blocks(
    term: LossTerm, setting: TermSetting, compare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> Term | None:
    """A term that compares what paired blocks pass on, tokens (B, N, C) of student and teacher side by side: the mean over the pairs, None
    without any.

    Args:
        term: as the recipe gives it.
        compare: the loss of a pair, a scalar.
    """
    pairs = setting.pairs
    if not pairs:
        return None

    ours = tuple((pair.student.path, "output") for pair in pairs)
    theirs = tuple((pair.teacher.path, "output") for pair in pairs)

    def function(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        values = []
        for pair, *taps in deepest_first(zip(pairs, ours, theirs, strict=True)):
            values.append(compare(*pair.tokens(batch.student_taps, batch.teacher_taps, f"losses.{term.name}")))
            batch.used(taps[:1], taps[1:])
        return torch.stack(values[::-1]).mean(), {}

    return Term(term.name, term.weight, function, ours, theirs)


# what a term reads of the student, and of the teacher
SIDES: tuple[Callable[[Term], tuple[Tap, ...]], ...] = (lambda term: term.student_taps, lambda term: term.teacher_taps)

TERMS: Registry[type[LossTerm]] = Registry("loss term", "compressvit.training.terms")

T = TypeVar("T", bound=LossTerm)


def loss_term(name: str) -> Callable[[type[T]], type[T]]:
    """Register a term under its key in `losses`."""

    def register(spec: type[T]) -> type[T]:
        TERMS.add(name, spec, spec.__module__)
        spec.name = name
        return spec

    return register


def unread_by(terms: Sequence[Term]) -> tuple[Counter[Tap], Counter[Tap]]:
    """How often terms read each tap of the student and of the teacher."""
    student, teacher = ([tap for term in terms for tap in taps(term)] for taps in SIDES)
    return Counter(student), Counter(teacher)


def total_of(terms: Sequence[Term], batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum of the terms, and by name each weighted term and the further values that it logs."""
    total: torch.Tensor | None = None
    parts: dict[str, torch.Tensor] = {}
    for term in terms:
        value, extra = term.function(batch)
        weighted = term.weight * value
        total = weighted if total is None else total + weighted
        parts |= {term.name: weighted, **extra}
    assert total is not None, "a phase has at least one term"
    return total, parts
