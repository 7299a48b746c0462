"""Every law of `compressvit.testing` over every example of every registered transform, and that laws can be broken."""

from __future__ import annotations

import pytest
from helpers.contract import EXAMPLES

from compressvit.testing.cases import cases_of, stand_for_families
from compressvit.testing.checks import transform_checks
from compressvit.transforms import TRANSFORMS

CHECKS = [check for spec in TRANSFORMS.values() for check in transform_checks(spec)]
CASES = [case for spec in TRANSFORMS.values() for case in cases_of(spec)]
FIRST, ON_FAMILIES = {}, {}  # the first case of every example, and of every transform on each family
for case in CASES:
    FIRST.setdefault((case.spec.name, case.index), str(case))
    if case.backbone in stand_for_families():
        ON_FAMILIES.setdefault((case.spec.name, case.backbone), str(case))
EVERYWHERE = ("low_rank", "adapters")  # one replaces layers, the other adds to them
# Families that are unlike each other: plain, with rotary positions, in windows, with norms after the branches, without attention.
UNLIKE = ("vit", "dinov3", "swin", "swin_v2", "convnext")
ON_UNLIKE = {(transform, name): case for (transform, name), case in ON_FAMILIES.items() if name in UNLIKE}
ALL = {case for (_, index), case in FIRST.items() if index == 0}
ALL |= {case for (transform, _), case in ON_UNLIKE.items() if transform in EVERYWHERE}
SOME = {*FIRST.values(), *ON_UNLIKE.values()}
SOME |= {case for (transform, _), case in ON_FAMILIES.items() if transform in EVERYWHERE}
FEW = {"the_function_is_kept_at_the_start", "every_parameter_is_trained", "fold_keeps_the_function_or_says_why_not"}
FILES = "an_artifact_is_loaded_to_the_bit"


def is_fast(check) -> bool:
    """Of the first case of every transform all laws, as of two transforms on unlike families; of the first case of every further example,
    of every other transform on unlike families, and of those two on all, a few, of the first also that of files. What is refused takes
    no time."""
    case, _, law = str(check).rpartition("-")
    few = (case in SOME and law in FEW) or (case in FIRST.values() and law == FILES)
    return case in ALL or few or law == "is_refused"


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
    assert {str(check).split("-")[-1] for check in CHECKS} > {*FEW, FILES}
    assert {transform for transform, _ in ON_FAMILIES} > set(EVERYWHERE)
