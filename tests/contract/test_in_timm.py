"""A transformed model is still timm's: features, heads, copies, precisions, checkpointing, compiling."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from helpers.contract import every_case, every_transform, same_values, structure, teacher
from helpers.models import BACKBONES, build, images_for, outputs

from compressvit.model import ties
from compressvit.transforms import IRPE, Multiplex
from compressvit.transforms.applying import compress
from compressvit.transforms.record import compression_of


@every_transform
def test_features_and_head_are_the_forward_pass(spec, backbone, student):
    model = student(spec, backbone)
    images = images_for(model)
    with torch.no_grad():
        features = model.forward_features(images)
        assert torch.equal(model.forward_head(features), model(images))
        assert features.shape == teacher(backbone).forward_features(images).shape


@every_transform
def test_intermediates_are_those_of_the_forward_pass(spec, backbone, student):
    model = student(spec, backbone)
    images = images_for(model)
    with torch.no_grad():
        features, intermediates = model.forward_intermediates(images)
        assert torch.equal(features, model.forward_features(images))
        expected = teacher(backbone).forward_intermediates(images)[1]
    assert len(intermediates) == len(expected) >= 2
    assert [i.shape for i in intermediates] == [e.shape for e in expected]


@every_transform
def test_a_new_classifier(spec, backbone, student):
    model = student(spec, backbone)
    groups = ties.tied_groups(model)
    model.reset_classifier(3)
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        assert head.out_features == 3
    assert outputs(model, images_for(model)).shape == (2, 3)
    assert ties.tied_groups(model) == groups


@every_transform
def test_a_deep_copy_is_equal_and_separate(spec, backbone, student):
    model = student(spec, backbone)
    images = images_for(model)
    before = outputs(model, images)
    copied = copy.deepcopy(model)
    assert structure(copied) == structure(model)
    assert compression_of(copied).plans == compression_of(model).plans
    assert torch.equal(outputs(copied, images), before)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
    assert not torch.equal(outputs(copied, images), before)
    assert torch.equal(outputs(model, images), before)


@every_case
def test_bfloat16(spec, backbone, student):
    model = student(spec, backbone)
    images = images_for(model)
    expected = outputs(model, images)
    half = model.to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    got = outputs(half, images.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() / expected.norm() < 0.03  # seen 0.0132


@every_transform
def test_a_model_in_bfloat16_is_compressed_in_bfloat16(spec, backbone, fit):
    model = build(backbone).to(torch.bfloat16)
    made = compress(model, [fit(spec, backbone)])
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert outputs(made, images_for(model).bfloat16()).isfinite().all()


@every_transform
def test_autocast(spec, backbone, student):
    model = student(spec, backbone)
    images = images_for(model)
    expected = outputs(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = outputs(model, images)
    assert (got.float() - expected).norm() / expected.norm() < 0.02  # seen 0.0079


@every_case
def test_state_dict_fits_a_rebuilt_structure(spec, backbone, fit, student):
    model = student(spec, backbone)
    fresh = build(backbone, seed=11)
    fit(spec, backbone).plan(fresh).apply(fresh)
    images = images_for(model)
    assert not torch.equal(outputs(fresh, images), outputs(model, images))
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(outputs(fresh, images), outputs(model, images))


@every_transform
def test_train_and_eval(spec, backbone, student):
    model = student(spec, backbone)
    images = images_for(model)
    assert not any(module.training for module in model.modules()), "a teacher in eval mode gives a student in eval mode"
    before = outputs(model, images)
    model.train()
    assert all(module.training for module in model.modules())
    assert outputs(copy.deepcopy(model), images).shape == before.shape  # a copy: statistics follow what is seen
    model.eval()
    assert not any(module.training for module in model.modules())
    assert torch.equal(outputs(model, images), before)


@every_transform
def test_gradient_checkpointing_gives_the_same_gradients(spec, backbone, student):
    model = student(spec, backbone).train()
    images, gradients = images_for(model), []
    for enable in (False, True):
        model.zero_grad()
        torch.manual_seed(0)  # of dropout
        model.set_grad_checkpointing(enable)
        model(images).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    assert same_values(*gradients)


@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_compile_captures_the_whole_student(backbone):
    architecture, args = BACKBONES[backbone]
    shallow = timm.create_model(
        architecture, **args | {"vit": {"depth": 2}, "swin": {"depths": (2,), "num_heads": (2,)}}[backbone]
    )
    model = compress(shallow.eval(), [Multiplex(share=2, mixing_bias=True, mlp_conv=3, form="reference")])
    images = images_for(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    difference = (outputs(compiled, images) - outputs(model, images)).abs().max()
    assert difference <= 1e-6  # seen 0.0


@pytest.mark.slow
def test_compiled_student_computes_the_same():
    model = compress(teacher("vit"), [Multiplex(share=2, mixing_bias=True, mlp_conv=3, form="reference"), IRPE()])
    images = images_for(model)
    difference = (outputs(torch.compile(model), images) - outputs(model, images)).abs().max()
    assert difference <= 1e-6  # TOLERANCE
