"""timm's BEiT: one table for all blocks, official files, prompts without positions, and what is refused."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.models import build, images_for, outputs, randomise

from compressvit.errors import UserError
from compressvit.model import surgery
from compressvit.model.backbone import describe
from compressvit.model.families.beit import SMALL
from compressvit.model.positions import resample_positions
from compressvit.transforms import IRPE, VPT, Align, Multiplex, Narrow, Shrink
from compressvit.transforms.applying import compress
from compressvit.transforms.record import compression_of

SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "swiglu_mlp": True, "init_values": None}


def shared(**more) -> torch.nn.Module:
    """One table for all blocks, SwiGLU, no LayerScale."""
    torch.manual_seed(0)
    model = timm.create_model("beit_base_patch16_224", **{**SMALL, **SHARED, **more}).eval()
    randomise(model, 0.1)
    return model


@torch.no_grad()
def test_blocks_with_empty_slots_are_timms_where_all_share_a_table():
    for both in (False, True):
        model = shared(use_rel_pos_bias=both)
        before = outputs(model)
        backbone = describe(model, "slotted_attention", "slotted_block")
        for info in backbone.blocks:
            surgery.specialise(model, info.path, backbone.slotted_block)
            attention = model.get_submodule(f"{info.path}.attn")
            surgery.specialise(model, f"{info.path}.attn", backbone.slotted_attention(attention))
        for fused in (True, False):
            for info in backbone.blocks:
                model.get_submodule(f"{info.path}.attn").fused_attn = fused
            assert (outputs(model) - before).abs().max() < 1e-5 * before.abs().max()  # measured 3e-7


def test_a_model_with_one_table_is_made_smaller_and_shares():
    model = shared()
    images = images_for(model, 48)
    spec = Shrink(budget={"parameters": 0.6}, multiple=4)
    student = compress(model, [spec], images)
    forms = compression_of(student).plans[0].forms.values()
    assert any(form.neurons for form in forms)
    assert not any(form.heads or form.head_dim for form in forms)
    assert outputs(student, images).isfinite().all()
    with pytest.raises(UserError, match="heads, which have one table of relative positions for all blocks, outside"):
        Narrow(heads=2).plan(model)
    with pytest.raises(UserError, match=r"cannot permute the heads of .*align\.heads=false"):
        Align(share=2).plan(model)
    mixed = compress(model, [Multiplex(share=2)])
    assert outputs(mixed, images).isfinite().all()


@torch.no_grad()
def test_official_pretraining_gives_every_block_its_own_table():
    """As the fine-tuning of the official code does."""
    pretrained, model = shared(), timm.create_model("beit_base_patch16_224", **{**SMALL, "img_size": 48})
    own = pretrained.state_dict()
    indices = {"rel_pos_bias.relative_position_index": pretrained.rel_pos_bias.relative_position_index}
    found = resample_positions({**own, **indices}, model)
    table = own["rel_pos_bias.relative_position_bias_table"]
    assert len(table) == 7 * 7 + 3
    for i in range(4):
        resampled = found[f"blocks.{i}.attn.relative_position_bias_table"]
        assert resampled.shape == (11 * 11 + 3, 4)
        assert torch.equal(resampled[-3:], table[-3:])
    assert not any("rel_pos_bias." in name or name.endswith("index") for name in found)


@torch.no_grad()
def test_prompts_have_no_positions():
    model = build("beit")
    randomise(model, 0.1)
    student = compress(model, [VPT(prompts=3)])
    images = images_for(model)
    seen: dict[str, torch.Tensor] = {}
    block = student.blocks[0]
    block.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], y=output))
    student(images)
    plain, x = model.blocks[0], seen["x"]
    prompts = block.norm1.vpt.tokens.expand(len(x), -1, -1)
    long = plain.norm1(torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1))
    attention, tokens = plain.attn, long.shape[1]
    bias = torch.zeros(1, 4, tokens, tokens)
    image = [0, *range(4, tokens)]
    bias[:, :, torch.tensor(image)[:, None], image] = attention._get_rel_pos_bias()
    qkv = attention.qkv(long) + torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    q, k, v = qkv.unflatten(2, (3, 4, 12)).permute(2, 0, 3, 1, 4)
    maps = (q @ k.mT / 12**0.5 + bias).softmax(-1)
    attended = attention.proj((maps @ v).transpose(1, 2).flatten(2))
    y = x + plain.gamma_1 * attended[:, image]
    y = y + plain.gamma_2 * plain.mlp(plain.norm2(y))
    assert torch.allclose(seen["y"], y, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (IRPE(), "is a BEiT, which has a relative position table already"),
        (VPT(deep=False), r"the arguments of its `forward_intermediates`, or vpt\.deep=true"),
    ],
    ids=["irpe", "shallow"],
)
def test_what_is_refused_and_why(spec, words):
    with pytest.raises(UserError, match=words):
        spec.plan(build("beit"))
