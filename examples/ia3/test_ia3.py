from compressvit_ia3 import IA3

from compressvit.testing import parametrize_with_checks


@parametrize_with_checks([IA3])
def test_contract(check):
    check()
