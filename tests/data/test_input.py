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

from compressvit.data.input import InputConfig, input_config, renormalise
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
    data = Data(name="digits", mean=(0.2, 0.3, 0.4), std=(0.5,), crop_pct=0.8, interpolation="nearest")
    config = input_config(model, data)
    assert config.mean == pytest.approx((0.3,))
    assert (config.std, config.crop_pct, config.interpolation) == ((0.5,), 0.8, "nearest")


def test_input_config_of_colour_models():
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=(112, 224), depths=(1,))
    config = input_config(swin, Data(name="folder"))
    assert (config.channels, config.height, config.width) == (3, 112, 224)
    assert config.mean == pytest.approx((0.485, 0.456, 0.406))
    assert input_config(swin, Data(name="folder", mean=(0.1,))).mean == (0.1,) * 3
    resnet = timm.create_model("resnet10t")
    assert input_config(resnet, Data(name="folder")).height == resnet.default_cfg["input_size"][1]


def test_input_config_of_a_model_with_odd_channels():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, in_chans=5, depth=1)
    with pytest.raises(UserError, match="takes 5 channels; images have 1"):
        input_config(model, Data(name="digits"))


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


def test_renormalise_size():
    images = torch.full((1, 3, 32, 32), 0.5)
    larger = renormalise(images, COLOUR, dataclasses.replace(COLOUR, height=48, width=40))
    assert larger.shape == (1, 3, 48, 40)
    torch.testing.assert_close(larger, torch.full_like(larger, 0.5), atol=1e-5, rtol=0)
    assert renormalise(images.bfloat16(), COLOUR, dataclasses.replace(COLOUR, mean=(0.1,) * 3)).dtype == torch.bfloat16
