"""CKA whose batches are dealt out to several processes is that of one."""

from __future__ import annotations

import pytest
import torch
from helpers.images import side
from helpers.models import build, images_for
from helpers.together import together
from torch import nn

from compressvit import processes
from compressvit.diagnostics.cka_layers import cka_matrix
from compressvit.diagnostics.features import subject
from compressvit.errors import UserError

CPU = torch.device("cpu")


class Counted(nn.Module):
    """Counts how often a model runs."""

    def __init__(self, model):
        super().__init__()
        self.model, self.runs = model, 0
        model.register_forward_hook(self._count)

    def _count(self, *_):
        self.runs += 1


def compared(kernel, count=40, spoil=None):
    """CKA of two models in every process of the run, led as diagnostics are; how often the first model ran, and what it is refused for."""
    first, second = build("vit"), build("vit", seed=1)
    counted = Counted(first)
    pair = subject(side(first)), subject(side(second))
    images = images_for(first, count)
    if spoil is not None:
        images[spoil] = torch.nan

    def measure():
        options = {"batch_size": 8, "kernel": kernel, "together": lambda: processes.together("cka")}
        return cka_matrix(*pair, lambda: [images[:13], images[13:]], CPU, images=count, **options)

    def refused(work):
        try:
            return work()
        except UserError as error:
            return str(error)

    helped = []
    with processes.joined():
        found = processes.led(lambda: refused(measure), lambda _: helped.append(refused(measure)))
    return [found, *helped][-1], counted.runs


@pytest.mark.parametrize(("kernel", "runs"), [("linear", [2, 2, 1]), ("rbf", [2, 3, 2])])  # of five batches
def test_every_process_has_its_batches_and_the_result_of_all(kernel, runs):
    (alone, once), shared = compared(kernel), together(3, compared, kernel)
    assert once == 5
    assert [count for _, count in shared] == runs
    for result, _ in shared:
        assert (result.images, result.batches) == (alone.images, alone.batches) == (40, 5)
        assert torch.allclose(
            result.values, alone.values, rtol=0, atol=1e-12
        )  # other order of float64 sums; measured 1e-16
        assert torch.allclose(
            result.half_width, alone.half_width, rtol=0, atol=1e-9
        )  # differences of sums; measured 1e-13


def test_a_fault_in_one_process_is_told_in_all():
    found = [text for text, _ in together(2, compared, "linear", 40, 10)]  # in the second batch
    assert found[0] == found[1]
    assert "are not finite" in found[0]
    assert found[0] == compared("linear", 40, 10)[0]
