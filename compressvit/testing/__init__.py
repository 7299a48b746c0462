"""The contract of a transform, for the tests of compressvit and of packages that add transforms.

Five lines check a transform against every law; each law on each small backbone is a separate test:

    from compressvit.testing import parametrize_with_checks
    from compressvit_ia3 import IA3

    @parametrize_with_checks([IA3])
    def test_contract(check):
        check()

Without pytest, `check_transform(IA3)` runs all checks and raises at the first failure.
"""

from __future__ import annotations

from compressvit.testing.checks import Check, check_transform, parametrize_with_checks, transform_checks

__all__ = ["Check", "check_transform", "parametrize_with_checks", "transform_checks"]
