"""Multiplexed layers take what timm's take: masks, kinds of attention, other input sizes.

The number in the comment beside a tolerance is the error seen, the largest over the parameters of that test.
"""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from helpers.models import EVERYTHING, VIT, build, gap, randomise
from timm.layers import Attention
from torch import nn

from compressvit.errors import UserError
from compressvit.model import surgery
from compressvit.model.families.vit import ExplicitAttention, SlottedBlock
from compressvit.transforms import Multiplex
from compressvit.transforms.applying import compress
from compressvit.transforms.multiplex import HeadMixing, TokenConv

# ------------------------------------------------------------------------------------------- timm's ways into attention

MASKS = {
    "none": {},
    "bool": {"attn_mask": torch.arange(81).reshape(9, 9) % 3 > 0},
    "float": {"attn_mask": torch.linspace(-3, 3, 81).reshape(9, 9)},
    "per head": {"attn_mask": torch.linspace(-3, 3, 2 * 4 * 81).reshape(2, 4, 9, 9)},
    "causal": {"is_causal": True},
}
SHAPES = {
    "plain": {},
    "normed": {"qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm},
    "gated": {"gated": True},
    "wide heads": {"attn_head_dim": 20},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("fused", [True, False])
def test_attention_with_an_identity_mix_is_timms(kind, mask, fused):
    torch.manual_seed(0)
    theirs = Attention(48, num_heads=4, qkv_bias=True, **SHAPES[kind]).eval()
    randomise(theirs)
    theirs.fused_attn = fused
    ours = copy.deepcopy(nn.ModuleDict({"attn": theirs}))
    surgery.specialise(ours, "attn", ExplicitAttention)
    for slot in ("logit_mix", "prob_mix"):
        surgery.fill_slot(ours, "attn", slot, HeadMixing(4, bias=True))
    x = torch.randn(2, 9, 48)
    with torch.no_grad():
        expected = theirs(x, **MASKS[mask])
        assert (ours["attn"](x, **MASKS[mask]) - expected).abs().max() < 1e-5  # seen 2.9e-06
        if mask != "none":
            assert (theirs(x) - expected).abs().max() > 1e-2, "the mask must matter"


@pytest.mark.parametrize("mask", ["bool", "causal"])
def test_masked_tokens_stay_masked_behind_a_mix(mask):
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": Attention(48, num_heads=4, qkv_bias=True).eval()})
    surgery.specialise(model, "attn", ExplicitAttention)
    for slot in ("logit_mix", "prob_mix"):
        surgery.fill_slot(model, "attn", slot, HeadMixing(4))
    randomise(model)
    x = torch.randn(1, 9, 48)
    hidden = 8  # the last token: the future of all others, and masked for all
    options = {"is_causal": True} if mask == "causal" else {"attn_mask": (torch.arange(9) != hidden).expand(9, 9)}
    changed = x.clone()
    changed[:, hidden] += 1
    with torch.no_grad():
        difference = (model["attn"](x, **options) - model["attn"](changed, **options))[:, :hidden]
    assert difference.abs().max() == 0


def test_block_passes_masks_on():
    teacher = build("vit")
    student = compress(teacher, [Multiplex(share=1, **EVERYTHING)])
    assert isinstance(student.blocks[0], SlottedBlock)
    x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, x], dim=1)[:, :17]
    seen = 0
    with torch.no_grad():
        for options in ({"is_causal": True}, {"attn_mask": torch.rand(17, 17) > 0.3}):
            expected = teacher.blocks[0](x, **options)
            assert (student.blocks[0](x, **options) - expected).abs().max() < 1e-5  # seen 2.4e-07
            assert (teacher.blocks[0](x) - expected).abs().max() > 1e-4
            seen += 1
    assert seen == 2


# ---------------------------------------------------------------------------------------------------- other input sizes


def test_another_input_size():
    teacher = timm.create_model("vit_tiny_patch16_224", **VIT, dynamic_img_size=True).eval()
    student = compress(teacher, [Multiplex(share=1, **EVERYTHING)])
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (student(images) - teacher(images)).abs().max() < 1e-5  # seen 1.5e-07


@pytest.mark.parametrize(("built", "given"), [((4, 4), (8, 8)), ((4, 8), (6, 12)), ((3, 2), (6, 4))])
def test_convolution_folds_a_grid_of_the_same_shape(built, given):
    small, large = TokenConv(6, 3, built, num_prefix_tokens=1), TokenConv(6, 3, given, num_prefix_tokens=1)
    randomise(small)
    grid = TokenConv(6, 3, given, sequence=False)
    for other in (large, grid):
        other.load_state_dict(small.state_dict())
    x = torch.randn(2, 1 + given[0] * given[1], 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(small(x), large(x))
        square = x[:, 1:].reshape(2, *given, 6)
        assert (grid(square) - small(x)[:, 1:].reshape_as(square)).abs().max() < 1e-6  # seen 0.0


def test_convolution_refuses_tokens_it_cannot_fold():
    convolution = TokenConv(6, 3, (4, 4), num_prefix_tokens=1)
    with pytest.raises(UserError, match=r"cannot fold 14 tokens into a grid shaped like \(4, 4\)"):
        convolution(torch.randn(1, 15, 6))


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_student_keeps_up_with_set_input_size(name):
    teacher, student = build(name), compress(build(name), [Multiplex(share=1, **EVERYTHING)])
    for model in (teacher, student):
        model.set_input_size(img_size=(64, 64))
    assert gap(student, teacher) < 1e-5  # seen 7.5e-08
