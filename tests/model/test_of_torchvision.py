"""torchvision's transformers, built by timm's names for them."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision

from compressvit.errors import UserError
from compressvit.model.of_torchvision import NAMES, TorchvisionSwin, TorchvisionViT
from compressvit.model.weights import build


@pytest.mark.wide_unless(lambda name: name in ("torchvision_vit_b_32", "torchvision_swin_t"))
@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_torchvisions(name):
    with torch.device("meta"):
        ours = timm.create_model(name)
        theirs = torchvision.models.get_model(name.removeprefix("torchvision_"), weights=None)
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items() if "pos_embedding" not in key}
    found = {key: tensor.shape for key, tensor in ours.state_dict().items() if "pos_embedding" not in key}
    assert found == shapes
    configuration = ours.pretrained_cfg
    assert configuration["url"].startswith("https://")
    assert configuration["num_classes"] == ours.num_classes == 1000
    assert f"{configuration['classifier']}.weight" in found
    assert f"{configuration['first_conv']}.weight" in found


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_parts_make_the_whole(name):
    model = {
        "vit": lambda: TorchvisionViT(32, 8, 2, 2, 16, 32, num_classes=3),
        "swin": lambda: TorchvisionSwin([4, 4], 16, [1, 1], [2, 2], [2, 2], num_classes=3),
    }[name]().eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        hidden = model.forward_features(images)
        assert hidden.shape[-1] == model.num_features
        assert torch.equal(model.forward_head(hidden), model(images))
        model.reset_classifier(0)
        assert torch.equal(model(images), model.forward_head(hidden, pre_logits=True))
        model.reset_classifier(4)
        assert model(images).shape == (1, 4)


def test_what_torchvision_cannot_build_is_said():
    with pytest.raises(UserError, match=r"has no model 'vit_b_16'; torchvision's is 'torchvision_vit_b_16'"):
        build("vit_b_16")
    with pytest.raises(UserError, match="take 3 channels, not in_chans=1"):
        build("torchvision_swin_t", in_chans=1)
    with pytest.raises(UserError, match=r"square images, not img_size=\[64, 32\]"):
        build("torchvision_vit_b_32", img_size=(64, 32))
