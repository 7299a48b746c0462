"""Features at taps, CKA of models, the layer map, drift from the teacher, and t-SNE."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import timm
import torch
from helpers.images import side
from helpers.models import ADAPTED, BACKBONES, VIT, build, images_for
from PIL import Image
from torch import nn

from compressvit import VPT, Multiplex, compress
from compressvit.charts.findings import merged
from compressvit.data.input import InputConfig, Side
from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.diagnostics.cka_layers import cka_finding, cka_layers_finding, cka_matrix
from compressvit.diagnostics.drift import drift, drift_finding
from compressvit.diagnostics.embedding import embedding_finding, pooled_features
from compressvit.diagnostics.features import block_paths, features, regrouped, subject, walk
from compressvit.diagnostics.kernel_alignment import cka
from compressvit.diagnostics.spectra import spectra_findings
from compressvit.errors import UserError
from compressvit.model.backbone import describe
from compressvit.runs.recorder import evaluation_images
from compressvit.training.pairs import match_layers, suggested_pairs

CPU = torch.device("cpu")


def batches_for(model: nn.Module, count: int = 24):
    images = images_for(model, count)
    return lambda: [images[:7], images[7:]]


def every_block(student: nn.Module, teacher: nn.Module):
    return match_layers(student, teacher, tuple((b.index, b.index) for b in describe(teacher).blocks))[0]


# --- features


@pytest.mark.parametrize("name", [*BACKBONES, *ADAPTED])
def test_blocks_are_the_layers_unless_others_are_named(name):
    model = build(name).train()
    seen = features(subject(side(model)), images_for(model, 3), CPU)
    assert list(seen) == list(block_paths(model))
    assert all(len(value) == 3 for value in seen.values())
    assert model.training  # looked at in eval mode, and left as it was
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("sizes", [(5,), (16,), (17, 2), (1,) * 19, (40, 40)])
def test_regrouping_keeps_every_image_in_order(sizes):
    images = torch.arange(sum(sizes)).float().reshape(-1, 1, 1, 1)
    for wanted in (3, 18, 1000):
        groups = list(regrouped(images.split(sizes), wanted, 8, least=4))
        assert torch.equal(torch.cat(groups), images[:wanted])
        assert all(len(g) == 8 for g in groups[:-1])
        assert len(groups[-1]) >= min(4, wanted, len(images))
        assert len(groups[-1]) < 8 + 4


def test_each_model_sees_its_own_images():
    model = build("vit")
    seen = InputConfig(3, *images_for(model).shape[-2:], (0.0,) * 3, (1.0,) * 3, "bicubic", 1.0)
    one, other = subject(Side(model, seen)), subject(Side(model, dataclasses.replace(seen, std=(0.5,) * 3)))
    images = images_for(model)
    doubled = features(one, 2 * images, CPU)
    _, seen = next(walk([one, other], lambda: [images], CPU, 10))
    assert all(torch.equal(seen[path], doubled[path]) for path in one.taps)


def test_features_are_of_every_image():
    model = build("vit")
    images = images_for(model, 70)
    assert all(len(value) == 70 for value in features(subject(side(model)), images, CPU).values())
    with pytest.raises(UserError, match="features were asked for without any image"):
        features(subject(side(model)), images[:0], CPU)


def test_a_model_that_is_in_two_modes_keeps_both():
    model = build("vit").train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    one = subject(side(model))
    cka_matrix(one, one, batches_for(model), CPU)
    drift(side(model), side(model), every_block(model, model), batches_for(model), CPU)
    pooled_features(side(model), [(images_for(model, 12), torch.zeros(12))], CPU, images=12)
    assert [module.training for module in model.modules()] == modes
    assert not all(modes)


def test_a_tap_inside_a_window_has_no_row_an_image():
    model = build("swin")
    with pytest.raises(
        UserError, match=r"'layers.0.blocks.0.attn' gives \d+ rows for 8 images, .*tap the enclosing module"
    ):
        features(subject(side(model), ["layers.0", "layers.0.blocks.0.attn"]), images_for(model, 8), CPU)


def test_a_tap_that_is_no_module_has_near_names():
    model = build("vit")
    with pytest.raises(
        UserError, match=r"tap 'blocks.1.atn' is no module of VisionTransformer; did you mean 'blocks.1.attn'"
    ):
        features(subject(side(model), ["blocks.1.atn"]), images_for(model), CPU)


def test_a_model_of_unknown_blocks_wants_taps():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(UserError, match=r"name the modules to look at as taps, e\.g\. 0, 1"):
        subject(side(model))
    assert list(features(subject(side(model), ["1"]), torch.randn(2, 3, 2, 2), CPU)) == ["1"]


def test_the_first_layer_that_is_not_finite_is_named():
    model = build("vit")
    with torch.no_grad():
        model.blocks[2].mlp.fc2.bias[0] = float("nan")
    for taps in (None, ["norm", "blocks.3", "blocks.2"]):  # whatever the order in which they are asked for
        with pytest.raises(UserError, match=r"features of 'blocks.2' are not finite, and it is the first"):
            features(subject(side(model), taps), images_for(model), CPU)


# --- CKA of models


@pytest.mark.parametrize("name", ["vit", "swin", "convnext"])
def test_a_model_is_like_itself_layer_by_layer(name):
    model = build(name)
    one = subject(side(model))
    result = cka_matrix(one, one, batches_for(model), CPU, batch_size=8)
    assert torch.allclose(result.values.diagonal(), torch.ones(len(one.taps), dtype=torch.float64), atol=1e-12)
    assert torch.allclose(result.values, result.values.mT, atol=1e-12)
    assert (result.images, result.batches) == (24, 3)
    again = cka_matrix(one, subject(side(build(name))), batches_for(model), CPU, batch_size=8)  # run twice, not once
    assert torch.allclose(again.values, result.values, atol=1e-6)


def test_a_last_batch_of_any_size_is_of_use():
    model = build("vit")
    one = subject(side(model))
    for count in (17, 18, 19, 20, 23):
        assert cka_matrix(one, one, batches_for(model, count), CPU, batch_size=8).images == count


def test_models_of_other_widths_and_depths_are_compared():
    vit, swin = build("vit"), build("swin")
    result = cka_matrix(
        subject(side(vit)), subject(side(swin), ["layers.1", "head"]), batches_for(vit), CPU, batch_size=8
    )
    assert result.values.shape == (4, 2)
    records = cka_finding(result).records
    assert sum(record["best"] for record in records) == 4
    assert {record["column"] for record in records} == {"layers.1", "head"}
    assert cka_layers_finding(result, "") is None


def test_one_batch_has_no_band():
    one = subject(side(build("vit")))
    found = [cka_layers_finding(cka_matrix(one, one, batches_for(one.model), CPU, batch_size=b), "") for b in (8, 64)]
    assert ["low" in f.options for f in found] == ["low" in f.records[0] for f in found] == [True, False]
    assert "One batch was measured, so there is no interval" in found[1].caption
    assert found[1].draw() is not None


def test_too_few_images_for_the_estimator():
    model = build("vit")
    one = subject(side(model))
    with pytest.raises(UserError, match="3 images are too few"):
        cka_matrix(one, one, batches_for(model, 3), CPU)
    with pytest.raises(UserError, match="batches of 2 images are too small"):
        cka_matrix(one, one, batches_for(model), CPU, batch_size=2)


def test_a_set_in_the_order_of_its_classes_is_streamed_as_it_is(tmp_path):
    """A batch of one class would not see what tells classes apart: 1.0000 within 0.0000 here, without the random order."""
    colours, noise = torch.rand(8, 3, 1, 1), torch.Generator().manual_seed(0)
    for c, colour in enumerate(colours):
        for split, count in (("train", 1), ("val", 32)):
            (tmp_path / split / str(c)).mkdir(parents=True)
            for i in range(count):
                image = (colour * 200 + 40 * torch.rand(3, 8, 8, generator=noise)).byte()
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / split / str(c) / f"{i}.png")
    data = Data(name="folder", root=str(tmp_path), crop_pct=1.0)
    config = InputConfig(3, 8, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 1.0)
    images = partial(evaluation_images, open_data(data), data, config, CPU, 256)

    class Sees(nn.Module):
        """One layer sees an image's colour, the other that and as much of the rest."""

        def __init__(self):
            super().__init__()
            self.colour, self.rest = nn.AdaptiveAvgPool2d(1), nn.Identity()

        def forward(self, x):
            return self.colour(x) + self.rest(x)

    taps = subject(side(Sees()), ["colour"]), subject(side(Sees()), ["rest"])
    result = cka_matrix(*taps, lambda: (batch for batch, _ in images()), CPU, images=256, batch_size=16)
    everything = torch.cat([batch for batch, _ in images()])
    whole = cka(Sees().colour(everything), everything, unbiased=True)
    assert abs(result.values.item() - whole) < result.half_width.item() < 0.05


# --- the layer map


def test_the_map_keeps_the_order_and_finds_the_best_sum():
    blocks = describe(build("vit")).blocks
    values = np.array([[0.9, 0.8, 0.1, 0.0], [0.95, 0.2, 0.3, 0.1]])
    assert suggested_pairs(values, blocks[:2], blocks, np.ones((2, 4), bool)) == [
        (0, 0),
        (1, 2),
    ]  # 1.2; the greedy (1, 0) leaves block 0 alone


def test_blocks_that_are_alike_to_none_still_have_a_pair():
    blocks = describe(build("vit")).blocks
    values = np.array([[0.9, 0.1, 0.0, 0.0], [-0.03, -0.02, -0.04, -0.03], [0.0, 0.0, 0.2, 0.8]])
    assert suggested_pairs(values, blocks[:3], blocks, np.ones((3, 4), bool)) == [(0, 0), (1, 1), (2, 3)]


def test_the_map_keeps_to_stage_and_shift():
    blocks = describe(build("swin")).blocks
    values = np.random.default_rng(0).random((len(blocks), len(blocks)))
    places = [(block.stage, block.shift) for block in blocks]
    pairs = suggested_pairs(values, blocks, blocks, np.array([[s == t for t in places] for s in places]))
    assert pairs
    for s, t in pairs:
        assert (blocks[s].stage, blocks[s].shift) == (blocks[t].stage, blocks[t].shift)
    students, teachers = zip(*pairs, strict=True)
    assert list(students) == sorted(set(students))
    assert list(teachers) == sorted(set(teachers))


# --- drift


@pytest.mark.wide_unless(lambda name: name in ("vit", "swin", "hiera"))
@pytest.mark.parametrize("name", [*BACKBONES, "hiera"])
def test_nothing_has_drifted_from_itself(name):
    model = build(name).train()
    found = drift(side(model), side(model), every_block(model, model), batches_for(model), CPU, batch_size=8)
    assert all(value == pytest.approx(0, abs=1e-9) for means in found for value in means.values())
    assert set(found[0]) == {"cosine", "error", "attention_relation_kl", "hidden_relation"} | (
        {"attention_kl"} if name != "hiera" else set()  # it has no dropout of attention, at which maps are seen
    )
    assert model.training
    assert all(
        block.attn.fused_attn == build(name).get_submodule(p).attn.fused_attn
        for p, block in ((i.path, model.get_submodule(i.path)) for i in describe(model).blocks)
        if hasattr(block.attn, "fused_attn")
    )


def test_drift_starts_at_the_block_that_changed():
    teacher, student = build("vit"), build("vit")
    with torch.no_grad():
        student.blocks[2].attn.qkv.weight.mul_(1.5)
    found = drift(side(student), side(teacher), every_block(student, teacher), batches_for(teacher), CPU)
    assert all(means["error"] == means["attention_kl"] == 0 for means in found[:2])
    assert all(means[name] > 1e-4 for means in found[2:] for name in ("error", "cosine"))
    assert found[2]["attention_kl"] > 1e-5


def test_the_relative_error_is_what_it_says():
    teacher, student = build("vit"), build("vit")
    with torch.no_grad():
        student.blocks[3].mlp.fc2.bias.add_(0.3)
    images = images_for(teacher, 24)
    with torch.no_grad():
        ours, theirs = (
            features(subject(side(m), ["blocks.3"]), images, CPU)["blocks.3"].double() for m in (student, teacher)
        )
    found = drift(
        side(student), side(teacher), every_block(student, teacher), lambda: images.split(5), CPU, batch_size=7
    )
    assert found[3]["error"] == pytest.approx(((ours - theirs).norm() / theirs.norm()).item(), rel=1e-5)


def test_prompts_leave_out_what_compares_tokens_one_by_one():
    teacher = build("vit")
    student = compress(teacher, [VPT(prompts=3)])
    found = drift(side(student), side(teacher), every_block(student, teacher), batches_for(teacher), CPU)
    assert all(set(means) <= {"cosine", "error", "hidden_relation"} for means in found)
    assert found[-1]["error"] > 0


def test_models_are_left_as_they_were_also_by_an_error():
    teacher, student = build("vit").train(), build("vit").train()
    with torch.no_grad():
        student.blocks[1].mlp.fc1.bias[0] = float("nan")
    with pytest.raises(UserError):
        drift(side(student), side(teacher), every_block(student, teacher), batches_for(teacher), CPU)
    assert student.training
    assert teacher.training


def test_heads_that_mix_are_compared():
    teacher = build("swin")
    student = compress(teacher, [Multiplex(share=2, head_mixing=True, mlp_conv=3)])
    pairs = every_block(student, teacher)
    found = drift(side(student), side(teacher), pairs, batches_for(teacher), CPU)
    assert found[1]["attention_kl"] > 0
    finding = drift_finding(found, pairs)
    assert len(finding.records) == len(pairs) * 5
    assert all(np.isfinite(record["value"]) for record in finding.records)


def test_drift_without_images_or_anything_to_compare():
    teacher, student = build("vit"), build("vit")
    pairs = every_block(student, teacher)
    with pytest.raises(UserError, match="drift needs images, and none were given"):
        drift(side(student), side(teacher), pairs, list, CPU)
    narrow = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=4)
    longer = compress(narrow, [VPT(prompts=2, deep=False)])
    with pytest.raises(UserError, match="differ in the number of tokens and in width"):
        drift(side(longer), side(teacher), every_block(longer, teacher)[:1], batches_for(teacher), CPU)


def test_drift_of_other_models_is_that_of_the_tokens_that_both_have():
    finer = timm.create_model("vit_tiny_patch16_224", **{**VIT, "patch_size": 4, "reg_tokens": 2}).eval()
    teacher = build("vit")
    pairs = every_block(finer, teacher)
    found = drift(side(finer), side(teacher), pairs, batches_for(teacher), CPU)
    assert [sorted(values) for values in found] == [
        ["attention_relation_kl", "cosine", "error", "hidden_relation"] for _ in pairs
    ]
    same = drift(side(teacher), side(teacher), every_block(teacher, teacher), batches_for(teacher), CPU)
    assert all(value < 1e-6 for values in same for value in values.values())  # measured 3e-7


def test_drift_names_the_first_block_that_is_not_finite():
    teacher, student = build("vit"), build("vit")
    with torch.no_grad():
        student.blocks[1].mlp.fc1.bias[0] = float("inf")
    with pytest.raises(UserError, match=r"features of 'blocks\.1' are not finite"):
        drift(side(student), side(teacher), every_block(student, teacher), batches_for(teacher), CPU)


# --- t-SNE


def test_images_of_a_class_lie_together():
    chance = np.random.default_rng(0)
    labels = np.repeat([0, 1], 30)
    features = chance.normal(size=(60, 8)) + 20 * labels[:, None]
    points = embedding_finding({"model": features}, labels).records
    places = {c: np.array([[p["x"], p["y"]] for p in points if p["class"] == c]) for c in "01"}
    spread = max(np.linalg.norm(v - v.mean(0), axis=1).max() for v in places.values())
    assert np.linalg.norm(places["0"].mean(0) - places["1"].mean(0)) > spread


def test_pooled_features_that_do_not_do():
    model = build("vit")
    batch = [(images_for(model, 12), torch.zeros(12))]
    with pytest.raises(UserError, match="9 images are too few to show groups; it needs at least 10"):
        pooled_features(side(model), batch, CPU, images=9)
    with torch.no_grad():
        model.norm.bias[0] = float("nan")
    with pytest.raises(UserError, match="the pooled features are not finite"):
        pooled_features(side(model), batch, CPU, images=12)


@pytest.mark.parametrize("features", [np.ones((20, 8)), np.zeros((20, 8)), np.arange(20.0)[:, None]])
def test_features_that_do_not_vary_are_refused(features):
    with pytest.raises(UserError, match="there is nothing to draw"):
        embedding_finding({"model": features}, np.zeros(20))


# --- findings of several moments


def test_findings_that_have_panels_keep_them_when_they_are_merged():
    teacher = build("vit")
    first, second = (
        dataclasses.replace(
            f, records=[{"phase": "1_distill", "epoch": e, "when": f"epoch {e}", **r} for r in f.records]
        )
        for e, f in ((0, spectra_findings({"teacher": teacher})[0]), (3, spectra_findings({"teacher": teacher})[0]))
    )
    both = merged(first, second)
    assert len(both.records) == len(first.records) + len(second.records)
    panels = {record["panel"] for record in both.records}
    assert panels == {
        f"epoch {e}: {layer}" for e in (0, 3) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert both.options["facet"] == "panel"
    again = merged(both, second)
    assert len(again.records) == len(both.records)
    assert {record["panel"] for record in again.records} == panels
