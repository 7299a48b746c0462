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
MORE = {str(case): case for case in CASES if case.index == 0 and case.backbone in stand_for_families()}
FEW = {
    "no_path_or_key_goes_or_changes_shape",
    "the_function_is_kept_at_the_start",
    "every_parameter_is_trained",
    "fold_keeps_the_function_or_says_why_not",
    "an_artifact_is_loaded_to_the_bit",
    "an_adapter_file_comes_and_goes",
}


def is_fast(check) -> bool:
    """Every example of a transform on its first backbone, and the first example on one backbone of every other family: all laws of it, or
    a few where the backbone is frozen."""
    example, *rest = str(check).split("-")
    if example not in FIRST or f"{example}-{rest[0]}" == str(FIRST[example]):
        return True
    case = MORE.get(f"{example}-{rest[0]}")
    return case is not None and (not case.spec.freezes or rest[1] in FEW)


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
    assert {str(check).split("-")[-1] for check in CHECKS} > FEW
