"""The input that a model takes, and images turned from one model's input into another's."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
from helpers.images import COLOUR, picture
from helpers.models import build
from torch import nn
from torchvision.transforms.functional import to_tensor

from compressvit.data.input import InputConfig, Side, input_config, renormalise, stand_ins
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.model.backbone import input_size

# ---- what a model takes


def test_input_config_of_a_model():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, in_chans=1, depth=1)
    config = input_config(model, Data(name="digits"))
    assert config == InputConfig(1, 32, 32, (0.5,), (0.5,), "bicubic", 1.0, "center")
    config = input_config(model, Data(name="folder"))
    assert config.crop_pct == 0.9
    data = Data(name="digits", mean=(0.3,), std=(0.5,), crop_pct=0.8, interpolation="nearest")
    config = input_config(model, data)
    assert config.mean == (0.3,)
    assert (config.std, config.crop_pct, config.interpolation) == ((0.5,), 0.8, "nearest")


def test_input_config_of_colour_models():
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=(112, 224), depths=(1,))
    config = input_config(swin, Data(name="folder"))
    assert (config.channels, config.height, config.width) == (3, 112, 224)
    assert config.mean == pytest.approx((0.485, 0.456, 0.406))
    assert input_config(swin, Data(name="folder", mean=(0.1,))).mean == (0.1,) * 3
    resnet = timm.create_model("resnet10t")
    assert input_config(resnet, Data(name="folder")).height == resnet.default_cfg["input_size"][1]


@pytest.mark.parametrize("channels", [2, 5, 13])
def test_input_config_of_a_model_of_bands(channels):
    model = timm.create_model("test_vit", img_size=32, in_chans=channels)
    assert model.pretrained_cfg["mean"] == (0.5,) * 3
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.2, 0.4, 0.9)}
    config = input_config(model, Data(name="folder"))
    assert config.size == input_size(model) == (channels, 32, 32)
    assert config.mean == pytest.approx((0.5,) * channels)
    assert stand_ins(model, config).startswith(
        f"the model has no statistics of its {channels} channels: each has the mean of those of 3, mean 0.5 and std 0.5"
    )
    own = tuple(i / channels for i in range(channels))
    config = input_config(model, Data(name="folder", mean=own, std=(0.25,)))
    assert (config.mean, config.std, stand_ins(model, config)) == (own, (0.25,) * channels, None)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": own, "std": own}  # as that of a saved student
    config = input_config(model, Data(name="folder"))
    assert (config.mean, stand_ins(model, config)) == (own, None)


@pytest.mark.parametrize("channels", [1, 4])
def test_statistics_of_gray_models_and_of_those_with_alpha_are_as_before(channels):
    model = timm.create_model("test_vit", img_size=32, in_chans=channels)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    config = input_config(model, Data(name="folder"))
    assert (config.mean, stand_ins(model, config)) == ((sum((0.1, 0.2, 0.3)) / 3,) * channels, None)


@pytest.mark.parametrize(("channels", "count"), [(1, 3), (3, 2), (4, 3), (5, 3), (5, 6)])
def test_statistics_of_another_number_are_refused(channels, count):
    model = timm.create_model("test_vit", img_size=32, in_chans=channels)
    for name in ("mean", "std"):
        words = rf"data.{name}=\[.*\] is of {count} channels, and the model takes {channels}; give a number for each"
        data = Data(name="folder", **{name: (0.5,) * count})
        with pytest.raises(UserError, match=words):
            input_config(model, data)
        assert input_config(model, data, trained=True).channels == channels  # its own are used


def test_a_size_of_other_channels_has_their_statistics():
    given = COLOUR.at((5, 8, 9))
    assert given.size == (5, 8, 9)
    assert given.mean == pytest.approx((0.4,) * 5)
    assert COLOUR.at((3, 8, 9)) == dataclasses.replace(COLOUR, height=8, width=9)


@pytest.mark.parametrize("name", ["vit", "swin", "hiera", "davit"])  # whose sizes are in places of their own
def test_images_have_the_size_that_costs_are_counted_for(name):
    model = build(name)
    config = input_config(model, Data(name="digits"))
    assert (config.channels, config.height, config.width) == input_size(model)


def test_input_config_of_any_module():
    assert input_config(nn.Sequential(nn.Conv2d(1, 2, 3)), Data(name="digits")).channels == 1


# ---- renormalise


def test_renormalise_returns_the_same_tensor_when_nothing_differs():
    images = torch.randn(2, 3, 32, 32)
    assert renormalise(images, COLOUR, dataclasses.replace(COLOUR, crop_pct=0.5)) is images


def test_renormalise_statistics():
    pixels = torch.rand(2, 3, 32, 32)
    normalised = (pixels - torch.tensor(COLOUR.mean)[:, None, None]) / torch.tensor(COLOUR.std)[:, None, None]
    plain = dataclasses.replace(COLOUR, mean=(0.0,) * 3, std=(1.0,) * 3)
    torch.testing.assert_close(renormalise(normalised, COLOUR, plain), pixels)
    torch.testing.assert_close(renormalise(pixels, plain, COLOUR), normalised)


def test_renormalise_channels_as_pillow_does():
    image = picture(0)
    colour = InputConfig(3, 20, 24, (0.0,) * 3, (1.0,) * 3, "bicubic", 1.0)
    gray = InputConfig(1, 20, 24, (0.0,), (1.0,), "bicubic", 1.0)
    luma = renormalise(to_tensor(image)[None], colour, gray)
    torch.testing.assert_close(luma[0], to_tensor(image.convert("L")), atol=1 / 255, rtol=0)
    assert torch.equal(renormalise(luma, gray, colour), luma.expand(1, 3, 20, 24))


def test_renormalise_bands():
    one = InputConfig(5, 8, 8, (0.1, 0.2, 0.3, 0.4, 0.5), (0.5, 0.4, 0.3, 0.2, 0.1), "bicubic", 1.0)
    two = dataclasses.replace(one, mean=(0.0,) * 5, std=(1.0,) * 5)
    pixels = torch.rand(2, 5, 8, 8)
    normalised = (pixels - torch.tensor(one.mean)[:, None, None]) / torch.tensor(one.std)[:, None, None]
    torch.testing.assert_close(renormalise(normalised, one, two), pixels)
    assert renormalise(pixels, two, dataclasses.replace(two, height=16, width=12)).shape == (2, 5, 16, 12)
    for other in (COLOUR, two.at((4, 8, 8)), two.at((2, 8, 8))):
        for source, target in ((two, other), (other, two)):
            words = f"one model takes images of {source.channels} channels and the other of {target.channels}"
            with pytest.raises(UserError, match=words):
                Side(nn.Identity(), target).converter(source)
            with pytest.raises(UserError, match=words):
                renormalise(torch.rand(1, *source.size), source, target)


def test_renormalise_size():
    images = torch.full((1, 3, 32, 32), 0.5)
    larger = renormalise(images, COLOUR, dataclasses.replace(COLOUR, height=48, width=40))
    assert larger.shape == (1, 3, 48, 40)
    torch.testing.assert_close(larger, torch.full_like(larger, 0.5), atol=1e-5, rtol=0)
    assert renormalise(images.bfloat16(), COLOUR, dataclasses.replace(COLOUR, mean=(0.1,) * 3)).dtype == torch.bfloat16
