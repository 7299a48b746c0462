"""Features at taps, CKA of models, the layer map, drift from the teacher, and t-SNE."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers.models import ADAPTED, BACKBONES, build, images_for
from torch import nn

from compressvit import VPT, Multiplex, compress
from compressvit.backbone import describe
from compressvit.diagnostics.drift import drift, drift_finding
from compressvit.diagnostics.embedding import embedding_finding
from compressvit.diagnostics.features import block_paths, features, regrouped, subject, walk
from compressvit.diagnostics.similarity import cka_finding, cka_matrix
from compressvit.diagnostics.spectra import (
    spectra_findings,
)
from compressvit.distill.pairs import match_layers, suggested_pairs
from compressvit.errors import UserError
from compressvit.findings import merged

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
    seen = features(subject(model), images_for(model, 3), CPU)
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
    one, other = subject(model), subject(model, input=lambda images: 2 * images)
    images = images_for(model)
    doubled = features(one, 2 * images, CPU)
    _, seen = next(walk([one, other], lambda: [images], CPU, 10))
    assert all(torch.equal(seen[path], doubled[path]) for path in one.taps)


def test_a_tap_that_is_no_module_has_near_names():
    model = build("vit")
    with pytest.raises(
        UserError, match=r"tap 'blocks.1.atn' is no module of VisionTransformer; did you mean 'blocks.1.attn'"
    ):
        features(subject(model, ["blocks.1.atn"]), images_for(model), CPU)


def test_a_model_of_unknown_blocks_wants_taps():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(UserError, match=r"name the modules to look at as taps, e\.g\. 0, 1"):
        subject(model)
    assert list(features(subject(model, ["1"]), torch.randn(2, 3, 2, 2), CPU)) == ["1"]


def test_the_first_layer_that_is_not_finite_is_named():
    model = build("vit")
    with torch.no_grad():
        model.blocks[2].mlp.fc2.bias[0] = float("nan")
    with pytest.raises(UserError, match=r"features of 'blocks.2' are not finite, and it is the first"):
        features(subject(model), images_for(model), CPU)


# --- CKA of models


@pytest.mark.parametrize("name", ["vit", "swin", "convnext"])
def test_a_model_is_like_itself_layer_by_layer(name):
    model = build(name)
    one = subject(model)
    result = cka_matrix(one, one, batches_for(model), CPU, batch_size=8)
    assert torch.allclose(result.values.diagonal(), torch.ones(len(one.taps), dtype=torch.float64), atol=1e-12)
    assert torch.allclose(result.values, result.values.mT, atol=1e-12)
    assert (result.images, result.batches) == (24, 3)
    again = cka_matrix(one, subject(build(name)), batches_for(model), CPU, batch_size=8)  # run twice, not once
    assert torch.allclose(again.values, result.values, atol=1e-6)


def test_a_last_batch_of_any_size_is_of_use():
    model = build("vit")
    one = subject(model)
    for count in (17, 18, 19, 20, 23):
        assert cka_matrix(one, one, batches_for(model, count), CPU, batch_size=8).images == count


def test_models_of_other_widths_and_depths_are_compared():
    vit, swin = build("vit"), build("swin")
    result = cka_matrix(subject(vit), subject(swin, ["layers.1", "head"]), batches_for(vit), CPU, batch_size=8)
    assert result.values.shape == (4, 2)
    records = cka_finding(result).records
    assert sum(record["best"] for record in records) == 4
    assert {record["teacher"] for record in records} == {"layers.1", "head"}


def test_too_few_images_for_the_estimator():
    model = build("vit")
    one = subject(model)
    with pytest.raises(UserError, match="3 images are too few"):
        cka_matrix(one, one, batches_for(model, 3), CPU)
    with pytest.raises(UserError, match="batches of 2 images are too small"):
        cka_matrix(one, one, batches_for(model), CPU, batch_size=2)


# --- the layer map


def test_the_map_keeps_the_order_and_finds_the_best_sum():
    blocks = describe(build("vit")).blocks
    values = np.array([[0.9, 0.8, 0.1, 0.0], [0.95, 0.2, 0.3, 0.1]])
    assert suggested_pairs(values, blocks[:2], blocks) == [
        (0, 0),
        (1, 2),
    ]  # 1.2; the greedy (1, 0) leaves block 0 alone


def test_the_map_keeps_to_stage_and_shift():
    blocks = describe(build("swin")).blocks
    values = np.random.default_rng(0).random((len(blocks), len(blocks)))
    pairs = suggested_pairs(values, blocks, blocks)
    assert pairs
    for s, t in pairs:
        assert (blocks[s].stage, blocks[s].shift) == (blocks[t].stage, blocks[t].shift)
    students, teachers = zip(*pairs, strict=True)
    assert list(students) == sorted(set(students))
    assert list(teachers) == sorted(set(teachers))


# --- drift


@pytest.mark.parametrize("name", list(BACKBONES))
def test_nothing_has_drifted_from_itself(name):
    model = build(name).train()
    found = drift(model, model, every_block(model, model), batches_for(model), CPU, batch_size=8)
    assert all(value == pytest.approx(0, abs=1e-9) for means in found for value in means.values())
    assert set(found[0]) == {"cosine", "error", "attention_kl", "attention_relation_kl", "hidden_relation"}
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
    found = drift(student, teacher, every_block(student, teacher), batches_for(teacher), CPU)
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
            features(subject(m, ["blocks.3"]), images, CPU)["blocks.3"].double() for m in (student, teacher)
        )
    found = drift(student, teacher, every_block(student, teacher), lambda: images.split(5), CPU, batch_size=7)
    assert found[3]["error"] == pytest.approx(((ours - theirs).norm() / theirs.norm()).item(), rel=1e-5)


def test_prompts_leave_out_what_compares_tokens_one_by_one():
    teacher = build("vit")
    student = compress(teacher, [VPT(prompts=3)])
    found = drift(student, teacher, every_block(student, teacher), batches_for(teacher), CPU)
    assert all(set(means) <= {"cosine", "error", "hidden_relation"} for means in found)
    assert found[-1]["error"] > 0


def test_models_are_left_as_they_were_also_by_an_error():
    teacher, student = build("vit").train(), build("vit").train()
    with torch.no_grad():
        student.blocks[1].mlp.fc1.bias[0] = float("nan")
    with pytest.raises(UserError):
        drift(student, teacher, every_block(student, teacher), batches_for(teacher), CPU)
    assert student.training
    assert teacher.training


def test_heads_that_mix_are_compared():
    teacher = build("swin")
    student = compress(teacher, [Multiplex(share=2, head_mixing=True, mlp_conv=3)])
    pairs = every_block(student, teacher)
    found = drift(student, teacher, pairs, batches_for(teacher), CPU)
    assert found[1]["attention_kl"] > 0
    finding = drift_finding(found, pairs)
    assert len(finding.records) == len(pairs) * 5
    assert all(np.isfinite(record["value"]) for record in finding.records)


def test_drift_names_the_first_block_that_is_not_finite():
    teacher, student = build("vit"), build("vit")
    with torch.no_grad():
        student.blocks[1].mlp.fc1.bias[0] = float("inf")
    with pytest.raises(UserError, match=r"features of 'blocks\.1' are not finite"):
        drift(student, teacher, every_block(student, teacher), batches_for(teacher), CPU)


# --- t-SNE


def test_images_of_a_class_lie_together():
    chance = np.random.default_rng(0)
    labels = np.repeat([0, 1], 30)
    features = chance.normal(size=(60, 8)) + 20 * labels[:, None]
    points = embedding_finding({"model": features}, labels).records
    places = {c: np.array([[p["x"], p["y"]] for p in points if p["class"] == c]) for c in "01"}
    spread = max(np.linalg.norm(v - v.mean(0), axis=1).max() for v in places.values())
    assert np.linalg.norm(places["0"].mean(0) - places["1"].mean(0)) > spread


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
