"""Of every family: our attention and blocks with empty slots are timm's, and heads go with what belongs to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import BACKBONES, build, family_of, images_for, outputs, randomise
from torch import nn

from compressvit.model import surgery
from compressvit.model.backbone import describe
from compressvit.model.calls import called
from compressvit.transforms import Narrow
from compressvit.transforms.applying import compress
from compressvit.transforms.narrow.places import of_each_head, places

SLOTTED = [name for name in BACKBONES if not any(map(family_of(name).lacks, ("slotted_attention", "slotted_block")))]


def moved(name: str) -> nn.Module:
    """A small model in which nothing is zero, one, or the identity."""
    model = build(name)
    randomise(model, 0.1)
    return model


def gradients(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(images).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.wide_unless(lambda name: name in ("vit", "swin", "cait"))
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", SLOTTED)
def test_blocks_with_empty_slots_are_timms(name, fused):
    model = moved(name)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    images = images_for(model)
    before, wanted = outputs(model, images), gradients(model, images)
    backbone = describe(model, "slotted_attention", "slotted_block")
    for info in backbone.blocks:
        attention = f"{info.path}.attn"
        surgery.specialise(model, info.path, backbone.slotted_block)
        surgery.specialise(model, attention, backbone.slotted_attention(model.get_submodule(attention)))
    assert (outputs(model, images) - before).abs().max() < 1e-5 * before.abs().max()  # measured 2e-6
    for parameter, found in gradients(model, images).items():
        if not wanted[
            parameter
        ].any():  # in CvT's last block only the class token's query counts, and no convolution gives it
            assert parameter.startswith("stage1.blocks.1.attn.conv_proj_q"), parameter
            assert not found.any(), parameter
            continue
        difference = (found - wanted[parameter]).norm() / wanted[parameter].norm()
        assert difference < 1e-4, parameter  # measured 7e-6


def with_option(option: str) -> list[str]:
    models = {name: build(name) for name in (*BACKBONES, "hiera")}
    return [name for name, model in models.items() if option in places(model, describe(model))[0].options]


@pytest.mark.wide_unless(lambda name, sequential: name == "swin_v2" and not sequential)
@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("name", with_option("heads"))
@torch.no_grad()
def test_heads_that_nothing_reads_go_without_a_trace(name, sequential):
    model: Any = moved(name)
    family, blocks = family_of(name), describe(model).blocks
    for info in blocks:
        proj = model.get_submodule(f"{info.path}.attn.proj")
        size = proj.in_features // info.heads
        proj.weight[:, : size * (info.heads // 2)] *= 1e-4
    images = images_for(model, 48)
    heads = tuple(info.heads - info.heads // 2 for info in blocks)
    student = compress(model, [Narrow(heads=heads, sequential=sequential)], images)
    unseen = images_for(model, 8, seed=2)
    wanted = outputs(model, unseen)
    assert (outputs(student, unseen) - wanted).norm() < 1e-3 * wanted.norm()  # measured 3e-6 to 6e-5
    for info in blocks:
        ours, theirs = (m.get_submodule(f"{info.path}.attn") for m in (student, model))
        for parameter, axes in of_each_head(ours, family).items():
            tensor = theirs.get_parameter(parameter)
            for axis in axes:
                tensor = tensor.narrow(axis, info.heads // 2, info.heads - info.heads // 2)
            assert torch.equal(ours.get_parameter(parameter), tensor), parameter


@pytest.mark.wide_unless(lambda name, sequential: name == "beit" and sequential)
@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("name", ["vit", "swin", "beit", "vit_relpos", "cait"])
@torch.no_grad()
def test_dimensions_of_heads_that_repeat_others_go_without_a_trace(name, sequential):
    model: Any = moved(name)
    for place in places(model, describe(model)):
        attention = model.get_submodule(f"{place.path}.attn")
        half = place.head_dim // 2
        vectors = [getattr(attention, own) for own in family_of(name).of_heads]
        parts = [attention.qkv.weight, *([] if attention.qkv.bias is None else [attention.qkv.bias])]
        for tensor in [*(part for whole in parts for part in whole.chunk(3)), *vectors]:
            of_heads = tensor.unflatten(0, (place.heads, place.head_dim))
            of_heads[:, half:] = of_heads[:, :half]
    images, size = images_for(model, 48), places(model, describe(model))[0].head_dim // 2
    student = compress(model, [Narrow(head_dim=size, sequential=sequential)], images)
    unseen = images_for(model, 8, seed=2)
    wanted = outputs(model, unseen)
    assert (outputs(student, unseen) - wanted).norm() < 1e-4 * wanted.norm()  # measured 6e-7 to 2e-6


@torch.no_grad()
def test_layers_that_timm_reads_without_a_call_are_called():
    model = build("beit")
    seen: list[str] = []
    for info in describe(model).blocks:
        model.get_submodule(f"{info.path}.attn.qkv").register_forward_hook(lambda *_: seen.append("qkv"))
    before = outputs(model)
    assert not seen
    with called(model):
        assert torch.allclose(outputs(model), before, atol=1e-6)
    assert len(seen) == 4
