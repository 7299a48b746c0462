"""Segmenters: their heads by hand, the backbones that fit, and that transforms work on the backbone inside as on any."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from compressvit.artifacts import artifact
from compressvit.artifacts.adapter import load_adapter, save_adapter
from compressvit.artifacts.merge import merged_copy
from compressvit.errors import UserError
from compressvit.model.backbone import describe, family_of
from compressvit.model.ties import count_parameters
from compressvit.model.weights import build, classes_in_file, load_file
from compressvit.testing.cases import examples_of
from compressvit.training.terms import build_terms
from compressvit.training.terms.base import Batch
from compressvit.training.terms.section import losses_section
from compressvit.transforms import TRANSFORMS
from compressvit.transforms.applying import compress
from compressvit.transforms.record import compression_of, only_adapted

VIT = {
    "backbone": "vit_tiny_patch16_224",
    "backbone_args": {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8},
}
SWIN = {
    "backbone": "swin_tiny_patch4_window7_224",
    "backbone_args": {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2), "window_size": 2},
}
SMALL = {**VIT, "img_size": 32, "num_classes": 4, "channels": 8}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def segmenter(**options):
    """A small one whose classifier, which begins near zero, has values like any other layer."""
    torch.manual_seed(0)
    model = build("segmenter", SMALL | options).eval()
    with torch.no_grad():
        model.head.classifier.weight.normal_()
    return model


@pytest.mark.parametrize("head", ["linear", "naive", "pup"])
@pytest.mark.parametrize(
    "backbone",
    [
        VIT,
        {**SWIN, "img_size": 64},
        {"backbone": "convnext_atto", "backbone_args": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}, "img_size": 64},
        {"backbone": "resnet18", "backbone_args": {}},
        {
            "backbone": "vit_small_patch14_dinov2",
            "backbone_args": {"embed_dim": 32, "depth": 1, "num_heads": 2},
            "img_size": 28,
        },
    ],
    ids=["vit", "swin", "convnext", "resnet", "dinov2"],
)
def test_every_pixel_has_logits(head, backbone):
    model = segmenter(head=head, **backbone)
    height, width = model.img_size
    assert model(torch.randn(2, 3, height, width)).shape == (2, 4, height, width)
    assert model.pretrained_cfg["mean"] == model.backbone.pretrained_cfg["mean"]


def test_a_linear_head_is_a_layer_at_every_token():
    model = segmenter(head="linear")
    tokens = model.backbone.forward_features(IMAGES)[:, 1:]
    weight, bias = model.head.classifier.weight[:, :, 0, 0], model.head.classifier.bias
    expected = (tokens @ weight.mT + bias).mT.unflatten(2, (4, 4))
    expected = F.interpolate(expected, (32, 32), mode="bilinear")
    assert torch.allclose(model(IMAGES), expected, atol=1e-5)  # measured 2.9e-6


def test_counts_of_the_heads_are_those_of_setr():
    """ViT-L of 1024 channels on ADE20K, as mmsegmentation builds SETR's decode heads but for their own norm."""
    args = {"backbone": "vit_large_patch16_384", "img_size": 512, "num_classes": 150, "channels": 256}
    counts = {
        head: count_parameters(build("segmenter", args, head=head, device="meta").head)
        for head in ("linear", "naive", "pup")
    }
    classifier, norm = 256 * 150 + 150, 2 * 256
    assert counts == {
        "linear": 1024 * 150 + 150,
        "naive": 1024 * 256 + norm + classifier,
        "pup": 9 * 1024 * 256 + 3 * 9 * 256 * 256 + 4 * norm + classifier,
    }


def test_pup_doubles_four_times():
    model = segmenter(head="pup")
    assert model.head.layers(torch.randn(1, 32, 3, 5)).shape == (1, 8, 48, 80)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"head": "pop"}, r"segmenter: head='pop' is none that it has; did you mean 'pup'\?"),
        ({"img_size": 30}, "images of 30×30 do not divide by the largest stride of the maps, 8"),
        ({"backbone": "torchvision_vit_b_16", "backbone_args": {}}, "torchvision_vit_b_16 gives no feature maps"),
        ({"backbone": "vit_tinny_patch16_224"}, "did you mean 'vit_tiny_patch16_224'"),
        ({"backbone_args": {"num_classes": 3}}, "a backbone has no classifier; leave it out"),
    ],
)
def test_what_cannot_be_built_is_refused(options, text):
    with pytest.raises(UserError, match=text):
        build("segmenter", SMALL | options)


def test_what_freezes_the_backbone_trains_the_whole_head():
    student = compress(segmenter(head="pup"), [TRANSFORMS["repadapter"](width=8)])
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert {name for name, _ in student.named_parameters() if name.startswith("head.")} < trained
    assert all(".repadapter." in name or name.startswith("head.") for name in trained)


def test_a_new_classifier():
    model = segmenter(head="naive")
    model.reset_classifier(7)
    assert model(IMAGES).shape == (2, 7, 32, 32)
    assert model.num_classes == 7
    with pytest.raises(UserError, match="at least one class"):
        model.reset_classifier(0)


def test_a_file_of_other_classes_gives_all_but_the_classifier(tmp_path):
    trained = segmenter(head="pup", num_classes=6)
    save_file(trained.state_dict(), tmp_path / "six.safetensors")
    model = segmenter(head="pup")
    before = model.head.classifier.weight.clone()
    with torch.no_grad():
        model.head.layers[0].weight.zero_()
    assert classes_in_file(model, tmp_path / "six.safetensors", "the model") == 6
    with pytest.raises(
        UserError, match="has a classifier of 6 classes and the model one of 4; set num_classes=6 beside it"
    ):
        load_file(model, tmp_path / "six.safetensors", "teacher.weights")
    load_file(model, tmp_path / "six.safetensors", "teacher.weights", new_head=True)
    assert torch.equal(model.head.layers[0].weight, trained.head.layers[0].weight)
    assert torch.equal(model.head.classifier.weight, before)


def test_the_backbone_inside_is_described():
    assert [info.path for info in describe(segmenter()).blocks] == ["backbone.blocks.0", "backbone.blocks.1"]
    with pytest.raises(UserError, match="segmenter"):
        describe(segmenter(), "prompts")


# ------------------------------------------------------------------------------------------------------------ transforms

SPECS = {
    name: examples_of(kind)[0]
    for name, kind in TRANSFORMS.items()
    if name not in ("vpt", "adaptive_lors", "head_norm", "load_weights")  # refused, and what needs a file
}


@pytest.mark.wide_unless(
    lambda name: name in ("repadapter", "lora", "adaptformer", "low_rank", "narrow", "multiplex", "shrink")
)
@pytest.mark.parametrize("name", SPECS)
def test_transforms_work_on_the_backbone_inside(name, tmp_path):
    """Compressed, saved, loaded, and as an adapter's file on the plain model."""
    teacher = segmenter(head="naive")
    student = compress(teacher, [SPECS[name]])
    student.train()(IMAGES)  # changes the statistics of the head's batch norm
    student.eval()
    assert compression_of(student).plans[0].transform == name
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    expected = student(IMAGES)
    assert not torch.allclose(expected, teacher(IMAGES), atol=1e-3)
    loaded = artifact.load(artifact.save(student, tmp_path / "student"))
    assert torch.equal(loaded(IMAGES), expected)
    if only_adapted(student):
        plain = segmenter(head="naive")
        load_adapter(plain, save_adapter(student, tmp_path / "adapter.safetensors"))
        assert torch.equal(plain(IMAGES), expected)


@pytest.mark.parametrize(("name", "backbone"), [("repadapter", VIT), ("lora", VIT), ("repadapter", SWIN)], ids=str)
def test_adapters_are_merged_to_plain_layers(name, backbone):
    """Settings as in RepAdapter's segmentation."""
    settings = {"width": 8, "scale": 1.0} if name == "repadapter" else {"rank": 4}
    teacher = segmenter(**backbone, head="naive", img_size=64)
    student = compress(teacher, [TRANSFORMS[name](**settings)]).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    merged = merged_copy(student)
    images = torch.randn(2, 3, 64, 64)
    assert not compression_of(merged).plans
    assert count_parameters(merged) == count_parameters(teacher)
    difference = (merged(images) - student(images)).abs().max() / student(images).abs().max()
    assert difference < 1e-5  # measured 5.0e-7
    assert (student(images) - teacher(images)).abs().max() / student(images).abs().max() > 0.01


# ----------------------------------------------------------------------------------------------------------- distillation


def test_features_are_the_last_map():
    teacher = segmenter(head="pup")
    (term,) = build_terms(
        losses_section()(
            prediction={"weight": 0},
            attention_relation={"weight": 0},
            hidden_relation={"weight": 0},
            feature={"weight": 1.0, "form": "mse"},
        ),
        [],
        classes=4,
        task=None,
        features=family_of(teacher).features,
    )
    seen: dict = {}
    teacher.maps.register_forward_hook(lambda module, given, output: seen.update(maps={"output": output}))
    teacher(IMAGES)
    assert [found.shape for found in seen["maps"]["output"]] == [(2, 32, 4, 4)]
    other = {"maps": {"output": [found + 0.5 for found in seen["maps"]["output"]]}}
    batch = Batch(
        student_taps=seen, teacher_taps=other, **dict.fromkeys(("student_logits", "teacher_logits", "targets"))
    )
    assert term.function(batch)[0].item() == pytest.approx(0.25, rel=1e-4)
