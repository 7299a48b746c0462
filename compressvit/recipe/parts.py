"""The steps of a recipe as a run takes them: transforms that stand together, then a phase."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from compressvit.spec import Spec
from compressvit.training.phases import PhaseSpec
from compressvit.transforms import Transform


@dataclass(frozen=True)
class Part:
    """Neighbouring transforms, which are planned and initialised together, and the phase that follows them.

    Attributes:
        transforms: possibly none; the first is step number `start`.
        phase: None where nothing trains the student afterwards.
        end: the phase's place among the recipe's steps; without a phase the number of steps.
    """

    transforms: tuple[Transform, ...]
    phase: PhaseSpec | None
    start: int
    end: int

    @property
    def name(self) -> str:
        """What messages and files call the phase, e.g. '1_distill'."""
        assert self.phase is not None
        return f"{self.end}_{self.phase.name}"

    @property
    def transformed(self) -> str:
        """What messages and files call the student after the transforms, e.g. '0_multiplex'."""
        return f"{self.end - 1}_{self.transforms[-1].name}"


def parts_of(steps: Iterable[Spec]) -> list[Part]:
    """The parts of a list of steps. What is neither a transform nor a phase (a merge at the end) is in none of them."""
    parts: list[Part] = []
    waiting: list[Transform] = []
    start = end = 0
    for index, spec in enumerate(steps):
        end = index + 1
        if isinstance(spec, Transform):
            waiting.append(spec)
        elif isinstance(spec, PhaseSpec):
            parts.append(Part(tuple(waiting), spec, start, index))
            waiting, start = [], end
    if waiting:
        parts.append(Part(tuple(waiting), None, start, end))
    return parts
