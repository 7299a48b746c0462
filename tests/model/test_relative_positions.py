"""timm's BEiT and ViT with relative positions: positions of all blocks, of either kind, prompts without any, files, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from helpers.models import build, images_for, outputs, randomise
from torch import nn

from compressvit.errors import UserError
from compressvit.model import surgery
from compressvit.model.backbone import describe
from compressvit.model.families.beit import SMALL as BEIT
from compressvit.model.families.vit_relpos import SMALL as RELPOS
from compressvit.model.positions import resample_positions
from compressvit.transforms import IRPE, VPT, Align, Multiplex, Narrow, Quantise, Shrink
from compressvit.transforms.applying import compress
from compressvit.transforms.record import compression_of

BOTH = {"use_shared_rel_pos_bias": True, "swiglu_mlp": True, "init_values": None}
BEIT_SHARED = {**BOTH, "use_rel_pos_bias": False}
TABLE = {"rel_pos_type": "bias", "class_token": True, "qkv_bias": True}
KINDS = {
    "shared": ("beit_base_patch16_224", {**BEIT, **BEIT_SHARED}),
    "both": ("beit_base_patch16_224", {**BEIT, **BOTH}),
    "network_shared": ("vit_srelpos_small_patch16_224", RELPOS),
    "table": ("vit_relpos_small_patch16_224", {**RELPOS, **TABLE}),
    "post_norm": ("vit_relpos_base_patch16_rpn_224", RELPOS),
    "cosine_network": ("vit_relpos_medium_patch16_cls_224", {**RELPOS, "rel_pos_type": "mlp-swin", "qk_norm": True}),
}


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    name, args = KINDS[kind]
    model = timm.create_model(name, **args).eval()
    randomise(model, 0.1)
    return model


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "post_norm"])
@torch.no_grad()
def test_blocks_with_empty_slots_are_timms(kind):
    model = made(kind)
    before = outputs(model)
    backbone = describe(model, "slotted_attention", "slotted_block")
    for info in backbone.blocks:
        surgery.specialise(model, info.path, backbone.slotted_block)
        attention = model.get_submodule(f"{info.path}.attn")
        surgery.specialise(model, f"{info.path}.attn", backbone.slotted_attention(attention))
    for fused in (True, False):
        for info in backbone.blocks:
            model.get_submodule(f"{info.path}.attn").fused_attn = fused
        assert (outputs(model) - before).abs().max() < 1e-5 * before.abs().max()  # measured 1e-6


@pytest.mark.wide_unless(lambda kind: kind == "network_shared")
@pytest.mark.parametrize("kind", ["shared", "network_shared"])
def test_heads_with_positions_of_all_blocks_stay(kind):
    model = made(kind)
    images = images_for(model, 2)
    student = compress(model, [Shrink(budget={"parameters": 0.7}, multiple=4, metric="weights")])
    forms = compression_of(student).plans[0].forms.values()
    assert any(form.neurons or form.ranks for form in forms)
    assert not any(form.heads or form.head_dim for form in forms)
    assert outputs(student, images).isfinite().all()
    with pytest.raises(UserError, match=r"has no heads that can be removed: it has heads, wh.* outside of them; leave"):
        Narrow(heads=2).plan(model)
    with pytest.raises(UserError, match=r"cannot permute the heads of .*align\.heads=false"):
        Align(share=2).plan(model)
    mixed = compress(model, [Multiplex(share=2)])
    assert outputs(mixed, images).isfinite().all()


@torch.no_grad()
def test_heads_take_their_column_of_a_table():
    model: Any = made("table")
    for block in model.blocks:
        block.attn.proj.weight[:, :24] *= 1e-4
    images = images_for(model, 48)
    student: Any = compress(model, [Narrow(heads=2, sequential=False)], images)
    assert (outputs(student) - outputs(model)).norm() < 1e-3 * outputs(model).norm()  # measured 2e-5
    tables = [m.blocks[1].attn.rel_pos.relative_position_bias_table for m in (student, model)]
    assert torch.equal(tables[0], tables[1][:, 2:])


@torch.no_grad()
def test_official_pretraining_of_beit_gives_every_block_its_own_table():
    """As the fine-tuning of the official code does."""
    pretrained: Any = made("shared")
    model = timm.create_model("beit_base_patch16_224", **{**BEIT, "img_size": 48})
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


def test_a_network_of_distances_is_rounded_by_itself():
    """Its inputs are not of the images, also where there are as many distances as could be (15 × 15)."""
    name, args = KINDS["cosine_network"]
    model = timm.create_model(name, **{**args, "img_size": 64, "rel_pos_dim": 512}).eval()
    spec = Quantise(bits=4, group=16, sequential=False)
    rounded = compression_of(compress(model, [spec], images_for(model, 4))).ledger
    assert sum("rel_pos.mlp" in entry.path for entry in rounded) == 8


def bias_of(attention: Any) -> torch.Tensor:
    own = attention._get_rel_pos_bias if hasattr(attention, "_get_rel_pos_bias") else attention.rel_pos.get_bias
    return own()


@pytest.mark.parametrize("multiplexed", [False, True])
@pytest.mark.parametrize("name", ["beit", "vit_relpos"])
@torch.no_grad()
def test_prompts_have_no_positions(name, multiplexed):
    model: Any = build(name)
    randomise(model, 0.1)
    student: Any = compress(model, [*([Multiplex(share=1)] if multiplexed else []), VPT(prompts=3)])
    seen: dict[str, torch.Tensor] = {}
    block, plain = student.blocks[0], model.blocks[0]
    block.norm1.register_forward_hook(lambda _, inputs, output: seen.update(long=output))
    block.attn.register_forward_hook(lambda _, inputs, output: seen.update(attended=output))
    student(images_for(model))
    long, attention, prefix = seen["long"], plain.attn, model.num_prefix_tokens
    tokens = long.shape[1]
    assert torch.equal(long[0, prefix : prefix + 3], plain.norm1(block.norm1.vpt.tokens))
    bias = torch.zeros(1, 4, tokens, tokens)
    image = [*range(prefix), *range(prefix + 3, tokens)]
    bias[:, :, torch.tensor(image)[:, None], image] = bias_of(attention)
    qkv = attention.qkv(long)
    if name == "beit":
        qkv = qkv + torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    q, k, v = qkv.unflatten(2, (3, 4, 12)).permute(2, 0, 3, 1, 4)
    maps = (q @ k.mT / 12**0.5 + bias).softmax(-1)
    attended = attention.proj((maps @ v).transpose(1, 2).flatten(2))
    assert torch.allclose(seen["attended"], attended[:, image], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "spec", "words"),
    [
        ("both", IRPE(), "is a BEiT, which has a relative position table already"),
        ("table", IRPE(), "is a ViT with relative positions, which has a relative position table already"),
        ("both", VPT(deep=False), r"the arguments of its `forward_intermediates`, or vpt\.deep=true"),
        ("table", VPT(deep=False), r"the arguments of its `forward_intermediates`, or vpt\.deep=true"),
        ("post_norm", Multiplex(share=2), r"blocks\.0 is a ResPostRelPosBlock, compressvit knows RelPosBlock there"),
        ("cosine_network", Narrow(head_dim=8), "has no head dimensions that can be removed"),
    ],
)
def test_what_is_refused_and_why(kind, spec, words):
    with pytest.raises(UserError, match=words):
        spec.plan(made(kind))
