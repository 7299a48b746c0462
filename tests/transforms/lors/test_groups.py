"""Which layers share a weight: chosen by a budget, or by how alike they are."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.models import build, equal_within_stages, images_for, outputs
from helpers.ranks import ranked
from torch import nn

from compressvit import LORS, LowRank, Multiplex
from compressvit.artifacts import artifact
from compressvit.errors import UserError
from compressvit.model import cost, ties
from compressvit.transforms.applying import compress, plan_transforms
from compressvit.transforms.record import compression_of


def plan_of(student):
    return compression_of(student).plans[-1]


def _groups(plan):
    return plan.groups if plan.transform == "lors" else [(path,) for path in plan.paths]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def alternating():
    """A ViT in which blocks 0 and 2 are alike, and 1 and 3."""
    model = build("vit")
    for i in (2, 3):
        for part in ("attn", "mlp"):
            getattr(model.blocks[i], part).load_state_dict(getattr(model.blocks[i - 2], part).state_dict())
    return model


@pytest.mark.wide_unless(lambda metric: metric == "weights")
@pytest.mark.parametrize("metric", ["weights", "auto"])
def test_layers_that_are_alike_share_wherever_they_are(alternating, metric):
    images = images_for(alternating, 32)
    alike = LORS(rank=0, share=2, group_by="similarity", metric=metric, sequential=False)
    student = compress(alternating, [alike], images)
    assert set(plan_of(student).groups) == {
        tuple(f"blocks.{i}.{layer}" for i in pair)
        for pair in ((0, 2), (1, 3))
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert relative(outputs(student, images), outputs(alternating, images)) < 1e-5  # measured 1e-6
    neighbours = compress(alternating, [alike.model_copy(update={"group_by": "consecutive"})], images)
    assert relative(outputs(neighbours, images), outputs(alternating, images)) > 0.1
    assert ties.count_parameters(student) == ties.count_parameters(neighbours)


def test_similar_layers_of_one_stage_only(tmp_path):
    teacher = build("swin")
    student = compress(teacher, [LORS(rank=1, share=2, group_by="similarity", metric="weights")])
    for group in plan_of(student).groups:
        assert len({path.split(".")[1] for path in group}) == 1
    plan = plan_of(student)
    assert plan.dense, "a layer that is like no other of its stage keeps its weight"
    counts = [sum(path.startswith(f"layers.{s}.") for path in (*plan.paths, *plan.dense)) for s in (0, 1)]
    assert counts == [2 * 4, 4 * 4]
    assert len(plan.groups) + len(plan.dense) == (1 + 2) * 4
    assert all(type(student.get_submodule(path)) is nn.Linear for path in plan.dense)
    ledger = {e.path: e.change for e in compression_of(student).ledger}
    assert {path for path, change in ledger.items() if change == "stays dense"} == set(plan.dense)
    artifact.save(student, tmp_path / "student")
    loaded = artifact.load(tmp_path / "student")
    images = images_for(teacher)
    assert torch.equal(outputs(loaded, images), outputs(student, images))


def test_a_budget_shares_what_is_alike_and_nothing_else():
    alike, unlike = equal_within_stages(build("vit")), build("vit")
    with torch.no_grad():  # of low rank, each in its own directions
        for name, weight in unlike.named_parameters():
            if name.startswith("blocks.") and weight.ndim == 2:
                left, values, right = torch.linalg.svd(weight, full_matrices=False)
                weight.copy_(left[:, :6] * values[:6] @ right[:6])
    images = images_for(alike, 64)
    groups = {}
    for name, teacher, budget in (("alike", alike, 0.35), ("unlike", unlike, 0.35)):
        student = compress(teacher, [LORS(share="auto", budget={"parameters": budget}, sequential=False)], images)
        groups[name] = {len(g) for g in plan_of(student).groups}
    assert groups == {"alike": {4}, "unlike": {1}}


@pytest.mark.wide
@pytest.mark.parametrize("unit", ["parameters", "bytes", "macs"])
def test_a_chosen_grouping_keeps_the_budget_and_is_repeated(unit):
    teacher = build("swin")
    images = images_for(teacher, 32)
    spec = LORS(share="auto", budget={unit: 0.7})
    students = [compress(teacher, [spec], images) for _ in range(2)]
    assert plan_of(students[0]) == plan_of(students[1])
    size = tuple(images.shape[1:])
    before, after = (cost.cost(model, size).as_dict()[unit] for model in (teacher, students[1]))
    assert 0.67 * before < after <= 0.7 * before


def test_it_is_no_worse_than_any_one_number_by_what_it_compares():
    from compressvit.fitting.reference import Reference
    from compressvit.transforms.low_rank.budget import Spending

    teacher = build("vit")
    reference = Reference(build("vit"), images_for(teacher, 48))
    spec = LORS(share="auto", budget={"parameters": 0.4})
    plan = spec.plan(teacher, reference)
    every = LowRank(rank=1).plan(teacher).paths
    spending = Spending(spec, teacher, reference, every)
    left = {share: spending._error_left(_groups(ranked(share, rank=1).plan(teacher))) for share in (1, 2, 4)}
    dense = [(path,) for path in every if path not in plan.paths]
    assert spending._error_left([*plan.groups, *dense]) <= min(left.values()) * (1 + 1e-9), left


def test_without_values_the_plan_is_provisional():
    teacher = build("vit")
    for spec in (LORS(share="auto", budget={"parameters": 0.5}), LORS(rank=2, share=2, group_by="similarity")):
        assert spec.provisional
        (plan,) = plan_transforms(teacher, [spec])
        assert plan.groups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": "auto", "rank": 2}, "share: auto needs a budget"),
        ({"group_by": "similarity", "rank": 2}, "needs share: a number of blocks, or auto"),
        (
            {"group_by": "similarity", "rank": 2, "share": 2, "init": "scratch"},
            "randomly initialised layers have no similarity",
        ),
        ({"share": "automatic", "rank": 2}, "auto"),
        ({"shared_init": "kaiming", "rank": 2}, "starts shared weights at random; give init: scratch too"),
    ],
)
def test_what_cannot_be_grouped(options, message):
    with pytest.raises(UserError) as refusal:
        LORS(**options)
    assert message in str(refusal.value)


def test_groups_that_an_earlier_step_made_are_not_taken_apart():
    with pytest.raises(UserError, match=r"leave lors\.share and group_by out, which keeps that"):
        compress(
            build("vit"),
            [Multiplex(share=2), LORS(share="auto", budget={"parameters": 0.5})],
            images_for(build("vit"), 8),
        )


def test_the_plan_says_the_groups():
    student = compress(build("vit"), [LORS(rank=2, share=2, group_by="similarity", metric="weights")])
    assert json.loads(plan_of(student).model_dump_json())["groups"]
