"""The error that `multiplex` writes in the ledger, from the models alone."""

from __future__ import annotations

import pytest
from helpers.models import build

from compressvit import Multiplex
from compressvit.transforms.applying import compress
from compressvit.transforms.record import compression_of


@pytest.mark.parametrize("init", ["mean", "first"])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_the_error_of_a_block_is_how_far_its_shared_tensors_are_from_its_own(name, init):
    teacher = build(name)
    student = compress(teacher, [Multiplex(share=2, mlp_conv=3, init=init)])
    entries = compression_of(student).ledger
    assert len(entries) == sum(1 for path, _ in teacher.named_modules() if path.rpartition(".")[0].endswith("blocks"))
    for entry in entries:
        block, own = student.get_submodule(entry.path), teacher.get_submodule(entry.path)
        names = [n for n, _ in own.named_parameters() if n.startswith(("attn.", "mlp."))]
        lost = sum((block.get_parameter(n) - own.get_parameter(n)).double().square().sum() for n in names)
        whole = sum(own.get_parameter(n).double().square().sum() for n in names)
        assert entry.weight_error == pytest.approx((lost / whole).sqrt().item(), rel=1e-5)
        assert entry.output_error is None
    errors = [entry.weight_error for entry in entries]
    assert max(errors) > 0.1
    if init == "first":
        assert errors[::2] == [0.0] * (len(errors) // 2)


def test_a_block_that_shares_with_none_has_no_error():
    ledger = compression_of(compress(build("vit"), [Multiplex(share=1)])).ledger
    assert {entry.weight_error for entry in ledger} == {None}
