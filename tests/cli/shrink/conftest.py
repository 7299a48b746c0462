"""A model and images for `compressvit shrink`."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.images import class_folders, jpeg
from helpers.shrink import CLASSES
from helpers.training import tiny_vit
from safetensors.torch import save_file
from timm.models import _registry, model_entrypoint

import compressvit
from compressvit.runs import shrink as verb


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    """Images are read here, where they are a few."""
    built = verb.shrink_recipe

    def without_workers(*words, **options):
        recipe = built(*words, **options)
        recipe["data"]["num_workers"] = 0
        return recipe

    monkeypatch.setattr(verb, "shrink_recipe", without_workers)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(20):
        (folder / f"{chr(97 + i)}.jpg").write_bytes(jpeg(i))
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("labelled"), classes=CLASSES, each=3)


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    """A weights file without a classifier, of two blocks of timm's smallest ViT, for images of 32×32 pixels."""
    whole = model_entrypoint("test_vit")

    def shallow(pretrained=False, **args):
        return whole(pretrained, **{"depth": 2, **args})

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_registry._model_entrypoints, "test_vit", shallow)
        yield _written(tmp_path_factory.mktemp("weights") / "backbone.safetensors")


def _written(file):
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", img_size=32, num_classes=0).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """An artifact of a model with as many classes as `labelled`."""
    return compressvit.save(tiny_vit(num_classes=len(CLASSES)), tmp_path_factory.mktemp("artifact") / "teacher")
