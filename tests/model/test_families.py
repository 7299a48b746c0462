"""Families of backbones: what each offers, and a new one that nothing else in the package knows."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.models import build, outputs
from helpers.toy import install
from torch import nn

from compressvit.artifacts.artifact import load, save
from compressvit.errors import UserError
from compressvit.model.backbone import class_in_timm, describe, family_of, supported
from compressvit.model.family import FAMILIES
from compressvit.testing import transform_checks
from compressvit.testing.models import teacher
from compressvit.transforms import TRANSFORMS, VPT, Adapters, AdaptFormer, Freeze, LoRA, LowRank, Multiplex
from compressvit.transforms.applying import compress
from compressvit.transforms.multiplex import TokenConv
from compressvit.transforms.record import compression_of

FEW = ("low_rank", "vpt", "adapters", "lora", "freeze")  # one of every kind of need


@pytest.fixture
def toys(monkeypatch):
    """Two families that nothing in the package knows."""
    install(monkeypatch)
    yield
    teacher.cache_clear()  # nor later tests


@pytest.fixture
def toy(toys) -> nn.Module:
    """A model of the one with attention."""
    return timm.create_model("toy_net")


@pytest.mark.wide_unless(lambda words: words != FEW)
@pytest.mark.parametrize(("name", "words"), [("toy", FEW[:2]), ("toy", FEW), ("toy_mixer", FEW)])
def test_a_new_family_is_under_the_contract(toys, name, words):
    checks = [check for word in words for check in transform_checks(TRANSFORMS[word]) if f"-{name}-" in check.name]
    assert len(checks) > 12 * len(words)
    refused = [check.name for check in checks if check.name.endswith("is_refused")]
    assert refused == ([] if name == "toy" else ["vpt-toy_mixer-is_refused"])
    for check in checks:
        check()


@pytest.mark.parametrize("name", ["toy", "toy_mixer"])
def test_a_new_family_is_fitted_in_order(toys, name):
    model, images = build(name), torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    made = [compress(model, [LowRank(rank=5, sequential=order)], calibration=images) for order in (False, True)]
    alone, in_order = (float((outputs(m, images) - outputs(model, images)).norm()) for m in made)
    assert in_order < 0.9 * alone  # measured 0.78


def test_a_new_family_is_adapted_saved_and_loaded(toy, tmp_path):
    images = torch.randn(2, 3, 8, 8)
    student = compress(toy, [Adapters(width=4), LoRA(rank=2)])
    assert torch.equal(student(images), toy(images))  # both start at zero
    assert {entry.path for entry in compression_of(student).ledger} >= {"trunk.0.attn", "trunk.1.mlp"}
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "adapter" in name or "lora" in name:
                parameter.normal_()
    assert not torch.allclose(student(images), toy(images))
    save(student, tmp_path / "artifact")
    assert torch.equal(load(tmp_path / "artifact")(images), student(images))


def test_what_a_new_family_does_not_offer_is_refused_by_name(toy, monkeypatch):
    refusals = {
        "multiplex needs attention whose logits it can change, and toy_net is a Toy, for which": Multiplex(share=2),
        "multiplex needs a block to which": Multiplex(share=2, head_mixing=False, mlp_conv=3),
        "adaptformer needs a block to which it can add a layer or a branch, and toy_net is a Toy, for": AdaptFormer(),
        "vpt needs to know how prompts join the tokens, and toy_net is a Toy, which does not say so": VPT(),
    }
    monkeypatch.setattr(type(FAMILIES["toy"]), "prompts", None)
    for words, spec in refusals.items():
        with pytest.raises(UserError, match=words):
            compress(toy, [spec])
    ways = {
        "sequence": r"vpt: prompts in sequence need timm ViT's `patch_embed` .*, or vpt\.deep=true, and toy_net is a Toy, which",
        "windows": "vpt: prompts in windows need timm's SwinTransformerBlock, and toy_net is a Toy, which does not have that",
    }
    for way, words in ways.items():
        monkeypatch.setattr(type(FAMILIES["toy"]), "prompts", way)
        with pytest.raises(UserError, match=words):
            compress(toy, [VPT(deep=False)])
    monkeypatch.setattr(type(FAMILIES["toy"]), "prompts", "rings")
    with pytest.raises(
        UserError,
        match=r"vpt knows how prompts join tokens in biased_sequence, sequence, windows, .* `Family.prompts` is 'rings'",
    ):
        compress(toy, [VPT()])
    assert compress(toy, [Multiplex(share=2, head_mixing=False)]) is not toy
    assert compress(toy, [Freeze(train="attention")]) is not toy


def test_messages_list_the_families_of_the_registry(toy):
    assert "Toy (toy_*)" in supported()
    assert "Toy (toy_*)" not in supported("slotted_attention")
    with pytest.raises(
        UserError,
        match=r"lors needs blocks that it knows, and resnet18 is a ResNet, of which .*; it works on timm's .*Toy \(toy_\*\)",
    ):
        describe(timm.create_model("resnet18"), "attention", asker="lors")


def test_each_family_knows_its_models():
    kinds = {name: family_of(build(name)) for name in ("vit", "deit_distilled", "swin", "convnext")}
    assert {name: kind.name for name, kind in kinds.items()} == {
        "vit": "vit",
        "deit_distilled": "vit",
        "swin": "swin",
        "convnext": "convnext",
    }
    assert family_of(timm.create_model("resnet18")) is None


def test_a_family_of_convolutions_is_asked_for_only_where_attention_is_not_needed():
    model = build("convnext")
    assert describe(model).parts == ("mlp",)
    assert describe(model, "slotted_block").blocks == describe(model).blocks
    with pytest.raises(UserError, match=r"fact needs attention, and .* whose blocks have none; it works on") as refusal:
        describe(model, "attention", asker="fact")
    assert "ConvNeXt (convnext_*" not in str(refusal.value)
    assert "methods that need no attention also on ConvNeXt (convnext_*, versions 1 and 2)" in supported()


def test_a_specialised_module_and_a_users_subclass_count_as_their_timm_class():
    class Mine(timm.models.VisionTransformer):
        """Somebody's own."""

    model = Mine(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2)
    assert family_of(model) is FAMILIES["vit"]
    student = compress(build("vit"), [Multiplex(share=2, mlp_conv=3)])
    assert class_in_timm(student.blocks[0]) is timm.models.vision_transformer.Block
    assert isinstance(student.blocks[0].mlp_conv, TokenConv)
    assert describe(student).blocks == describe(build("vit")).blocks
