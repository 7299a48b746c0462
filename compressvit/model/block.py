"""timm's blocks with a slot between attention and MLP, and one beside the MLP.

Shapes: B batch, N tokens, C width; Swin's blocks carry (B, height, width, C).
"""

from __future__ import annotations

import torch
from einops import rearrange
from timm.models.convnext import ConvNeXtBlock
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import nn

from compressvit.errors import UserError


class TokenConv(nn.Module):
    """A depth-wise K×K convolution over the token grid, behind its own LayerNorm (MiniViT's MLP transformation, eq. 7).

    Class, distillation and register tokens are not on the grid: the convolution passes them by.

    Args:
        width: C.
        kernel_size: K, odd.
        grid: height and width of the token grid, used to fold a (B, N, C) sequence; unused for (B, height, width, C).
        num_prefix_tokens: how many tokens at the front of a sequence are not on the grid.
        replace: False computes `x + conv(LN x)`; True computes `LN x + conv(LN x)`, which is what the paper's code does
            to the residual stream, and which no pretrained function survives.
    """

    def __init__(
        self,
        width: int,
        kernel_size: int,
        grid: tuple[int, int],
        num_prefix_tokens: int = 0,
        replace: bool = False,
        eps: float = 1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps, device=device, dtype=dtype)
        self.conv = nn.Conv2d(
            width, width, kernel_size, padding=kernel_size // 2, groups=width, bias=True, device=device, dtype=dtype
        )
        self.grid = tuple(grid)
        self.num_prefix_tokens = num_prefix_tokens
        self.replace = replace

    @torch.no_grad()
    def reset_identity(self) -> None:
        """Start with a convolution of zeros: `x + conv(LN x)` is then x."""
        self.norm.reset_parameters()
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    @torch.no_grad()
    def reset_noise(self, std: float = 0.02) -> None:
        """Start from truncated normal noise, as the paper's code does."""
        self.norm.reset_parameters()
        nn.init.trunc_normal_(self.conv.weight, std=std)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # same shape in and out
        normed = self.norm(x)
        base = normed if self.replace else x
        if x.ndim == 4:
            return base + rearrange(self.conv(rearrange(normed, "b h w c -> b c h w")), "b c h w -> b h w c")
        prefix, normed = normed.tensor_split([self.num_prefix_tokens], dim=1)
        height, _ = self._grid_of(normed.shape[1])
        normed = self.conv(rearrange(normed, "b (h w) c -> b c h w", h=height))
        convolved = rearrange(normed, "b c h w -> b (h w) c")
        return base + torch.cat([torch.zeros_like(prefix), convolved], dim=1)

    def _grid_of(self, tokens: int) -> tuple[int, int]:
        """The grid of a sequence: the configured one, or (other input size) one of the same aspect ratio."""
        height, width = self.grid
        if height * width != tokens:
            height = max(1, round((tokens * height / width) ** 0.5))
            width = tokens // height
            if height * width != tokens:
                raise UserError(
                    f"the MLP convolution cannot fold {tokens} tokens into a grid shaped like {self.grid}; "
                    "build the model with the input size you use (img_size=…)"
                )
        return height, width


def _beside(adapter: nn.Module | None, x: torch.Tensor, normed: torch.Tensor) -> torch.Tensor | float:
    """What a branch parallel to the MLP adds to the residual stream; 0 without one. It names which of the two it reads."""
    if adapter is None:
        return 0.0
    return adapter(normed if adapter.reads == "normed" else x)


class SlottedBlock(Block):
    """timm's pre-norm ViT `Block` with a slot before the MLP and one beside it."""

    slots = ("mlp_conv", "adaptformer")

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        masks = {"is_causal": True} if is_causal else {}
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, **masks)))
        if self.mlp_conv is not None:
            x = self.mlp_conv(x)
        normed = self.norm2(x)
        return x + self.drop_path2(self.ls2(self.mlp(normed))) + _beside(self.adaptformer, x, normed)


class SlottedSwinBlock(SwinTransformerBlock):
    """timm's `SwinTransformerBlock` with a slot before the MLP and one beside it; x is (B, height, width, C)."""

    slots = ("mlp_conv", "adaptformer")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self._attn(self.norm1(x)))
        if self.mlp_conv is not None:
            x = self.mlp_conv(x)
        normed = self.norm2(x)
        return x + self.drop_path2(self.mlp(normed)) + _beside(self.adaptformer, x, normed)


class SlottedConvNeXtBlock(ConvNeXtBlock):
    """timm's `ConvNeXtBlock` with a slot beside the MLP; x is (B, C, height, width)."""

    slots = ("adaptformer",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.conv_dw(x)
        if self.use_conv_mlp:
            normed = self.norm(mixed)
            inner = self.mlp(normed)
            normed = rearrange(normed, "b c h w -> b h w c")
        else:
            normed = self.norm(rearrange(mixed, "b c h w -> b h w c"))
            inner = rearrange(self.mlp(normed), "b h w c -> b c h w")
        if self.gamma is not None:
            inner = inner * self.gamma[:, None, None]
        out = self.drop_path(inner) + self.shortcut(x)
        if self.adaptformer is None:
            return out
        beside = _beside(self.adaptformer, rearrange(x, "b c h w -> b h w c"), normed)
        return out + rearrange(beside, "b h w c -> b c h w")


SLOTTED_BLOCK: dict[str, type[nn.Module]] = {
    "vit": SlottedBlock,
    "swin": SlottedSwinBlock,
    "convnext": SlottedConvNeXtBlock,
}
