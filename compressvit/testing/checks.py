"""All laws for all cases of a transform, as callables or as pytest tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from compressvit.errors import UserError
from compressvit.model.backbone import model_name
from compressvit.model.family import NEEDS
from compressvit.testing import in_timm, laws  # noqa: F401  (register their laws on import)
from compressvit.testing.cases import (
    EVERY_CASE,
    FIRST_EXAMPLE,
    Case,
    backbones_of,
    cases_of,
    examples_of,
    lacking,
    require,
    stand_for_families,
    with_files,
)
from compressvit.testing.models import build, examples, family_of, structure
from compressvit.testing.pairs import compose_or_refuse
from compressvit.transforms.applying import compress
from compressvit.transforms.base import TRANSFORMS, Transform

if TYPE_CHECKING:
    import pytest

AnyTransform = Transform | type[Transform]


@dataclass(frozen=True)
class Check:
    """One law on one case. Calling it raises an AssertionError if the law does not hold."""

    name: str
    run: Callable[[], object]

    def __call__(self) -> None:
        self.run()

    def __str__(self) -> str:
        return self.name


def transform_checks(transform: AnyTransform) -> Iterator[Check]:
    """Every law on every example of a transform, or on the single given setting.

    A transform class declares its test settings and its deviations from the laws in `examples`, `needs`, `changes_at_start`,
    `blind_at_start` and `blind` (see `compressvit.transforms.base.Transform`).
    """
    for case in cases_of(transform):
        for law in (*EVERY_CASE, *(FIRST_EXAMPLE if _stands_for_all(case) else ())):
            yield Check(f"{case}-{law.__name__}", partial(law, case))
    first = examples_of(transform)[0]
    for backbone in examples():
        if lacking(first, backbone) is not None:
            yield Check(f"{first.name}-{backbone}-is_refused", partial(_is_refused, first, backbone))


def pair_checks(transform: AnyTransform) -> Iterator[Check]:
    """The transform before and after every registered one, on the first backbone that supports both."""
    mine = examples_of(transform)[0]
    for kind in TRANSFORMS.values():
        other = examples_of(kind)[0]
        backbone = _common(mine, other)
        if backbone is None:
            continue
        for first, second in ((mine, other), (other, mine))[: 1 if kind is type(mine) else 2]:
            name = f"{first.name}+{second.name}-{backbone}-composes_or_is_refused"
            yield Check(name, partial(compose_or_refuse, first, second, backbone))


def _common(first: Transform, second: Transform) -> str | None:
    """A small model on which two transforms can be tried together; a detector has a backbone for any."""
    shared = [name for name in backbones_of(first) if name in backbones_of(second)]
    either = [name for name in (*backbones_of(first), *backbones_of(second)) if examples()[name].tried == "decoder"]
    return next((name for name in (*shared, *either) if lacking(first, name) is lacking(second, name) is None), None)


def _stands_for_all(case: Case) -> bool:
    return case.index == 0 and (not case.spec.freezes or case.backbone in stand_for_families())


def _is_refused(spec: Transform, backbone: str) -> None:
    model = build(backbone)
    before, missing = structure(model), lacking(spec, backbone)
    assert missing is not None
    needed, lack = NEEDS[missing]
    words = f"{spec.name} needs {needed}, and {model_name(model)} is a {family_of(backbone).title_of(model)}, {lack}; "
    try:
        compress(model, [with_files(spec, backbone)])
    except UserError as error:
        require(words in str(error), f"{spec.name} refuses {backbone} with {str(error)!r}, not with {words!r}")
    else:
        raise AssertionError(f"{spec.name} works on {backbone}, which lacks what it needs: {missing}")
    require(structure(model) == before, f"{spec.name} refuses {backbone} and changes it")


def check_transform(transform: AnyTransform) -> None:
    """Check every law, for the transform alone and combined with every other one.

    Raises:
        AssertionError: a law does not hold; the message says which.
    """
    for check in (*transform_checks(transform), *pair_checks(transform)):
        check()


def parametrize_with_checks(transforms: Iterable[AnyTransform]) -> pytest.MarkDecorator:
    """Decorator that parametrizes a test with the argument `check`: one test per law and case, and per pair with another transform."""
    import pytest  # imported only here, so that the laws can be used without pytest

    checks = [check for transform in transforms for check in (*transform_checks(transform), *pair_checks(transform))]
    return pytest.mark.parametrize("check", checks, ids=str)
