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
SEARCHES = ("shrink",)  # every student of it takes half a second
ADDED = (
    "adapters",
    "lora",
    "vpt",
)  # of those that add to a frozen backbone: behind a branch, beside a weight, among the tokens
EVERYWHERE = ("low_rank", "adapters")  # one replaces layers, the other adds to them
WHOLLY = {*ADDED, *(name for name, spec in TRANSFORMS.items() if not spec.freezes)} - {*SEARCHES}
OF_EACH = {case for (_, index), case in FIRST.items() if index == 0}
ALL = {case for (name, index), case in FIRST.items() if index == 0 and name in WHOLLY}
SOME = {*OF_EACH, *(case for (name, _), case in FIRST.items() if name not in SEARCHES)}
SOME |= {case for (name, family), case in ON_FAMILIES.items() if family == "swin" and name in WHOLLY}
SOME |= {case for (name, family), case in ON_FAMILIES.items() if family == "convnext" and name in EVERYWHERE}
FEW = {"the_function_is_kept_at_the_start", "every_parameter_is_trained", "fold_keeps_the_function_or_says_why_not"}
FILES = "an_artifact_is_loaded_to_the_bit"


def is_fast(check) -> bool:
    """Of the first case of a transform that changes the backbone, and of some that add to it, all laws; of the first case of others and of
    every further example, of the former in windows, and of two without attention, a few. What is refused takes no time."""
    case, _, law = str(check).rpartition("-")
    few = law in FEW or (law == FILES and case in OF_EACH)
    return case in ALL or (case in SOME and few) or law == "is_refused"


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
