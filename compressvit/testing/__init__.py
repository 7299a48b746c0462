"""The contract of a transform, for tests of our own and of packages that offer one.

Five lines hold a transform to every law, each law on each small backbone a test of its own:

    from compressvit.testing import parametrize_with_checks
    from compressvit_ia3 import IA3

    @parametrize_with_checks([IA3])
    def test_contract(check):
        check()

Without pytest, `check_transform(IA3)` runs them all and raises at the first that does not hold.
"""

from __future__ import annotations

from compressvit.testing.checks import Check, check_transform, parametrize_with_checks, transform_checks

__all__ = ["Check", "check_transform", "parametrize_with_checks", "transform_checks"]
