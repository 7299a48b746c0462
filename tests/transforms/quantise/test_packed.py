"""Packed codes: no bit between them, the same weight as what was rounded, and the same codes whatever the model is converted to."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from helpers.models import images_for, outputs

from compressvit.fitting.rounding import nearest, values_of
from compressvit.transforms import Quantise
from compressvit.transforms.applying import compress
from compressvit.transforms.quantise.packed import Packed, pack, packed_size, unpack


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [8, 61, 1000])
def test_codes_come_back_and_take_their_bits_alone(bits, count):
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, count).to(torch.uint8), codes)
    assert len(packed) == packed_size(count, bits)
    assert count * bits <= 8 * len(packed) < (count + 8) * bits


@pytest.mark.parametrize(
    ("shape", "rows"), [((6, 40), 6), ((6, 3, 4, 4), 6), ((1, 6, 40), 6)], ids=["linear", "conv", "embeddings"]
)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_packed_weight_is_what_was_rounded(shape, rows, bits):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = nearest(weight.view(rows, -1), bits, 16)
    packed = Packed(shape, bits, 16)
    packed.set(found)
    assert torch.equal(packed(), values_of(found, bits, 16).view(shape))


def test_conversions_leave_codes_and_scales():
    packed = Packed((6, 40), 5, 16)
    packed.set(nearest(torch.randn(6, 40, generator=torch.Generator().manual_seed(0)), 5, 16))
    before, weight = {name: tensor.clone() for name, tensor in packed.state_dict().items()}, packed()
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        packed.to(dtype)
        assert packed().dtype == dtype
        assert {name: tensor.dtype for name, tensor in packed.state_dict().items()} == {
            "codes": torch.uint8,
            "scales": torch.float16,
        }
    assert all(torch.equal(before[name], tensor) for name, tensor in packed.state_dict().items())
    assert torch.equal(packed(), weight)
    assert copy.deepcopy(packed).to("meta").scales.dtype == torch.float16


def test_position_embeddings_are_rounded_where_they_are_large_and_again_for_another_size():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=48, depth=1, num_heads=2)
    student = compress(model.eval(), [Quantise(bits=8, metric="weights")])
    assert "pos_embed" not in student.state_dict()
    assert student.rounded_positions.codes.numel() == 65 * 48
    lost = (student.pos_embed - model.pos_embed).abs().max() / model.pos_embed.abs().max()
    assert 0 < lost < 1 / 127  # 0.0043
    for each in (model, student):
        each.set_input_size(img_size=32)
    assert student.pos_embed.shape == model.pos_embed.shape == (1, 17, 48)
    difference = outputs(student, images_for(model)) - outputs(model, images_for(model))
    assert 0 < difference.norm() < 0.05 * outputs(model, images_for(model)).norm()  # 0.011
