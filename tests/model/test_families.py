"""Families of backbones: what each offers, and a new one that nothing else in the package knows."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.models import build
from timm.models import register_model
from torch import nn

from compressvit.artifacts.artifact import load, save
from compressvit.errors import UserError
from compressvit.model import family as families
from compressvit.model.backbone import class_in_timm, describe, family_of, supported
from compressvit.model.family import FAMILIES, BlockInfo, Family
from compressvit.transforms import VPT, Adapters, AdaptFormer, Freeze, LoRA, Multiplex
from compressvit.transforms.applying import compress
from compressvit.transforms.multiplex import TokenConv
from compressvit.transforms.record import compression_of


class ToyAttention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).reshape(batch, tokens, width))


class ToyMlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x).relu())


class ToyBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attn, self.mlp = ToyAttention(width, 2), ToyMlp(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Toy(nn.Module):
    def __init__(self, width: int = 8, depth: int = 2, num_classes: int = 3, **_):
        super().__init__()
        self.num_classes = num_classes
        self.pretrained_cfg = {"architecture": "toy_net", "input_size": (3, 8, 8)}
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.trunk = nn.Sequential(*(ToyBlock(width) for _ in range(depth)))
        self.head = nn.Linear(width, num_classes)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(self.stem(x).flatten(2).mT).mean(1))


@pytest.fixture
def toy(monkeypatch):
    """A toy model that timm builds by name, and its family; both are forgotten afterwards."""
    tables = timm.models._registry
    for name in ("_model_to_module", "_model_entrypoints", "_module_to_models"):
        monkeypatch.setattr(tables, name, getattr(tables, name).copy())

    def toy_net(pretrained: bool = False, **kwargs) -> Toy:
        return Toy(**{k: v for k, v in kwargs.items() if k in ("width", "depth", "num_classes")})

    register_model(toy_net)
    len(FAMILIES)  # found, so that what is added below can be taken out again
    for table in ("_entries", "_modules"):
        monkeypatch.setattr(FAMILIES, table, dict(getattr(FAMILIES, table)))

    @families.family("toy")
    class ToyFamily(Family):
        title = "Toy"
        supports = ("Toy (toy_*)",)
        models = (Toy,)
        block, attention = ToyBlock, ToyAttention

        def blocks(self, model):
            for i, block in enumerate(model.trunk):
                yield BlockInfo(f"trunk.{i}", i, 0, model.head.in_features, block.attn.num_heads, (2, 2))

    return timm.create_model("toy_net")


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


def test_what_a_new_family_does_not_offer_is_refused_by_name(toy):
    refusals = {
        "multiplex needs attention whose logits it can change, and toy_net is a Toy, for which": Multiplex(share=2),
        "multiplex needs a block to which": Multiplex(share=2, head_mixing=False, mlp_conv=3),
        "adaptformer needs a block to which it can add a layer or a branch, and toy_net is a Toy, for": AdaptFormer(),
        "vpt needs to know how prompts join the tokens, and toy_net is a Toy, which does not say so": VPT(),
    }
    for words, spec in refusals.items():
        with pytest.raises(UserError, match=words):
            compress(toy, [spec])
    assert compress(toy, [Multiplex(share=2, head_mixing=False)]) is not toy
    assert compress(toy, [Freeze(train="attention")]) is not toy


def test_messages_list_the_families_of_the_registry(toy):
    assert "Toy (toy_*)" in supported()
    assert "Toy (toy_*)" not in supported("slotted_attention")
    with pytest.raises(
        UserError, match=r"resnet18 is a ResNet, .* cannot transform yet; it works on timm's .*Toy \(toy_\*\)"
    ):
        describe(timm.create_model("resnet18"))


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
