"""Recipes that promise a paper's training have its values: those of the released code, which the recipe's comment names."""

from __future__ import annotations

import pytest

from compressvit.recipe.recipe import load_recipe
from compressvit.recipe.shipped import shipped_recipes

# recipe: (phase's values, data's values, augmentation's values)
DEIT = {
    "epochs": 300,
    "lr": 1e-3,
    "lr_reference_batch": 1024,
    "warmup_epochs": 5,
    "weight_decay": 0.05,
    "clip_grad": None,
}
SMALL, BASE = {**DEIT, "drop_path": 0.0}, {**DEIT, "drop_path": 0.1}
REPEATED = {"repeats": 3, "auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25}
VALUES = {
    "mini_deit_ti": (SMALL, {}, REPEATED),
    "mini_deit_s": (SMALL, {}, REPEATED),
    "mini_deit_b": (BASE, {}, REPEATED),
    "mini_deit_b_irpe": (BASE, {}, REPEATED),
    "mini_swin_b_384": (
        {"epochs": 30, "lr": 2e-5, "lr_reference_batch": 512, "weight_decay": 1e-8},
        {},
        {"repeats": 1},
    ),
    "lors_deit_ti_cifar100": (
        {"epochs": 300, "warmup_epochs": 20, "drop_path": 0.0},
        {},
        {"auto_augment": None, "random_erasing": 0.0, "hflip": 0.5},
    ),
    "repadapter_vit_b_vtab": (
        {
            "epochs": 100,
            "lr": 1e-3,
            "weight_decay": 1e-4,
            "warmup_epochs": 10,
            "min_lr": 1e-5,
            "clip_grad": None,
            "drop_path": 0.1,
        },
        {"batch_size": 64, "crop_mode": "squash", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
        {},
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_recipe_has_the_values_it_promises(name):
    recipe = load_recipe(name)
    phase, data, augment = VALUES[name]
    spec = next(step.spec for step in reversed(recipe.steps) if step.name in ("distill", "finetune"))
    assert {key: getattr(spec, key) for key in phase} == phase
    assert {key: getattr(recipe.data, key) for key in data} == data
    assert {key: getattr(recipe.data.augment, key) for key in augment} == augment
    assert "released" in shipped_recipes()[name].read_text()


def test_the_least_rate_of_lors_is_a_hundredth_of_its_peak():
    recipe = load_recipe("lors_deit_ti_cifar100")
    spec = recipe.steps[-1].spec
    assert spec.min_lr == pytest.approx(spec.peak_lr(recipe.data.batch_size) / 100)
    assert load_recipe("repadapter_vit_b_vtab").teacher.model == "vit_base_patch16_224.orig_in21k"
