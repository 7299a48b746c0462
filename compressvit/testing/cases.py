"""A case of the contract: one setting of a transform on one small backbone."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from compressvit.artifacts import artifact
from compressvit.model import surgery
from compressvit.model.family import Need
from compressvit.testing.models import build, examples, family_of, teacher
from compressvit.transforms.applying import compress
from compressvit.transforms.base import Plan, Transform
from compressvit.transforms.record import compression_of


@dataclass(eq=False)
class Case:
    """A transform on a backbone of `compressvit.testing.models`.

    Attributes:
        spec: the transform; if it reads an artifact, a matching one is created.
        backbone: the name of the small model.
        index: index of the setting among the transform's examples.
    """

    spec: Transform
    backbone: str
    index: int = 0
    _student: nn.Module | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.spec = with_files(self.spec, self.backbone)

    def __str__(self) -> str:
        return f"{self.spec.name}{self.index}-{self.backbone}"

    def build(self, seed: int = 0) -> nn.Module:
        """A new backbone, which may be changed."""
        return build(self.backbone, seed)

    @property
    def teacher(self) -> nn.Module:
        """The backbone, shared between tests, which must not be changed."""
        return teacher(self.backbone)

    def plan(self) -> Plan:
        """The plan of the student; that without values may be provisional."""
        return self.spec.plan(self.teacher) if not self.spec.provisional else compression_of(self.student()).plans[-1]

    def student(self) -> nn.Module:
        """A copy of the compressed model."""
        if self._student is None:
            torch.manual_seed(3)
            self._student = compress(self.teacher, [self.spec])
        return surgery.deep_copy(self._student)


def examples_of(transform: Transform | type[Transform]) -> Sequence[Transform]:
    """The examples of a transform class, or the single given setting."""
    return (transform,) if isinstance(transform, Transform) else transform.examples()


def tried_on(freezes: bool) -> list[str]:
    """The small models on which transforms are tested that freeze the backbone (`freezes`), or that do not."""
    unlike = ("whole" if freezes else "frozen", "decoder")
    return [name for name, example in examples().items() if example.tried not in unlike]


def stand_for_families() -> list[str]:
    """The first small model of every family."""
    of_backbones = [name for name, example in examples().items() if example.tried != "decoder"]
    return [name for name in of_backbones if name == next(iter(family_of(name).examples))]


def lacking(spec: Transform, backbone: str) -> Need | None:
    """What the transform needs and the family of a small model lacks; None if nothing."""
    found = map(family_of(backbone).lacks, spec.needed())
    return next((need for need in found if need is not None), None)


def backbones_of(spec: Transform, index: int = 0) -> list[str]:
    """The small models on which an example is tested: those whose family supports it; fewer for further examples that freeze."""
    if "decoder" in spec.needed():
        return [name for name, example in examples().items() if example.tried == "decoder"]
    names = stand_for_families() if spec.freezes and index else tried_on(spec.freezes)
    return [name for name in names if lacking(spec, name) is None]


def cases_of(transform: Transform | type[Transform]) -> Iterator[Case]:
    """Every example on every backbone on which it is tested."""
    for index, spec in enumerate(examples_of(transform)):
        for backbone in backbones_of(spec, index):
            yield Case(spec, backbone, index)


def with_files(spec: Transform, backbone: str, before: Sequence[Transform] = ()) -> Transform:
    """The spec; if it reads files, with artifacts that fit the backbone after the transforms `before`."""
    if not spec.reads:
        return spec
    made = tuple(s for s in before if not s.plan_class.loads_values)
    folder = str(_artifact(backbone, made))
    return spec.model_copy(update=dict.fromkeys(spec.reads, folder))


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="compressvit-testing-")


@functools.cache
def _artifact(backbone: str, before: tuple[Transform, ...]) -> Path:
    folder = Path(tempfile.mkdtemp(dir=_scratch().name)) / "student"
    return artifact.save(compress(build(backbone, seed=7), before), folder)


def require(condition: object, sentence: str) -> None:
    """Raise an AssertionError with this message unless the condition holds."""
    if not condition:
        raise AssertionError(sentence)


Law = Callable[[Case], None]
EVERY_CASE: list[Law] = []
FIRST_EXAMPLE: list[Law] = []  # laws that depend on the kind of layer and not on the settings


def law(held_by: list[Law]) -> Callable[[Law], Law]:
    """Register a law, to be checked for every case or only for the first example of each transform."""

    def add(function: Law) -> Law:
        held_by.append(function)
        return function

    return add
