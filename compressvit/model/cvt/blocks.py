"""The parts of a CvT. Names of modules and tensors are those of the released code.

Shapes: B images, N tokens, C width, h and w of the grid, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath, Mlp, use_fused_attn
from torch import nn
from torch.fx import wrap
from torch.utils.checkpoint import checkpoint

wrap("rearrange")  # torch.fx records the call: einops does not take its proxies

Size = tuple[int, int]  # height and width of a grid


class ConvEmbed(nn.Module):
    """A convolution and a norm: a map (B, C', height, width) to tokens (B, h·w, C) and their grid."""

    def __init__(self, in_chans: int, width: int, patch: int, stride: int, padding: int):
        super().__init__()
        self.patch_size = (stride, stride)
        self.proj = nn.Conv2d(in_chans, width, patch, stride, padding)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Size]:
        x = self.proj(x)
        return self.norm(rearrange(x, "b c h w -> b (h w) c")), (x.shape[2], x.shape[3])

    def grid(self, size: Size) -> Size:
        """That of an image or map of this height and width."""
        kernel, padding, stride = self.proj.kernel_size, cast(Size, self.proj.padding), self.proj.stride
        height, width = ((size[i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in (0, 1))
        return height, width


class ConvProjection(nn.Module):
    """A depth-wise 3×3 convolution and a batch norm: a map (B, C, h, w) to tokens (B, N, C)."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rearrange(self.bn(self.conv(x)), "b c h w -> b (h w) c")


class CvTAttention(nn.Module):
    """Attention over all tokens, with queries, keys and values that a convolution comes before.

    Args:
        width: C.
        num_heads: H.
        kv_stride: of the convolutions before keys and values.
        num_prefix_tokens: how many tokens skip the convolutions, 0 or 1.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        kv_stride: int,
        num_prefix_tokens: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        self.num_heads, self.num_prefix_tokens = num_heads, num_prefix_tokens
        self.scale = width**-0.5
        self.fused_attn = use_fused_attn()
        self.conv_proj_q = ConvProjection(width, 1)
        self.conv_proj_k = ConvProjection(width, kv_stride)
        self.conv_proj_v = ConvProjection(width, kv_stride)
        self.proj_q = nn.Linear(width, width, bias=qkv_bias)
        self.proj_k = nn.Linear(width, width, bias=qkv_bias)
        self.proj_v = nn.Linear(width, width, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(proj_drop)

    def heads(self, x: torch.Tensor, size: Size) -> list[torch.Tensor]:
        """Queries (B, H, N, D), keys and values (B, H, M, D) of tokens (B, N, C), which are on a grid of this size."""
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        grid = rearrange(patches, "b (h w) c -> b c h w", h=size[0], w=size[1])
        found = []
        for convolve, project in (
            (self.conv_proj_q, self.proj_q),
            (self.conv_proj_k, self.proj_k),
            (self.conv_proj_v, self.proj_v),
        ):
            tokens = convolve(grid)
            if self.num_prefix_tokens:
                tokens = torch.cat([prefix, tokens], dim=1)
            found.append(rearrange(project(tokens), "b n (h d) -> b h n d", h=self.num_heads))
        return found

    def forward(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        q, k, v = self.heads(x, size)
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        else:
            out = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        return self.proj_drop(self.proj(rearrange(out, "b h n d -> b n (h d)")))


class CvTBlock(nn.Module):
    """A pre-norm block; its branches have one stochastic depth."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        kv_stride: int,
        num_prefix_tokens: int,
        qkv_bias: bool,
        act_layer: type[nn.Module],
        attn_drop: float,
        proj_drop: float,
        drop_path: float,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = CvTAttention(width, num_heads, kv_stride, num_prefix_tokens, qkv_bias, attn_drop, proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio), act_layer=act_layer, drop=proj_drop)

    def forward(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        """x: (B, N, C), on a grid of this size."""
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class CvTStage(nn.Module):
    """Tokens of a convolution, a class token before them where it is the last stage, and blocks.

    Args:
        embed: makes the tokens.
        blocks: see the tokens.
        before: the grid of the tokens that it gets, in a model of images of its size; None if it gets images.
        class_token: whether it has one.
    """

    def __init__(self, embed: ConvEmbed, blocks: Sequence[CvTBlock], before: Size | None, class_token: bool):
        super().__init__()
        self.patch_embed = embed
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed.proj.out_channels)) if class_token else None
        self.blocks = nn.ModuleList(blocks)
        self.before = before
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor, size: Size | None = None) -> tuple[torch.Tensor, Size]:
        """Images (B, 3, height, width), or tokens (B, N, C') of a grid of this size, to tokens (B, N, C) and their grid."""
        if self.before is not None:
            height, width = self.before if size is None else size
            x = rearrange(x, "b (h w) c -> b c h w", h=height, w=width)
        x, grid = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            again = self.grad_checkpointing
            x = checkpoint(block, x, size=grid, use_reentrant=False) if again else block(x, size=grid)
        return x, grid
