"""A ViT of timm whose patches are tubelets: some frames deep, and otherwise those of the image model.

Papers: tubelets and inflated kernels as in ViViT, ICCV 2021, https://arxiv.org/abs/2103.15691, §3.2 and §4; VideoMAE, NeurIPS 2022,
https://arxiv.org/abs/2203.12602.

Shapes: B clips, C channels of a frame, T frames, t frames of a tubelet, h × w the grid of an image, D width.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from compressvit.errors import UserError, did_you_mean

Positions = Literal["space_time", "sincos"]


class TubeletEmbed(nn.Module):
    """Tokens of tubelets by a convolution of t × p × p pixels, (B, C, T, H, W) → (B, T / t, h · w, D).

    Args:
        image: the patch embedding of the image model, whose norm it keeps.
        frames: T.
        tubelet: t.
    """

    def __init__(self, image: PatchEmbed, frames: int, tubelet: int):
        super().__init__()
        self.img_size, self.patch_size, self.grid_size = image.img_size, image.patch_size, image.grid_size
        self.frames, self.tubelet = frames, tubelet
        self.steps = frames // tubelet
        assert self.grid_size is not None, "it is built for a size"
        self.num_patches = self.steps * self.grid_size[0] * self.grid_size[1]
        old, kernel = image.proj, (tubelet, *image.patch_size)
        like: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
        self.proj = nn.Conv3d(old.in_channels, old.out_channels, kernel, kernel, bias=old.bias is not None, **like)
        self.norm = image.norm
        with torch.no_grad():
            self.proj.weight.copy_(inflated(old.weight, tubelet))
            if self.proj.bias is not None and old.bias is not None:
                self.proj.bias.copy_(old.bias)

    def of_image(self) -> PatchEmbed:
        """That of an image model of the same patches, without values."""
        kernel = self.proj.weight
        return PatchEmbed(
            self.img_size,
            self.patch_size,
            kernel.shape[1],
            kernel.shape[0],
            bias=self.proj.bias is not None,
            device="meta",
        )

    def forward(self, clips: Tensor) -> Tensor:
        tokens = self.proj(clips)  # (B, D, T / t, h, w)
        return self.norm(tokens.flatten(3).permute(0, 2, 3, 1))


def inflated(kernel: Tensor, tubelet: int) -> Tensor:
    """The kernel of an image model (D, C, p, p) as one of tubelets (D, C, t, p, p) that gives a clip in which nothing moves what the image
    has; one of tubelets stays as it is."""
    if kernel.ndim != 4:
        return kernel
    return (kernel / tubelet)[:, :, None].repeat(1, 1, tubelet, 1, 1)


def sincos(places: int, width: int, device: torch.device | None = None) -> Tensor:
    """Sine-cosine positions (places, width), as VideoMAE's: of dimension i the sine, or where i is odd the cosine, of
    place / 10000^(2⌊i/2⌋/width)."""
    dims = torch.arange(width, dtype=torch.float64) // 2
    angles = torch.arange(places, dtype=torch.float64)[:, None] / 10000 ** (2 * dims / width)
    return torch.where(torch.arange(width) % 2 == 0, angles.sin(), angles.cos()).float().to(device)


class TubeletViT(VisionTransformer):
    """timm's ViT on clips (B, C, T, H, W): the tokens of the first tubelets' grid come first, row by row.

    Positions in space are the image model's own table, the same at every time. Those in time are of sines and cosines, `temporal`, and no
    parameters. With `sincos` there is no table, and one of sines and cosines counts all tubelets through.
    """

    temporal: Tensor  # (T / t, 1 or h · w, D)
    temporal_scale: float

    def init_non_persistent_buffers(self) -> None:
        """Fill the buffer that no checkpoint contains, after `to_empty()` (timm's convention)."""
        embed = self.patch_embed
        assert isinstance(embed, TubeletEmbed), "`of_tubelets` gave it one"
        device = self.norm.weight.device if isinstance(self.norm, nn.LayerNorm) else next(self.parameters()).device
        if self.pos_embed is None:
            table = sincos(embed.num_patches, self.embed_dim, device).unflatten(0, (embed.steps, -1))
        else:
            table = self.temporal_scale * sincos(embed.steps, self.embed_dim, device)[:, None]
        self.register_buffer("temporal", table.to(next(self.parameters()).dtype), persistent=False)

    def _pos_embed(self, tokens: Tensor) -> Tensor:
        """Tubelets (B, T / t, h · w, D) with their positions, after the class and register tokens: (B, N, D)."""
        first = [token for token in (self.cls_token, self.reg_token) if token is not None]
        before = torch.cat([token.expand(tokens.shape[0], -1, -1) for token in first], dim=1) if first else None
        if self.pos_embed is not None:
            count = 0 if self.no_embed_class else self.num_prefix_tokens
            tokens = tokens + self.pos_embed[:, None, count:]
            before = before + self.pos_embed[:, :count] if before is not None and count else before
        patches = (tokens + self.temporal).flatten(1, 2)
        return self.pos_drop(patches if before is None else torch.cat([before, patches], dim=1))


def of_tubelets(
    backbone: nn.Module, name: str, frames: int, tubelet: int, positions: Positions, temporal_scale: float
) -> TubeletViT:
    """An image model, changed in place so that it takes clips.

    Args:
        backbone: timm's ViT.
        name: of it, for messages.
        frames, tubelet: T and t.
        positions: see `TubeletViT`; `sincos` for a model built without a position table.
        temporal_scale: of the positions in time, beside a table of those in space.

    Raises:
        UserError: it is no ViT of this kind, T is no multiple of t, or there are no such positions.
    """
    if positions not in get_args(Positions):
        raise UserError(
            f"video: positions={positions!r} are none that it has; {did_you_mean(positions, get_args(Positions))}"
        )
    if type(backbone) is not VisionTransformer or not isinstance(backbone.patch_embed, PatchEmbed):
        raise UserError(
            f"video: {name} is a {type(backbone).__name__}, and clips are taken by timm's VisionTransformer on patches; try "
            "vit_base_patch16_224, deit_small_patch16_224 or vit_small_patch14_dinov2"
        )
    if backbone.dynamic_img_size:
        raise UserError(
            "video: backbone_args.dynamic_img_size: a clip's frames are of one size, img_size; leave it out"
        )
    if tubelet < 1 or frames < tubelet or frames % tubelet:
        near = max(tubelet, round(frames / max(tubelet, 1)) * tubelet)
        raise UserError(
            f"video: frames={frames} is no multiple of tubelet={tubelet}, of which each token has so many; try frames={near} or tubelet=1"
        )
    if not math.isfinite(temporal_scale):
        raise UserError(f"video: temporal_scale={temporal_scale} is no number")
    backbone.patch_embed = TubeletEmbed(backbone.patch_embed, frames, tubelet)
    backbone.__class__ = TubeletViT
    assert isinstance(backbone, TubeletViT)
    backbone.temporal_scale = temporal_scale
    backbone.init_non_persistent_buffers()
    return backbone
