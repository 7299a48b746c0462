"""Costs are counted for every kind of timm model, and one that cannot be transformed is refused in a sentence."""

from __future__ import annotations

import pytest
import timm
import torch

from compressvit.model.backbone import head_paths
from compressvit.model.cost import cost
from compressvit.recipe.recipe import Recipe
from compressvit.runs.plan import plan_recipe

# Models whose first token, query or position is a view of a parameter: torch's counter of operations cannot follow one with a gradient.
EXPANDED = {
    "map pooling": ("vit_base_patch16_siglip_224", {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 32}),
    "rope, attention pooling": ("vit_pe_core_tiny_patch16_384", {"embed_dim": 32, "depth": 1, "num_heads": 2}),
    "class attention": ("cait_xxs24_224", {"embed_dim": 32, "depth": 1, "depth_token_only": 1, "num_heads": 2}),
    "pooling": ("pit_ti_224", {"base_dims": [8, 8, 8], "depth": [1, 1, 1], "heads": [1, 1, 1]}),
}


@pytest.mark.parametrize("kind", EXPANDED)
def test_expanded_parameters_are_counted_as_without_gradients(kind):
    name, args = EXPANDED[kind]
    model = timm.create_model(name, num_classes=5, **args)
    size = model.pretrained_cfg["input_size"]
    found = cost(model, size)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.macs > found.parameters // 2
    assert found == cost(model.requires_grad_(False), size)
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())  # counted on a copy


def test_macs_of_map_pooling_by_hand():
    def macs(**args):
        small = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0}
        return cost(timm.create_model("vit_base_patch16_siglip_224", **{**small, **args}), (3, 32, 32)).macs

    tokens, width = 4, 16
    projections = width * width * (1 + 2 * tokens + 1)  # of the query, of keys and values, of the output
    attention = 2 * tokens * width
    mlp = 2 * 4 * width * width
    assert macs() - macs(global_pool="avg", fc_norm=False) == projections + attention + mlp + width  # and its norm


def plan_of(model: str, args: dict | None = None, **step):
    content = {
        "teacher": {"model": model, "args": args or {}},
        "data": {"name": "folder", "root": "images"},
        "steps": [step],
    }
    return plan_recipe(Recipe.model_validate(content))


STRANGERS = ["pit_ti_224", "tnt_s_legacy_patch16_224", "crossvit_9_240"]


@pytest.mark.wide_unless(lambda model: model == "pit_ti_224")
@pytest.mark.parametrize("model", STRANGERS)
def test_a_model_that_no_family_has_is_one_conflict(model):
    plan = plan_of(model, multiplex={"share": 2})
    assert plan.teacher.macs > 1e8
    (conflict,) = plan.conflicts
    assert f"multiplex needs attention, and {model} is a " not in conflict  # it may well have some
    assert f"multiplex needs blocks that it knows, and {model} is a " in conflict
    assert "of which compressvit knows only which layers run after which" in conflict


@pytest.mark.wide_unless(lambda model: model == "pit_ti_224")
@pytest.mark.parametrize("model", STRANGERS)
def test_a_model_that_no_family_has_can_be_made_low_rank(model):
    args = {"depth": [1, 1, 1]} if model == "pit_ti_224" else {}
    plan = plan_of(model, args, low_rank={"budget": {"parameters": 0.5}})
    assert not plan.conflicts
    assert any(f"{model} is of no family" in note and "linear layers can be changed, in" in note for note in plan.notes)
    assert 0.49 < plan.student.parameters / plan.teacher.parameters <= 0.5


def test_an_encoder_without_a_classifier_is_refused_by_name():
    name = "deepseek_vit_412m_enc"
    with torch.device("meta"):
        assert head_paths(timm.create_model(name, depth=1)) == []
    (conflict,) = plan_of(name, {"depth": 1}, multiplex={"share": 2}).conflicts
    assert f"{name} is a DeepseekVitEncoder, of which compressvit knows only" in conflict
