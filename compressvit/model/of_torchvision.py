"""torchvision's vision transformers, as timm builds and describes models: `torchvision_vit_b_16`, `torchvision_swin_t` and the others.

Modules and tensors keep torchvision's names, so that its files of weights fit. They are of no family (`families/generic.py`).

    timm.create_model("torchvision_vit_b_16", pretrained=True)

Shapes: B images, N tokens, C width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg, register_model
from torch import nn
from torchvision.models import get_model_builder, get_model_weights
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

VITS = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")
SWINS = ("swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_s", "swin_v2_b")
NAMES = tuple(f"torchvision_{name}" for name in (*VITS, *SWINS))


class TorchvisionViT(VisionTransformer):
    """torchvision's `VisionTransformer` with timm's methods."""

    num_prefix_tokens = 1  # the class token

    @property
    def num_features(self) -> int:
        return self.hidden_dim

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) to tokens (B, N, C) after the final norm, the class token first."""
        patches = self._process_input(x)
        return self.encoder(torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens (B, N, C) to logits (B, classes), or with `pre_logits` to the class token (B, C)."""
        return x[:, 0] if pre_logits else self.heads(x[:, 0])

    def get_classifier(self) -> nn.Module:
        return self.heads[-1]

    def reset_classifier(self, num_classes: int) -> None:
        """A newly initialised classifier; 0 classes removes it."""
        self.num_classes = num_classes
        self.heads[-1] = _classifier(self.hidden_dim, num_classes, self.class_token)


class TorchvisionSwin(SwinTransformer):
    """torchvision's `SwinTransformer`, version 1 or 2, with timm's methods."""

    @property
    def num_features(self) -> int:
        return int(self.norm.normalized_shape[0])

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) to a map (B, h, w, C) after the final norm."""
        return self.norm(self.features(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """A map (B, h, w, C) to logits (B, classes), or with `pre_logits` to its mean (B, C)."""
        pooled = self.flatten(self.avgpool(self.permute(x)))
        return pooled if pre_logits else self.head(pooled)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """A newly initialised classifier; 0 classes removes it."""
        self.num_classes = num_classes
        self.head = _classifier(self.num_features, num_classes, self.norm.weight)


def _classifier(width: int, classes: int, like: torch.Tensor) -> nn.Module:
    if not classes:
        return nn.Identity()
    layer = nn.Linear(width, classes, device=like.device, dtype=like.dtype)
    nn.init.zeros_(layer.bias)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    return layer


def _built(name: str, *, num_classes: int = 1000, img_size: Any = None, in_chans: int = 3, **options: Any) -> nn.Module:
    """A model with fresh values.

    Args:
        img_size: of a ViT, in pixels, height and width alike; a Swin takes any.
        options: of torchvision's class.
    """
    if in_chans != 3:
        raise ValueError(f"torchvision's models take 3 channels, not in_chans={in_chans}")
    if not isinstance(img_size, (int, type(None))):
        if len(set(img_size)) > 1:
            raise ValueError(f"torchvision's ViT takes square images, not img_size={list(img_size)}")
        img_size = img_size[0]
    if img_size is not None and name in VITS:
        options["image_size"] = img_size
    model = get_model_builder(name)(weights=None, **options)
    model.__class__ = TorchvisionViT if isinstance(model, VisionTransformer) else TorchvisionSwin
    model.num_classes = 1000
    if num_classes != 1000:
        model.reset_classifier(num_classes)
    return model


def _configuration(name: str) -> dict[str, Any]:
    """timm's description of torchvision's weights: where they are, and how their images are prepared."""
    weights = get_model_weights(name).DEFAULT
    prepare = weights.transforms()
    (crop,), (resize,) = prepare.crop_size, prepare.resize_size
    return {
        "url": weights.url,
        "license": "bsd-3-clause",
        "num_classes": len(weights.meta["categories"]),
        "input_size": (3, crop, crop),
        "crop_pct": crop / resize,
        "interpolation": prepare.interpolation.value,
        "mean": tuple(prepare.mean),
        "std": tuple(prepare.std),
        "classifier": "heads.head" if name in VITS else "head",
        "first_conv": "conv_proj" if name in VITS else "features.0.0",
        "fixed_input_size": name in VITS,
    }


def _entry(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        return build_model_with_cfg(partial(_built, name), create.__name__, pretrained, **options)

    create.__name__ = create.__qualname__ = f"torchvision_{name}"
    create.__module__ = __name__
    return create


# timm reads these from the module of a model's function
default_cfgs = {f"torchvision_{name}": _configuration(name) for name in (*VITS, *SWINS)}
__all__: list[str] = []
for _name in (*VITS, *SWINS):
    setattr(sys.modules[__name__], f"torchvision_{_name}", register_model(_entry(_name)))
