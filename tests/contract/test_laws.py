"""Every law of `compressvit.testing` over every example of every registered transform, and that laws can be broken."""

from __future__ import annotations

import pytest
from helpers.contract import EXAMPLES

from compressvit.testing.cases import cases_of, stand_for_families
from compressvit.testing.checks import transform_checks
from compressvit.transforms import TRANSFORMS

CHECKS = [check for spec in TRANSFORMS.values() for check in transform_checks(spec)]
CASES = [case for spec in TRANSFORMS.values() for case in cases_of(spec)]
FIRST = {case.spec.name + str(case.index): case for case in reversed(CASES)}
FAST = {str(case) for case in CASES if case.index == 0 and case.backbone in stand_for_families()} | {
    *map(str, FIRST.values())
}


def is_fast(check) -> bool:
    """The first example of a transform on one backbone of every family, and the others on their first one."""
    example, *rest = str(check).split("-")
    return example not in FIRST or f"{example}-{rest[0]}" in FAST


@pytest.mark.wide_unless.with_args(is_fast)
@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_law(check):
    check()


def test_every_registered_transform_has_an_example():
    assert len(TRANSFORMS) >= 3
    for name, specs in EXAMPLES.items():
        assert specs, f"{name} has no example"
        for spec in specs:
            assert type(spec) is TRANSFORMS[name]
            assert spec.name == spec.plan_class.transform == name
    assert len(CHECKS) > 1000
