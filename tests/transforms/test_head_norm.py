"""The batch normalisation before a classifier: its arithmetic, its statistics in training, in files and in a merge."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.contract import structure
from helpers.models import build, images_for, outputs
from helpers.training import VIT
from torch import nn

import compressvit
from compressvit.artifacts import artifact
from compressvit.artifacts.adapter import load_adapter, remove_adapter, save_adapter
from compressvit.errors import UserError
from compressvit.model import surgery, ties
from compressvit.recipe.recipe import load_recipe
from compressvit.transforms import AdaptFormer, HeadNorm, LowRank
from compressvit.transforms.applying import compress
from compressvit.transforms.record import trained_parameters

BACKBONES = ("vit", "swin", "convnext", "deit_distilled")


def seen(backbone: str, *more) -> nn.Module:
    """A student in eval mode that has had a batch, so its statistics are not those of the start."""
    torch.manual_seed(3)
    model = compress(build(backbone), [*more, HeadNorm()])
    outputs(model.train(), 3 * images_for(model, batch=8))
    return model.eval()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_it_normalises_pooled_features_by_the_batch_and_later_by_what_it_saw(backbone):
    model, plain = compress(build(backbone), [HeadNorm()]), build(backbone)
    images = images_for(model, batch=6)
    found: list[torch.Tensor] = []
    head = model.get_classifier()[0] if isinstance(model.get_classifier(), tuple) else model.get_classifier()
    head.head_norm.register_forward_pre_hook(lambda m, inputs: found.append(inputs[0]))
    assert (
        outputs(model, images) - outputs(plain, images)
    ).abs().max() < 1e-5  # measured 2e-6: 0, 1 and ε at the start
    x = found.pop()
    assert x.shape == (6, head.in_features)
    mean, variance = x.mean(0), x.var(0)
    for module in model.modules():  # no stochastic depth in the way
        module.training = isinstance(module, nn.BatchNorm1d)
    heads = (F.linear((x - mean) / (x.var(0, correction=0) + 1e-6).sqrt(), head.weight, head.bias),)
    if backbone != "deit_distilled":
        assert (outputs(model, images) - heads[0]).abs().max() < 1e-4  # measured 8e-6
    else:
        outputs(model, images)
    assert torch.allclose(head.head_norm.running_mean, 0.1 * mean, atol=1e-6)
    assert torch.allclose(head.head_norm.running_var, 0.9 + 0.1 * variance, atol=1e-5)


def test_it_has_no_parameters_and_only_the_classifier_is_trained():
    model = compress(build("vit"), [AdaptFormer(width=4), HeadNorm()])
    without = compress(build("vit"), [AdaptFormer(width=4)])
    assert ties.count_parameters(model) == ties.count_parameters(without)
    assert trained_parameters(model) == trained_parameters(without)
    assert trained_parameters(compress(build("vit"), [HeadNorm()])) == {"trained_adapter": 0, "trained_head": 5 * 49}


def test_one_image_has_no_variance():
    model = seen("vit")
    statistics = model.head.head_norm.running_mean.clone()
    expected = outputs(model, images_for(model, batch=1))
    for module in model.modules():
        module.training = isinstance(module, nn.BatchNorm1d)
    assert torch.equal(outputs(model, images_for(model, batch=1)), expected)
    assert torch.equal(model.head.head_norm.running_mean, statistics)


@pytest.mark.wide_unless(lambda backbone: backbone == "vit")
@pytest.mark.parametrize("backbone", BACKBONES)
def test_files_have_its_statistics(backbone, tmp_path):
    model = seen(backbone, AdaptFormer(width=4))
    images = images_for(model)
    expected = outputs(model, images)
    assert (expected - outputs(build(backbone), images)).abs().max() > 1e-3  # measured at least 5e-3
    assert torch.equal(outputs(artifact.load(artifact.save(model, tmp_path / "student")), images), expected)
    plain = build(backbone)
    before = outputs(plain, images)
    load_adapter(plain, save_adapter(model, tmp_path / "adapter.safetensors"))
    assert torch.equal(outputs(plain, images), expected)
    assert torch.equal(outputs(remove_adapter(plain), images), before)
    assert structure(plain) == structure(build(backbone))


@pytest.mark.parametrize("classes", [7, 0])
def test_a_new_classifier_has_one_too(classes, tmp_path):
    model = seen("vit")
    model.reset_classifier(classes)
    again = artifact.load(artifact.save(model, tmp_path / "student"))
    assert structure(again) == structure(model)
    assert torch.equal(outputs(again), outputs(model))
    if classes:
        assert not model.head.head_norm.running_mean.any(), "fresh"


@pytest.mark.wide_unless(lambda backbone: backbone == "vit")
@pytest.mark.parametrize("backbone", BACKBONES)
def test_it_merges_into_the_classifier(backbone):
    model = seen(backbone)
    merged = compressvit.merge(model)
    images = images_for(model)
    assert structure(merged) == structure(build(backbone))
    assert (outputs(merged, images) - outputs(model, images)).abs().max() < 1e-5  # measured 1e-6
    low_rank = seen("vit", LowRank(rank=2, metric="weights"))
    assert (outputs(compressvit.merge(low_rank)) - outputs(low_rank)).abs().max() < 1e-5


def test_it_needs_a_linear_classifier():
    with pytest.raises(UserError, match=r"has none; give the student one with student\.head=new"):
        HeadNorm().plan(build("headless"))
    model = timm.create_model("vit_tiny_patch16_224", **VIT)
    model.head = nn.Conv2d(VIT["embed_dim"], 3, 1)
    with pytest.raises(
        UserError, match="stands before a linear classifier, but head of vit_tiny_patch16_224 is a Conv2d"
    ):
        HeadNorm().plan(model)
    assert not surgery.added_modules(model)


def test_adaptformers_recipe_has_one():
    assert [step.name for step in load_recipe("adaptformer_vit_b").steps] == ["adaptformer", "head_norm", "finetune"]
