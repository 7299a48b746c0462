"""Small models for every test; torch on one thread, so that tests run side by side do not fight for cores."""

from __future__ import annotations

import pytest
import timm
import torch

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


def build(name: str, seed: int = 0) -> torch.nn.Module:
    """A small model of `BACKBONES`, in eval mode, with no parameter left at zero or one."""
    torch.manual_seed(seed)
    architecture, args = BACKBONES[name]
    model = timm.create_model(architecture, **args)
    with torch.no_grad():  # fresh biases are zeros and norms ones, which would hide a mistake
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def images_for(model: torch.nn.Module, batch: int = 2, seed: int = 1) -> torch.Tensor:
    """Random images of the model's size."""
    size = model.patch_embed.img_size
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=BACKBONES)
def backbone(request) -> torch.nn.Module:
    """Every kind of model in turn."""
    return build(request.param)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
