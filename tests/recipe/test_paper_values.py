"""Recipes that promise a paper's training have its values: those of the released code, which the recipe's comment names."""

from __future__ import annotations

import pytest

from compressvit.model.ties import count_parameters
from compressvit.model.weights import build
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
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
}
SWIN = {**DEIT, "warmup_epochs": 20, "clip_grad": 5.0}
SMALL, BASE = {**DEIT, "drop_path": 0.0}, {**DEIT, "drop_path": 0.1}
PLAIN = {
    "repeats": 1,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.25,
    "scale": (0.08, 1.0),
    "hflip": 0.5,
}
REPEATED = {**PLAIN, "repeats": 3, "color_jitter": 0.4}
VALUES = {
    "mini_deit_ti": (SMALL, {}, REPEATED),
    "mini_deit_s": (SMALL, {}, REPEATED),
    "mini_deit_b": (BASE, {}, REPEATED),
    "mini_deit_b_irpe": (BASE, {}, REPEATED),
    "mini_swin_b_384": (
        {"epochs": 30, "lr": 2e-5, "lr_reference_batch": 512, "weight_decay": 1e-8, "drop_path": 0.2},
        {"crop_pct": 1.0},
        PLAIN,
    ),
    "lors_deit_ti_cifar100": (
        {**DEIT, "warmup_epochs": 20, "drop_path": 0.0, "clip_grad": 5.0, "optimizer": "adamw"},
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
        {
            "batch_size": 64,
            "crop_mode": "squash",
            "crop_pct": 1.0,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        },
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
    assert load_recipe("lors_deit_ti_cifar100").teacher.finetune == spec  # both are trained alike
    assert spec.min_lr == pytest.approx(spec.peak_lr(recipe.data.batch_size) / 100)
    assert load_recipe("repadapter_vit_b_vtab").teacher.model == "vit_base_patch16_224.orig_in21k"


def test_repadapter_on_ade20k():
    """Width 8 and scale 1 of the paper on a ViT-L of 24 blocks, in SETR's training."""
    recipe = load_recipe("repadapter_segmentation")
    assert (recipe.steps[0].spec.width, recipe.steps[0].spec.groups, recipe.steps[0].spec.scale) == (8, 2, 1.0)
    spec, data = recipe.steps[1].spec, recipe.data
    assert round(spec.epochs * 20_210 / data.batch_size, -4) == 160_000  # steps, of ADE20K's training pictures
    assert (spec.optimizer, spec.momentum, spec.weight_decay, spec.clip_grad) == ("sgd", 0.9, 0.0, None)
    assert (spec.lr, spec.lr * spec.backbone_lr, spec.schedule, spec.power, spec.min_lr) == (
        0.01,
        1e-3,
        "poly",
        0.9,
        1e-4,
    )
    assert (data.reduce_zero_label, data.num_classes) == (True, 150)
    teacher = build("segmenter", recipe.teacher.args, num_classes=150, device="meta")
    before = count_parameters(teacher)
    student = recipe.steps[0].spec.plan(teacher)
    student.apply(teacher)
    assert count_parameters(teacher) - before == 639_360


VIDEO = {
    "epochs": 90,
    "optimizer": "momentum",
    "momentum": 0.9,
    "lr": 0.1,
    "lr_reference_batch": 256,
    "weight_decay": 0.0,
    "warmup_epochs": 10,
}


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("adaptformer_video", 12 * (2 * 768 * 64 + 64 + 768)),
        ("repadapter_video", 24 * (2 * 768 + 2 + 768 + 768)),
    ],
)
def test_video_as_adaptformer_trains_it(name, trained):
    """On a ViT-B of 12 blocks: a bottleneck beside each MLP; one of two neurons in two groups before each attention and MLP."""
    recipe = load_recipe(name)
    spec, clip = recipe.steps[1].spec, recipe.data.clip
    assert {key: getattr(spec, key) for key in VIDEO} == VIDEO
    frames = recipe.teacher.args["frames"]
    assert (frames, clip.sampling) == ((16, "segments") if name == "adaptformer_video" else (8, "dense"))
    assert clip.stride == 4
    teacher = build("video", recipe.teacher.args, num_classes=recipe.teacher.num_classes, device="meta")
    before = count_parameters(teacher)
    recipe.steps[0].spec.plan(teacher).apply(teacher)
    assert count_parameters(teacher) - before == trained


# Of recipes that state no source of their own values: what the papers print.
PRINTED = {
    "mini_swin_t": ({**SWIN, "drop_path": 0.0}, PLAIN),
    "mini_swin_s": ({**SWIN, "drop_path": 0.1}, PLAIN),
    "mini_swin_b": ({**SWIN, "drop_path": 0.2}, PLAIN),
    "adaptformer_vit_b": (
        {
            "epochs": 100,
            "optimizer": "momentum",
            "momentum": 0.9,
            "lr": 0.1,
            "lr_reference_batch": 256,
            "weight_decay": 0.0,
            "warmup_epochs": 20,
            "clip_grad": None,
        },
        {"scale": (0.08, 1.0), "hflip": 0.5, "auto_augment": None, "random_erasing": 0.0},
    ),
    "mimi_swin_t": (
        {
            "epochs": 100,
            "rate": 0.5,
            "lr": 5e-4,
            "lr_reference_batch": 512,
            "weight_decay": 0.05,
            "warmup_epochs": 20,
            "clip_grad": 5.0,
            "mixup": 0.8,
            "cutmix": 1.0,
            "smoothing": 0.1,
            "drop_path": 0.2,
        },
        PLAIN,
    ),
}


@pytest.mark.parametrize("name", PRINTED)
def test_a_recipe_has_the_printed_values(name):
    recipe = load_recipe(name)
    phase, augment = PRINTED[name]
    assert {key: getattr(recipe.steps[-1].spec, key) for key in phase} == phase
    assert {key: getattr(recipe.data.augment, key) for key in augment} == augment


# recipe: (step, its values)
METHODS = {
    "mini_deit_ti": (0, {"share": 2, "mlp_conv": 0, "mixing_bias": False}),
    "mini_swin_t": (0, {"share": (2, 2, 6, 2), "mlp_conv": 7, "mixing_bias": True}),
    "mini_swin_b": (0, {"share": (2, 2, 2, 2), "mlp_conv": 7, "mixing_bias": True}),
    "mini_swin_b_384": (0, {"share": (2, 2, 2, 2), "mlp_conv": 7, "mixing_bias": True}),
    "mini_deit_b_irpe": (1, {"ratio": 1.9}),
    "lors_deit_ti_cifar100": (0, {"rank": 32, "terms": (1,) * 9 + (2, 4, 6), "init": "scratch"}),
    "repadapter_vit_b_vtab": (0, {"width": 8, "groups": 2, "scale": 1.0}),
    "adaptformer_vit_b": (0, {"width": 64, "scale": 0.1, "dropout": 0.1}),
    "mimi_swin_t": (0, {"ratio": 0.5}),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_values_of_its_paper(name):
    index, values = METHODS[name]
    spec = load_recipe(name).steps[index].spec
    assert {key: getattr(spec, key) for key in values} == values


def test_the_terms_of_lors_lie_where_the_blocks_differ():
    """In the paper's DeiT: the last blocks in attention, the first ones in the MLP."""
    attention, mlp = (entry.spec for entry in load_recipe("lors_deit_ti_cifar100").steps[:2])
    assert (attention.targets, mlp.targets) == (("attn.qkv", "attn.proj"), ("mlp.fc1", "mlp.fc2"))
    assert (mlp.rank, mlp.terms) == (32, (6, 4, 2) + (1,) * 9)
    assert load_recipe("mimi_swin_t").steps[1].spec.target.neurons == 0.125


def decoder_of(recipe):
    model = build(recipe.teacher.model, recipe.teacher.args, device="meta", num_classes=recipe.teacher.num_classes)
    return count_parameters(model.decoder)


def test_the_recipes_of_adamixer_are_trained_alike_and_have_the_published_sizes():
    lors, dense = load_recipe("adamixer_lors"), load_recipe("adamixer")
    assert decoder_of(dense) == 110_272_296
    layout = load_recipe("adamixer", ["teacher.args.groups=2", "teacher.args.points_in=64"])
    assert layout.teacher.args == lors.teacher.args
    assert decoder_of(layout) == decoder_of(lors) == 135_536_424
    adaptive, static = (step.spec for step in lors.steps[:2])
    assert (adaptive.rank, adaptive.terms, adaptive.generator) == (16, (1, 1, 2, 2, 3, 3), "kaiming")
    assert (static.rank, static.share, static.shared_init) == (8, 6, "kaiming")
    spec = lors.steps[-1].spec
    assert spec == lors.teacher.finetune == dense.steps[-1].spec
    assert (spec.epochs, spec.milestones, spec.gamma) == (12, (8, 11), 0.1)
    assert (spec.lr, spec.weight_decay, spec.clip_grad) == (2.5e-5, 1e-4, 1.0)
    assert round(spec.warmup_epochs * 118_287 / lors.data.batch_size) == 500  # steps, on COCO's training images
    assert spec.frozen == ("backbone.conv1", "backbone.bn1", "backbone.layer1")
