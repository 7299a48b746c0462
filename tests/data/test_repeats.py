"""Repeated augmentation, and how an image becomes a square in evaluation."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from compressvit.artifacts import artifact
from compressvit.data.image_transform import image_transform
from compressvit.data.input import input_config
from compressvit.data.opening import open_data
from compressvit.data.order import Order
from compressvit.data.spec import Data
from compressvit.errors import UserError

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(("count", "repeats"), [(12, 3), (10, 3), (7, 1), (4, 9)])
def test_an_epoch_has_a_part_of_the_images_so_many_times(count, repeats):
    """As timm's RepeatAugSampler: every index is repeated, and an epoch is as long as the set."""
    order = Order(count, True, False, repeats)
    torch.manual_seed(0)
    order.draw()
    drawn = list(order)
    assert len(drawn) == len(order) == count
    times = Counter(index for index, _ in drawn)
    assert len(times) == -(-count // repeats)
    assert sorted(times.values())[1:] == [repeats] * (len(times) - 1)  # the last one may be cut short
    assert len({seed for _, seed in drawn}) == count  # every copy is augmented in its own way
    order.draw()
    assert [index for index, _ in order] != [index for index, _ in drawn] or count == 4


def test_streams_cannot_repeat():
    with pytest.raises(UserError, match=r"data\.augment\.repeats=3: wds/imagenet streams its images"):
        open_data(Data(name="wds/imagenet", root="nowhere", num_classes=3, augment={"repeats": 3}))


def test_squash_keeps_the_borders_and_is_recorded(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **VIT)
    picture = Image.fromarray(np.zeros((20, 60, 3), dtype=np.uint8))
    picture.paste((255, 255, 255), (0, 0, 10, 20))  # at the left border, which a centre crop loses
    seen = {}
    for mode in ("center", "squash"):
        config = input_config(model, Data(name="folder", crop_mode=mode, crop_pct=1.0))
        seen[mode] = torch.as_tensor(np.asarray(image_transform(config, None)(picture)))
        assert config.as_dict()["crop_mode"] == mode
    assert seen["center"].shape == seen["squash"].shape
    assert seen["center"].float().max() < seen["squash"].float().max()
    loaded = artifact.load(artifact.save(model, tmp_path / "model", input_config=config.as_dict()))
    assert input_config(loaded, Data(name="folder")).crop_mode == "squash"
    assert input_config(model, Data(name="folder")).crop_mode == "center"
