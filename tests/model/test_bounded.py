"""Arguments of a model that a file gives are checked before timm builds anything from them; models are built without values."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from compressvit.errors import UserError
from compressvit.model.bounded import TooMany, counted, on_meta, require_sound
from compressvit.model.weights import build
from compressvit.testing.models import examples


@pytest.mark.parametrize(
    ("args", "fault"),
    [
        ({"drop_rate": float("nan")}, "drop_rate is nan, which is no number"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio is inf, which is no number"),
        ({"depths": [2, 10**12]}, "depths is 1,000,000,000,000, and at most 1,048,576 is taken"),
        ({"x": {"depth": (1, -(2**21))}}, "x is -2,097,152, and at most"),
        ({"num_heads": [2, -2]}, "num_heads is -2, and no size is negative"),
        ({"embed_dim": -1}, "no size is negative"),
        ({"patch_size": -1}, "no size is negative"),
        ({"num_classes": -1}, "no size is negative"),
        ({"in_chans": -3}, "no size is negative"),
        ({"num_heads": True}, "num_heads is true, and is to be a number"),
        ({"depths": [2, False]}, "depths is false, and is to be a number"),
        ({"pretrained": True}, "would read another file"),
        ({"pretrained_cfg_overlay": {}}, "would read another file"),
        ({"checkpoint_path": ""}, "would read another file"),
        ({"cache_dir": "x"}, "would read another file"),
    ],
)
def test_arguments_that_are_refused(args, fault):
    with pytest.raises(ValueError, match=fault):
        require_sound(args)


@pytest.mark.parametrize("device", [None, "meta"])
def test_arguments_of_a_recipe_are_checked(device, tmp_path):
    """Those of teacher and student: `checkpoint_path` would load a file that the recipe's `weights` does not name."""
    with pytest.raises(UserError, match=r"timm cannot build vit_tiny_patch16_224 with .*would read another file"):
        build("vit_tiny_patch16_224", device=device, checkpoint_path=str(tmp_path / "w.pth"))
    with pytest.raises(UserError, match=r"no size is negative"):
        build("vit_tiny_patch16_224", device=device, num_heads=-3)
    for name in ("name", "device", "given", "model_name"):  # as those of functions that they pass through
        with pytest.raises(UserError, match=rf"timm cannot build vit_tiny_patch16_224 with {name}='x'"):
            build("vit_tiny_patch16_224", {name: "x"}, device=device)


def test_arguments_that_are_taken():
    require_sound({"img_size": [224, 224], "drop_rate": 0.1, "init_values": -1e-5, "act_layer": "gelu", "x": None})
    require_sound({"num_classes": 2**20, "class_token": False, "x": {"y": [1, {"z": 2}]}, "global_pool": ""})


def _zeros(count):
    for _ in range(count):
        torch.zeros(1)


def test_calls_are_counted():
    with counted(3):
        _zeros(3)
    with pytest.raises(TooMany, match="more than 3 calls"), counted(3):
        _zeros(4)
    with on_meta():
        assert torch.zeros(10**15).is_meta


@pytest.mark.wide_unless(lambda name: name in ("vit", "swin", "convnext", "adamixer"))
@pytest.mark.parametrize("name", examples())
def test_a_model_without_values_is_the_model_without_its_values(name):
    example = examples()[name]
    with torch.device("meta"):
        plain = timm.create_model(example.model, **example.args)
    with on_meta():
        model = timm.create_model(example.model, **example.args)
    for mine, other in ((model.parameters(), plain.parameters()), (model.buffers(), plain.buffers())):
        described = [
            [(t.shape, t.stride(), t.dtype, t.device, t.requires_grad, type(t)) for t in ts] for ts in (mine, other)
        ]
        assert described[0] == described[1]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_what_has_values_is_filled_all_the_same():
    with on_meta():
        weight = torch.zeros(3, device="cpu")
        weight.add_(2).mul_(3)
        nn.init.constant_(bias := torch.zeros(2, device="cpu"), 4.0)
    assert weight.tolist() == [6, 6, 6]
    assert bias.tolist() == [4, 4]


def test_calls_that_are_skipped_are_counted():
    def fill():
        for _ in range(30):
            torch.Tensor.zero_(torch.empty(1))

    with pytest.raises(TooMany), on_meta(40):
        fill()
    with on_meta(60):
        fill()
