"""What every loss term offers, and the registry of their words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from pydantic import Field

from compressvit.registry import Registry
from compressvit.spec import Spec

if TYPE_CHECKING:  # reading a recipe does not take timm
    from compressvit.model.taps import Tap
    from compressvit.tasks.base import Task
    from compressvit.training.pairs import LayerPair


@dataclass(frozen=True)
class Batch:
    """What one step offers to the loss terms. Logits are (B, classes); taps are {path: {'input' | 'output': tensor}}."""

    student_logits: torch.Tensor
    teacher_logits: torch.Tensor | None
    student_taps: dict[str, dict[str, Any]]
    teacher_taps: dict[str, dict[str, Any]]
    targets: Any  # of the task: classes (B,), or (B, classes) after mixup


@dataclass(frozen=True)
class Term:
    """One weighted term.

    Attributes:
        function: returns the unweighted loss, a scalar, and what else is worth logging, scalars by name. All stay on the device: a term
            that asks one for its value makes every step wait.
        student_taps, teacher_taps: what it reads of the two models.
    """

    name: str
    weight: float
    function: Callable[[Batch], tuple[torch.Tensor, Mapping[str, torch.Tensor]]]
    student_taps: tuple[Tap, ...] = ()
    teacher_taps: tuple[Tap, ...] = ()


@dataclass(frozen=True)
class TermSetting:
    """What a term is built for.

    Attributes:
        pairs: the distilled layers.
        prefix_tokens: how many tokens at the front of the student's sequence are no patches.
        smoothing: of the ground truth.
        task: what the student's outputs mean; None: classes.
    """

    pairs: tuple[LayerPair, ...] = ()
    prefix_tokens: int = 0
    smoothing: float = 0.0
    task: Task | None = None


class LossTerm(Spec):
    """A term as a recipe asks for it: its docstring and fields are what the schema says of the key."""

    name: ClassVar[str]
    # True: it reads the student's logits, so a student without a classifier cannot have it.
    needs_classes: ClassVar[bool] = False
    # True: it compares the student's logits with the teacher's, so both need the same classes.
    compares_logits: ClassVar[bool] = False
    # True: it learns from the ground truth.
    needs_labels: ClassVar[bool] = False
    # True: the key holds a list, of any number of such terms.
    listed: ClassVar[bool] = False

    weight: float = Field(1.0, ge=0)

    def build(self, setting: TermSetting) -> Term | None:
        """The term, with its taps; None where there is nothing that it could compare, as without layer pairs.

        Raises:
            UserError: it does not fit what it is asked for.
        """
        raise TypeError(f"{type(self).__name__} does not define build")


TERMS: Registry[type[LossTerm]] = Registry("loss term", "compressvit.training.terms")

T = TypeVar("T", bound=LossTerm)


def loss_term(name: str) -> Callable[[type[T]], type[T]]:
    """Register a term under its key in `losses`."""

    def register(spec: type[T]) -> type[T]:
        TERMS.add(name, spec, spec.__module__)
        spec.name = name
        return spec

    return register
