"""Calibration images: in which forms they may come, and which sizes a model takes."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.models import VIT, build, images_for

from compressvit.errors import UserError
from compressvit.fitting.choices import Choices
from compressvit.fitting.reference import LEAST_IMAGES, STRONG_RIDGE, Reference

PATHS = ["blocks.0.mlp.fc1", "blocks.1.attn.proj"]


def test_every_form_of_the_images_gives_the_same_moments():
    model = build("vit")
    images = images_for(model, 20)
    pairs = [(part, torch.zeros(len(part))) for part in images.split(8)]
    forms = (images, images.split(8), pairs, iter(pairs), lambda: images.split(8), images.double())
    expected = None
    for form in forms:
        found = Reference(build("vit"), form).moments(PATHS, outputs=False)
        assert list(found) == PATHS
        assert all(moments.tokens == 20 * 17 for moments in found.values())
        expected = expected or found
        for path in PATHS:
            torch.testing.assert_close(found[path].inputs, expected[path].inputs, rtol=1e-5, atol=1e-6)


FORMS = {
    "tensor": lambda images: images,
    "batches of 8": lambda images: images.split(8),
    "batches of 32": lambda images: images.split(32),
    "one batch": lambda images: [images],
    "function": lambda images: lambda: iter(images.split(16)),
}


@pytest.mark.parametrize("form", FORMS)
def test_moments_are_those_of_all_images_however_they_are_given(form):
    model = build("vit")
    images = images_for(model, 64)
    (wanted,) = Reference(model, images).moments(["blocks.0.attn.qkv"], outputs=False).values()
    (found,) = Reference(model, FORMS[form](images)).moments(["blocks.0.attn.qkv"], outputs=False).values()
    assert found.tokens == wanted.tokens
    torch.testing.assert_close(found.inputs, wanted.inputs, rtol=1e-5, atol=1e-6)  # measured 3e-7, of the batches


def test_what_judges_and_is_known_goes_on_with_another_model():
    model, choices, judge = build("vit"), Choices(), object()
    reference = Reference(model, images_for(model, 8), choices=choices, judge=judge)
    other = reference.with_model(model)
    assert other.choices is choices
    assert other.judge is judge
    assert Reference(model).with_model(model).judge is not reference.judge


def test_a_model_of_any_size_takes_images_of_any_size():
    dynamic = timm.create_model("vit_tiny_patch16_224", **VIT, dynamic_img_size=True)
    images = torch.randn(9, 3, 48, 48)
    assert Reference(dynamic, images).moments(PATHS, outputs=False)[PATHS[0]].tokens == 9 * 37
    with pytest.raises(UserError, match=r"a tensor \(N, 3, 32, 32\).*not a batch of shape \(9, 3, 48, 48\)"):
        Reference(build("vit"), images).moments(PATHS, outputs=False)
    with pytest.raises(UserError, match=r"not a batch of shape \(9, 1, 48, 48\)"):
        Reference(dynamic, images[:, :1]).moments(PATHS, outputs=False)


@pytest.mark.parametrize(("different", "strong"), [(LEAST_IMAGES - 1, True), (LEAST_IMAGES, False)])
def test_images_that_are_too_few_or_too_alike_have_a_strong_ridge(different, strong):
    model = build("vit")
    images = images_for(model, different).repeat(3, 1, 1, 1)
    reference = Reference(model, images)
    metric = reference.metrics(PATHS, "outputs", 1e-3, 1e-2)[PATHS[0]]
    assert reference.too_alike is strong
    moments = reference.moments(PATHS, outputs=True)[PATHS[0]]
    ridges = (STRONG_RIDGE, STRONG_RIDGE) if strong else (1e-3, 1e-2)
    expected = moments.metric(*ridges)
    torch.testing.assert_close(metric.input, expected.input)
    torch.testing.assert_close(metric.output, expected.output)
    assert not torch.allclose(metric.input, moments.metric(0.5, 0.5).input, rtol=1e-3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            lambda some: some[:1],
            "there is only one calibration image, and a fit to it would hold for no other; give at least 8",
        ),
        (lambda some: some[:1].expand(20, -1, -1, -1), "all 20 calibration images are alike"),
        (lambda some: 0 * some, "all 20 calibration images are alike"),
        (
            lambda some: some.mean(dim=(2, 3), keepdim=True).expand(some.shape),
            "the 20 calibration images have one colour each",
        ),
    ],
    ids=["one", "copies", "black", "plain colours"],
)
def test_images_that_show_nothing_of_others_are_refused(images, message):
    model = build("vit")
    some = images_for(model, 20)
    with pytest.raises(UserError, match=message):
        Reference(model, images(some)).moments(PATHS, outputs=False)
    Reference(model, some[:2]).moments(PATHS, outputs=False)


def test_fewer_tokens_than_inputs_are_told_and_far_fewer_refused(caplog):
    """Those that are summed up count: the class token and one other of each image."""
    model, path = build("vit"), "blocks.0.mlp.fc2"
    inputs = model.blocks[0].mlp.fc2.in_features
    images = images_for(model, inputs // 2)

    def told(count):
        caplog.clear()
        moments = Reference(model, images[:count], tokens=1).moments([path], outputs=False)[path]
        assert (moments.drawn, moments.tokens) == (2 * count, 17 * count)
        text = f"give {2 * count} tokens for the {inputs} inputs of {path}: directions they do not cover"
        return any(text in record.getMessage() for record in caplog.records)

    assert not told(inputs // 2)
    assert told(inputs // 2 - 1)
    assert told(inputs // 32)
    with pytest.raises(
        UserError, match=rf"give 4 tokens for the {inputs} inputs of {path}.*give {inputs // 4} times as many"
    ):
        told(2)
