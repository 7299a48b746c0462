"""The errors that `lors` measures: what the ledger says of a layer, and how often the images are run for it."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers.models import build, images_for, outputs

from compressvit import LORS
from compressvit.fitting.allocate import Budget
from compressvit.fitting.reference import Reference
from compressvit.transforms.applying import compress
from compressvit.transforms.low_rank.budget import Spending
from compressvit.transforms.record import compression_of

PATHS = [f"blocks.{i}.mlp.fc1" for i in range(4)]


@pytest.mark.wide_unless(lambda metric: metric == "inputs")
@pytest.mark.parametrize("metric", ["inputs", "outputs"])
def test_the_ledger_has_the_error_of_the_outputs_on_the_teachers_inputs(metric):
    teacher = build("vit")
    images = images_for(teacher, 32)
    spec = LORS(rank=3, share=2, targets=("mlp.fc1",), metric=metric, sequential=False)
    student = compress(teacher, [spec], images)
    seen: dict[str, torch.Tensor] = {}
    for path in PATHS:
        hook = teacher.get_submodule(path).register_forward_hook(lambda m, i, o, path=path: seen.update({path: i[0]}))
        outputs(teacher, images)
        hook.remove()
    ledger = {entry.path: entry for entry in compression_of(student).ledger}
    for path in PATHS:
        own, other = teacher.get_submodule(path), student.get_submodule(path)
        # both have the teacher's bias, so the difference is the weight's alone
        lost = (own(seen[path]) - other(seen[path])).norm() / (own(seen[path]) - own.bias).norm()
        assert ledger[path].output_error == pytest.approx(lost.item(), rel=1e-3)
        weight = torch.stack([other(torch.eye(own.in_features)), other(torch.zeros(own.in_features).expand(48, -1))])
        difference = own.weight.mT - (weight[0] - weight[1])
        assert ledger[path].weight_error == pytest.approx((difference.norm() / own.weight.norm()).item(), rel=1e-3)


def test_the_ledger_says_whose_weight_a_layer_has():
    student = compress(build("vit"), [LORS(rank=3, share=2, targets=("mlp.fc1",), metric="weights")])
    changes = {entry.path: entry.change for entry in compression_of(student).ledger}
    for i, path in enumerate(PATHS):
        owner = "owns the weight of 2 layers" if i % 2 == 0 else f"shares the weight of {PATHS[i - 1]}"
        assert changes[path].startswith(owner)


@pytest.mark.parametrize("kind", ["inputs", "outputs"])
def test_the_errors_of_all_layers_take_one_pass_over_the_images(kind):
    teacher = build("vit")
    images, passes = images_for(teacher, 16), []

    def batches():
        passes.append(kind)
        return images.split(8)

    spending = Spending(
        LORS(share=2, budget=Budget(parameters=0.8)), teacher, Reference(copy.deepcopy(teacher), batches), PATHS
    )
    for group in ((PATHS[0], PATHS[1]), (PATHS[2], PATHS[3]), (PATHS[1], PATHS[2])):
        errors = spending.errors_by_rank(group, kind)
        assert len(errors) == 2
        assert all(a >= b for of_layer in errors for a, b in itertools.pairwise(of_layer))
        assert all(of_layer[-1] == 0 for of_layer in errors)
    assert len(passes) == 1
