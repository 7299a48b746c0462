"""The parts of a recipe, as a run executes them: consecutive transforms, then a phase."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from compressvit.spec import Spec
from compressvit.training.phases import PhaseSpec
from compressvit.transforms import Transform


@dataclass(frozen=True)
class Part:
    """Consecutive transforms, which are planned and initialised together, and the phase that follows them.

    Attributes:
        transforms: possibly empty; the first is step number `start`.
        phase: None if no phase follows.
        end: index of the phase among the recipe's steps; the number of steps if there is no phase.
    """

    transforms: tuple[Transform, ...]
    phase: PhaseSpec | None
    start: int
    end: int

    @property
    def name(self) -> str:
        """The name of the phase in messages and files, e.g. '1_distill'."""
        assert self.phase is not None
        return f"{self.end}_{self.phase.name}"

    @property
    def transformed(self) -> str:
        """The name of the student after the transforms in messages and files, e.g. '0_multiplex'."""
        return f"{self.end - 1}_{self.transforms[-1].name}"


def parts_of(steps: Iterable[Spec]) -> list[Part]:
    """The parts of a list of steps. A step that is neither a transform nor a phase (a final merge) belongs to no part.

    Raises:
        UserError: a transform counts on a later one that is not there.
    """
    steps = list(steps)
    parts: list[Part] = []
    waiting: list[Transform] = []
    start = end = 0
    for index, spec in enumerate(steps):
        end = index + 1
        if isinstance(spec, Transform):
            waiting.append(spec.before([later for later in steps[end:] if isinstance(later, Transform)]))
        elif isinstance(spec, PhaseSpec):
            parts.append(Part(tuple(waiting), spec, start, index))
            waiting, start = [], end
    if waiting:
        parts.append(Part(tuple(waiting), None, start, end))
    return parts
