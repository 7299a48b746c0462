"""Small timm models of every family that transforms work on, and what the laws compare of them."""

from __future__ import annotations

import functools
from typing import Any

import timm
import torch
from torch import Tensor, nn

from compressvit.model import ties
from compressvit.model.backbone import family_of as family_of_model
from compressvit.model.backbone import input_size

VIT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 5,
}
SWIN: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (2, 4),
    "num_heads": (2, 4),
    "window_size": 4,
    "num_classes": 5,
    "drop_path_rate": 0.0,
}

# Every kind of transformer that transforms work on: name → (timm name, arguments).
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "vit_no_class_token": ("vit_tiny_patch16_224", {**VIT, "class_token": False, "global_pool": "avg"}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", VIT),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", {**VIT, "init_values": 0.1}),
    "headless": ("vit_small_patch14_dinov2", {**VIT, "num_classes": 0}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
}

CONVNEXT: dict[str, Any] = {
    "depths": (1, 1, 2, 1),
    "dims": (8, 16, 16, 32),
    "patch_size": 4,
    "num_classes": 5,
    "ls_init_value": 0.1,
}
# Further ones that only adapters work on, or that are a plain ViT to the other transforms.
ADAPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "convnext": ("convnext_tiny", CONVNEXT),
    "convnext_conv_mlp": ("convnext_tiny", {**CONVNEXT, "conv_mlp": True}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", VIT),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A small model of `BACKBONES` or `ADAPTED`, in eval mode, with no parameter left at zero or one."""
    torch.manual_seed(seed)
    architecture, args = {**BACKBONES, **ADAPTED}[name]
    model = timm.create_model(architecture, **args)
    with torch.no_grad():  # fresh biases are zeros and norms ones, which would hide a mistake
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


@functools.cache
def teacher(name: str) -> nn.Module:
    """`build(name)`, made once and not to be changed; the laws say which transform did."""
    return build(name)


def family_of(name: str) -> str:
    """The word of a small model's family."""
    family = family_of_model(teacher(name))
    assert family is not None, f"{name} is of no family"
    return family.name


def images_for(model: nn.Module, batch: int = 2, seed: int = 1) -> Tensor:
    """Random images of the model's size; 32 × 32 where it takes any."""
    size = input_size(model)[1:] if hasattr(model, "patch_embed") else (32, 32)
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor | None = None) -> Tensor:
    """The output of a model for images; for `images_for` it, in its own precision, if none are given."""
    return model(images_for(model).to(next(model.parameters()).dtype) if images is None else images)


def structure(model: nn.Module) -> dict[str, object]:
    """Everything about a model but its values."""
    return {
        "modules": [(path, type(module)) for path, module in model.named_modules()],
        "tensors": {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()},
        "ties": ties.tied_groups(model),
    }


def values(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor, by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_values(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
