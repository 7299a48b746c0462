"""Video models: their backbone is timm's ViT on tubelets, a family of its own because its tokens lie in several grids."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from compressvit.model.families.vit import ViT, in_one_stage
from compressvit.model.family import BlockInfo, Example, Need, OnBackbone, family
from compressvit.model.video.model import Video as Model
from compressvit.model.video.tubelets import TubeletEmbed, TubeletViT, inflated


@family("video")
class Video(OnBackbone):
    """No blocks of its own."""

    title = "video model"
    supports = ("video models (video) on a ViT",)
    models = (Model,)
    features = "backbone.norm"
    body_method = "forward_head"

    def lacks(self, need: Need) -> Need | None:
        """What is asked of the backbone depends on that; there is no decoder."""
        return need if need == "decoder" else None

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        assert isinstance(model, Model)
        return model.img_size

    def prefix_tokens(self, model: nn.Module) -> int:
        assert isinstance(model, Model)
        return model.backbone.num_prefix_tokens


@family("tubelets")
class Tubelets(ViT):
    """timm's ViT, whose tokens are those of several times after one another."""

    title = "ViT on tubelets"
    supports = ("the same within a video model",)
    models = (TubeletViT,)
    examples: ClassVar[Mapping[str, Example]] = {}

    def blocks(self, model: nn.Module) -> Iterator[BlockInfo]:
        embed = _embed_of(model)
        height, width = embed.grid_size
        for info in in_one_stage(model):
            yield replace(info, resolution=(embed.steps * height, width), grids=embed.steps)

    def convert(self, tensors: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        """As of an image model, whose kernel of patches is then inflated."""
        embed = _embed_of(model)
        name = "patch_embed.proj.weight"
        if tensors.get(name) is not None and tensors[name].ndim == 5:
            return tensors
        image: Any = copy.copy(model)  # timm looks at its shapes
        image._modules = {**model._modules, "patch_embed": embed.of_image()}
        found = super().convert(tensors, image)
        return {**found, name: inflated(found[name], embed.tubelet)} if name in found else found


def _embed_of(model: nn.Module) -> TubeletEmbed:
    assert isinstance(model, TubeletViT)
    embed = model.patch_embed
    assert isinstance(embed, TubeletEmbed), "`of_tubelets` gave it one"
    return embed
