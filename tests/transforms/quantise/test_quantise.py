"""`quantise`: the file has the bytes of the plan, feedback in order loses least, ties stay, and nothing comes after it."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.models import VIT, build, outputs
from torch import nn

import compressvit
from compressvit.artifacts.merge import merged_copy, refuse_growth
from compressvit.errors import UserError
from compressvit.model import cost, ties
from compressvit.model.backbone import input_size
from compressvit.model.header import TENSORS
from compressvit.recipe.recipe import parse_recipe
from compressvit.runs.plan import plan_recipe
from compressvit.transforms import LoRA, LowRank, Multiplex, Quantise, Shrink
from compressvit.transforms.applying import compress
from compressvit.transforms.quantise.packed import Packed, Rounded
from compressvit.transforms.record import compression_of


def vit(**more) -> nn.Module:
    """A small ViT whose blocks do something."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**VIT, "depth": 2, **more}).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif parameter.abs().sum() == 0:
            nn.init.normal_(parameter, std=0.1)
    return model


def images(count: int = 48, seed: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def lost(student: nn.Module, teacher: nn.Module) -> float:
    """Relative error of the features of other images."""
    other = images(16, seed=6)
    wanted = teacher.forward_features(other)
    return ((student.forward_features(other) - wanted).norm() / wanted.norm()).item()


def packed_of(model: nn.Module) -> dict[str, Packed]:
    return {path: module.rounded for path, module in model.named_modules() if isinstance(module, Rounded)}


def test_feedback_in_order_loses_least():
    teacher = vit()
    steps = {
        "plain": Quantise(bits=3, metric="weights"),
        "alone": Quantise(bits=3, sequential=False),
        "in order": Quantise(bits=3),
    }
    errors = {name: lost(compress(teacher, [step], images()), teacher) for name, step in steps.items()}
    assert errors["alone"] < 0.9 * errors["plain"]  # 0.20 of 0.26
    assert errors["in order"] < 0.95 * errors["alone"]  # 0.17


def test_the_ledger_has_the_error_that_is_left():
    student = compress(vit(), [Quantise(bits=4)], images())
    found = {entry.path: entry for entry in compression_of(student).ledger}
    assert found["blocks.1.mlp.fc2"].change == "weight in 4 bits, groups of 64"
    assert 0.01 < found["blocks.1.mlp.fc2"].output_error < 0.5
    assert found["patch_embed.proj"].change == "weight in 8 bits, groups of 64"
    assert found["patch_embed.proj"].output_error is None
    assert all(entry.before == entry.after > 0 for entry in found.values())


@pytest.mark.wide_unless(lambda calibrated: not calibrated)
@pytest.mark.parametrize("calibrated", [True, False])
def test_the_file_keeps_the_budget_and_layers_differ(calibrated, tmp_path):
    teacher, limit = vit(), 45_000
    step = Quantise(budget={"bytes": limit}, metric="outputs" if calibrated else "weights", choices=(2, 3, 4, 5, 6))
    student = compress(teacher, [step], images() if calibrated else None)
    size = (compressvit.save(student, tmp_path / "student") / TENSORS).stat().st_size
    assert size == cost.file_bytes(student)
    assert 0.97 * limit < size <= limit
    (plan,) = compression_of(student).plans
    assert len(set(plan.bits.values())) > 1
    assert set(plan.others.values()) == {8}
    costs = [cost.cost(model, (3, 32, 32)) for model in (teacher, student)]
    assert (costs[0].parameters, costs[0].macs) == (costs[1].parameters, costs[1].macs)


def test_a_budget_that_is_too_small_or_too_large_is_refused():
    with pytest.raises(
        UserError,
        match=r"a budget of 9,000 bytes cannot be met: the smallest .* reach is [\d,]+ .*or put `shrink` before",
    ):
        compress(vit(), [Quantise(budget={"bytes": 9_000}, metric="weights")])
    with pytest.raises(UserError, match="no smaller than the model's file"):
        compress(vit(), [Quantise(budget={"bytes": 1}, metric="weights")])
    with pytest.raises(UserError, match="bits or a budget, not both"):
        Quantise(bits=4, budget={"bytes": 0.5})


def test_shared_weights_are_rounded_once_and_stay_shared(tmp_path):
    student = compress(vit(), [Multiplex(share=2, head_mixing=False), Quantise(bits=4)], images())
    found = packed_of(student)
    assert found["blocks.0.attn.qkv"] is found["blocks.1.attn.qkv"]
    shared = [group for group in ties.tied_groups(student) if group[0].endswith("qkv.rounded.codes")]
    assert shared == [["blocks.0.attn.qkv.rounded.codes", "blocks.1.attn.qkv.rounded.codes"]]
    again = compressvit.load(compressvit.save(student, tmp_path / "student"))
    assert packed_of(again)["blocks.0.attn.qkv"] is packed_of(again)["blocks.1.attn.qkv"]
    assert "blocks.1.attn.qkv.rounded.codes" not in ties.unique_state(again)
    assert torch.equal(outputs(again), outputs(student))


def test_a_weight_that_another_module_has_too_stays_as_it_is():
    model = vit()
    model.extra = nn.Module()
    model.extra.weight = model.blocks[0].attn.qkv.weight
    student = compress(model, [Quantise(metric="weights")])
    assert "blocks.0.attn.qkv" not in packed_of(student)
    assert "blocks.1.attn.qkv" in packed_of(student)


@pytest.mark.wide
def test_what_shrink_fitted_is_what_is_rounded():
    teacher, step = vit(), Shrink(budget={"parameters": 0.6}, multiple=4)
    shrunk = compress(teacher, [step], images())
    plain = compress(teacher, [step, Quantise(bits=8, metric="weights")], images())
    for path, packed in packed_of(plain).items():
        weight = shrunk.get_submodule(path).weight
        assert (packed() - weight).abs().max() <= 1.02 * weight.abs().max() / 254, path
    assert 0 < lost(plain, shrunk) < 0.03  # 0.012


@pytest.mark.wide_unless(lambda pivoted: not pivoted)
@pytest.mark.parametrize("pivoted", [True, False])
def test_parts_of_low_rank_layers_are_rounded_and_say_which_outputs_they_give(pivoted):
    teacher = vit(embed_dim=64)
    low = compress(teacher, [LowRank(rank=32, pivoted=pivoted, metric="weights")])
    student = compress(teacher, [LowRank(rank=32, pivoted=pivoted, metric="weights"), Quantise(bits=8)], images(16))
    for layer in ("blocks.0.mlp.fc1", "blocks.0.mlp.fc2"):
        whole, seen = student.get_submodule(layer), {}
        for part in ("down", "up"):
            assert f"{layer}.{part}" in packed_of(student)
            whole.get_submodule(part).register_forward_hook(
                lambda m, i, o, part=part, seen=seen: seen.update({part: o})
            )
        output = whole(torch.randn(5, whole.in_features, generator=torch.Generator().manual_seed(0)))
        for part in ("down", "up"):
            outputs_of = whole.outputs_of(part)
            assert outputs_of is None or torch.equal(output[:, outputs_of], seen[part])
        assert whole.outputs_of("up") is not None
        assert (whole.outputs_of("down") is not None) == (pivoted and layer.endswith("fc2"))
    assert 0 < lost(student, low) < 0.03  # 0.010 and 0.009


def test_adapters_stay_as_they_are():
    student = compress(vit(), [LoRA(rank=30), Quantise(metric="weights")])
    assert not any("lora" in path for path in packed_of(student))
    assert "blocks.0.attn.qkv" in packed_of(student)


def test_patterns_keep_layers():
    student = compress(vit(), [Quantise(metric="weights", skip=("blocks.0.*", "patch_embed.proj"))])
    assert not any(path.startswith(("blocks.0.", "patch_embed")) for path in packed_of(student))
    with pytest.raises(UserError, match=r"quantise.skip: 'blocks.7.\*' matches no layer"):
        compress(vit(), [Quantise(skip=("blocks.7.*",))])


RECIPE = """\
teacher:
  model: vit_tiny_patch16_224
  weights: random
  args: {img_size: 16, patch_size: 4, in_chans: 1, embed_dim: 48, depth: 2, num_heads: 2}
data: {name: digits, batch_size: 8}
steps:
  - quantise: {metric: weights}
"""


def test_nothing_comes_after_it():
    plan = plan_recipe(parse_recipe(RECIPE + "  - distill: {epochs: 1}\n  - lora: {rank: 2}\n"))
    assert [text.partition(": ")[2].partition(":")[0] for text in plan.conflicts] == [
        "distill comes after quantise",
        "lora comes after quantise",
    ]
    assert all(text.endswith("put `quantise` last") for text in plan.conflicts)


def test_a_plan_tells_what_it_does_not_know_and_what_a_merge_undoes():
    assert plan_recipe(parse_recipe(RECIPE)).conflicts == []
    text = RECIPE.replace("metric: weights", "budget: {bytes: 0.2}")
    assert any("bits are those of equal layers in this plan" in note for note in plan_recipe(parse_recipe(text)).notes)
    merged = plan_recipe(parse_recipe(RECIPE + "  - merge\n")).steps[-1]
    assert "times the student's bytes, which undoes its compression" in merged.summary


def test_a_merge_gives_plain_layers_with_the_rounded_weights():
    student = compress(vit(), [Quantise(metric="weights")])
    merged = merged_copy(student)
    assert merged.state_dict().keys() == vit().state_dict().keys()
    assert torch.equal(outputs(merged), outputs(student))
    with pytest.raises(UserError, match=r"the student has [\d,]+ bytes, .*Give dense=True"):
        refuse_growth(student, merged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_student_of_lower_precision_is_stored_and_loaded(dtype, tmp_path):
    student = compress(vit(), [Quantise(bits=5, metric="weights")]).to(dtype)
    again = compressvit.load(compressvit.save(student, tmp_path / "student"))
    assert again.cls_token.dtype == dtype
    assert torch.equal(outputs(again), outputs(student))


@pytest.mark.wide_unless(lambda name: name == "convnext_conv_mlp")
@pytest.mark.parametrize("name", ["vit_no_class_token", "convnext_conv_mlp", "swin"])
def test_layers_of_other_families_are_rounded(name):
    teacher = build(name)
    seen = torch.randn(16, *input_size(teacher), generator=torch.Generator().manual_seed(3))
    student = compress(teacher, [Quantise(bits=8)], seen)
    error = (outputs(student) - outputs(teacher)).norm() / outputs(teacher).norm()
    assert 0 < error < 0.03  # 0.007
    (plan,) = compression_of(student).plans
    assert any(path.endswith("fc1") for path in plan.bits)


@pytest.mark.parametrize(
    ("value", "fault"), [(float("nan"), "not finite"), (float("-inf"), "not finite"), (-1e6, r"1\.0e\+06")]
)
@pytest.mark.parametrize("name", ["blocks.0.mlp.fc1.weight", "patch_embed.proj.weight", "pos_embed"])
def test_weights_that_float16_cannot_scale_are_refused(name, value, fault):
    model = vit(img_size=64)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    with pytest.raises(UserError, match=rf"quantise: {name} holds numbers .*{fault}.*quantise\.skip"):
        compress(model, [Quantise(metric="weights")])
