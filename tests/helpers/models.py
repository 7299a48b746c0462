"""The small models of the contract, and what else is done to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compressvit.model.backbone import describe
from compressvit.model.families.convnext import SMALL as CONVNEXT
from compressvit.model.families.swin import SMALL as SWIN
from compressvit.model.families.vit import SMALL as VIT
from compressvit.testing.cases import tried_on
from compressvit.testing.models import build, examples, family_of, images_for, outputs

__all__ = [
    "ADAPTED",
    "BACKBONES",
    "CONVNEXT",
    "EVERYTHING",
    "SWIN",
    "VIT",
    "blocks_of",
    "build",
    "equal_within_stages",
    "family_of",
    "gap",
    "images_for",
    "outputs",
    "randomise",
]

# Every kind of transformer with blocks of one shape in every stage: name → (timm name, arguments).
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (examples()[name].model, dict(examples()[name].args))
    for name in tried_on(freezes=False)
    if family_of(name).attention is not None and not family_of(name).widens
}
# Further ones that have no attention, are a plain ViT to most methods, or have blocks of other shapes.
ADAPTED = {name: (example.model, dict(example.args)) for name, example in examples().items() if name not in BACKBONES}

# Everything that multiplexing can add to a block.
EVERYTHING = {"head_mixing": True, "mixing_bias": True, "mlp_conv": 3}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(info.path) for info in describe(model).blocks]


@torch.no_grad()
def randomise(module: nn.Module, scale: float = 0.2, seed: int = 4) -> None:
    """Move every parameter, so that nothing is zero, one, or the identity."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


@torch.no_grad()
def equal_within_stages(model: nn.Module) -> nn.Module:
    """Give all blocks of a stage the attention and MLP of its first; norms and LayerScale stay their own."""
    for stage in describe(model).stages:
        first = model.get_submodule(stage[0].path)
        for info in stage[1:]:
            block = model.get_submodule(info.path)
            block.attn.load_state_dict(first.attn.state_dict())
            block.mlp.load_state_dict(first.mlp.state_dict())
    return model


@torch.no_grad()
def gap(a: nn.Module, b: nn.Module) -> float:
    images = images_for(a)
    return (a(images) - b(images)).abs().max().item()
