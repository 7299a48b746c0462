"""Every law of `compressvit.testing` over every example of every registered transform, and that laws can be broken."""

from __future__ import annotations

import pytest
from helpers.contract import EXAMPLES

from compressvit.testing.checks import transform_checks
from compressvit.transforms import TRANSFORMS

CHECKS = [check for spec in TRANSFORMS.values() for check in transform_checks(spec)]


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
