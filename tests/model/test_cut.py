"""Where models are cut: what is after the cut gives the outputs of the whole model, and depends on the features alone."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
from torch import nn

from compressvit.errors import UserError
from compressvit.model.backbone import input_size
from compressvit.model.cut import Cut, cut_of
from compressvit.model.families.adamixer import SMALL
from compressvit.model.outputs import in_one
from compressvit.model.weights import build
from compressvit.testing import models

VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}
SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "window_size": 2, "drop_path_rate": 0.0}
ON_A_BACKBONE = {
    "adamixer": SMALL,
    "segmenter": {"backbone": "vit_tiny_patch16_224", "backbone_args": VIT, "img_size": 32, "num_classes": 3},
    "video": {"backbone": "vit_tiny_patch16_224", "backbone_args": VIT, "img_size": 32, "frames": 4},
    "faster_rcnn": {
        "backbone": "swin_tiny_patch4_window7_224",
        "backbone_args": SWIN,
        "img_size": 64,
        "num_classes": 3,
        "channels": 16,
        "representation": 32,
    },
}
OTHERS = {
    "resnet": ("resnet10t", {}),
    "pooled by attention": ("vit_tiny_patch16_224", {**VIT, "img_size": 32, "global_pool": "map"}),
    "a convolution as classifier": ("mobilenetv3_small_050", {}),
    "a norm before the classifier": ("efficientvit_m0", {}),  # after what it gives with pre_logits
    "a classifier of the tokens beside it": ("volo_d1_224", {}),
}
CLASSIFIERS = [name for name in models.examples() if name not in (*ON_A_BACKBONE, "headless")]
NAMES = [*ON_A_BACKBONE, *OTHERS, *CLASSIFIERS]


@functools.cache
def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in OTHERS:
        kind, args = OTHERS[name]
        return timm.create_model(kind, num_classes=5, **args).eval()
    return (build(name, ON_A_BACKBONE[name]) if name in ON_A_BACKBONE else models.build(name)).eval()


@torch.no_grad()
def outputs(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return in_one(model(images))


@pytest.mark.wide_unless(
    lambda name: name in (*ON_A_BACKBONE, *OTHERS, "vit", "deit_distilled", "swin", "convnext") and "tokens" not in name
)
@pytest.mark.parametrize("name", NAMES)
def test_the_rest_of_a_model_gives_its_outputs_from_the_features_alone(name):
    model, kept = model_of(name), []
    images, others = torch.randn(2, 2, *input_size(model), generator=torch.Generator().manual_seed(1))
    expected = outputs(model, images)
    cut = cut_of(model)

    def keep(given, compute):
        kept.append(compute(given))
        return kept[-1]

    with cut.through(model, keep):
        assert torch.equal(outputs(model, images), expected)
    assert len(kept) == 1
    with cut.through(model, lambda given, compute: kept[0]):
        assert torch.equal(outputs(model, others), expected)
    again = outputs(model, others)
    assert not torch.equal(again, expected)  # it computes them again


def test_what_is_before_a_cut_is_all_but_the_head():
    vit, detector = model_of("vit"), model_of("adamixer")
    assert cut_of(vit) == Cut("", "forward_head")
    assert set(dict(vit.named_modules())) - set(cut_of(vit).before(vit)) == {"head"}
    assert set(cut_of(detector).before(detector)) == {
        path for path, _ in detector.named_modules() if path.split(".")[0] == "backbone"
    }
    assert cut_of(model_of("deit_distilled")).method == "forward_features"  # two classifiers, of two tokens
    assert cut_of(model_of("video")) == Cut("backbone", "forward_head")


def test_methods_that_somebody_else_has_replaced_come_back():
    model = model_of("resnet")
    model.forward_features = replaced = model.forward_features
    with cut_of(model).through(model, lambda images, compute: compute(images)):
        assert model.forward_features is not replaced
    assert vars(model).pop("forward_features") is replaced
    assert "forward_head" not in vars(model)


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Linear(2, 2)), models.build("headless")], ids=["linear", "headless"]
)
def test_a_model_without_a_cut_is_refused(model):
    with pytest.raises(UserError, match=r"cache keeps what a backbone gives, .* has neither; leave cache out"):
        cut_of(model)
