"""timm's Swin v2: our attention and blocks are timm's."""

from __future__ import annotations

import pytest
import torch
from helpers.models import build, images_for, outputs

from compressvit.errors import UserError
from compressvit.model import surgery
from compressvit.model.backbone import describe
from compressvit.transforms import IRPE, VPT, Narrow


@torch.no_grad()
def test_blocks_with_empty_slots_are_timms():
    model = build("swin_v2")
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    images = images_for(model)
    before = outputs(model, images)
    backbone = describe(model, "slotted_attention", "slotted_block")
    assert any(any(info.shift) for info in backbone.blocks), "one has a mask"
    for info in backbone.blocks:
        surgery.specialise(model, info.path, backbone.slotted_block)
        attention = model.get_submodule(f"{info.path}.attn")
        surgery.specialise(model, f"{info.path}.attn", backbone.slotted_attention(attention))
    assert (outputs(model, images) - before).abs().max() < 1e-5 * before.abs().max()  # measured 0


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (IRPE(), "is a Swin v2, which has a relative position table already"),
        (VPT(), r"is a Swin v2, which does not say so \(`Family.prompts`\); adapt it with adapters"),
        (Narrow(head_dim=4), r"whose attention .* norms them together \(cosines\)"),
        (Narrow(heads=2), "narrow needs attention without relative positions of its own"),
    ],
    ids=["irpe", "vpt", "head_dim", "heads"],
)
def test_what_is_refused_and_why(spec, words):
    with pytest.raises(UserError, match=words):
        spec.plan(build("swin_v2"))
