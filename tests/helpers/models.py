"""The small models of the contract, and what else is done to them."""

from __future__ import annotations

import torch
from torch import nn

from compressvit.model.backbone import describe
from compressvit.testing.models import ADAPTED, BACKBONES, CONVNEXT, SWIN, VIT, build, images_for, outputs

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
    "gap",
    "images_for",
    "outputs",
    "randomise",
]

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
