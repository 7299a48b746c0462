"""Small models of every kind that the transforms work on, and what is done to them."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from compressvit.model.backbone import describe

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4, "num_classes": 5}
SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (2, 4),
    "num_heads": (2, 4),
    "window_size": 4,
    "num_classes": 5,
    "drop_path_rate": 0.0,
}

# One model of every kind that the transforms work on: name → (timm name, arguments).
BACKBONES = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "vit_no_class_token": ("vit_tiny_patch16_224", {**VIT, "class_token": False, "global_pool": "avg"}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", VIT),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", {**VIT, "init_values": 0.1}),
    "headless": ("vit_small_patch14_dinov2", {**VIT, "num_classes": 0}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
}

CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 16, 16, 32), "patch_size": 4, "num_classes": 5, "ls_init_value": 0.1}
# Further ones that only adapters work on, or that are a plain ViT to the other transforms.
ADAPTED = {
    "convnext": ("convnext_tiny", CONVNEXT),
    "convnext_conv_mlp": ("convnext_tiny", {**CONVNEXT, "conv_mlp": True}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", VIT),
}


# Everything that multiplexing can add to a block.
EVERYTHING = {"head_mixing": True, "mixing_bias": True, "mlp_conv": 3}


def build(name: str, seed: int = 0) -> torch.nn.Module:
    """A small model of `BACKBONES` or `ADAPTED`, in eval mode, with no parameter left at zero or one."""
    torch.manual_seed(seed)
    architecture, args = {**BACKBONES, **ADAPTED}[name]
    model = timm.create_model(architecture, **args)
    with torch.no_grad():  # fresh biases are zeros and norms ones, which would hide a mistake
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def images_for(model: torch.nn.Module, batch: int = 2, seed: int = 1) -> torch.Tensor:
    """Random images of the model's size."""
    size = model.patch_embed.img_size if hasattr(model, "patch_embed") else (32, 32)
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor | None = None) -> Tensor:
    """What a model makes of images; of `images_for` it, in its own precision, if none are given."""
    return model(images_for(model).to(next(model.parameters()).dtype) if images is None else images)


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
