"""Prompt tokens (VPT): where they enter a sequence, where they are removed, and the layers between.

Each of the classes below `DropPrompts` is a mixin for `surgery.extend`, put there together with what fills its slot.

Shapes: B batch, N tokens, M width, P prompts; Swin's blocks carry (B, height, width, M).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from compressvit.model import surgery

if TYPE_CHECKING:
    from timm.models.swin_transformer import WindowAttention
else:
    WindowAttention = object  # as `surgery.Mixin`


class Prompts(nn.Module):
    """P learnable tokens, the same for every image: (B, N, M) → (B, N+P, M).

    Args:
        count: P.
        width: M.
        at: how many tokens of the sequence come before them (class, distillation and register tokens).
        dropout: of their elements in training, for each image anew.
    """

    def __init__(self, count: int, width: int, at: int = 0, dropout: float = 0.0, device=None, dtype=None):
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(count, width, device=device, dtype=dtype))
        self.dropout, self.at = dropout, at

    @torch.no_grad()
    def reset(self, bound: float) -> None:
        """Start uniform between −bound and bound."""
        nn.init.uniform_(self.tokens, -bound, bound)

    def of(self, batch: int) -> torch.Tensor:  # (batch, P, M)
        # A function: torch's counter of FLOPs cannot hook a module whose input is a view of a parameter.
        return F.dropout(self.tokens.expand(batch, -1, -1), self.dropout, self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before, after = x.tensor_split([self.at], dim=1)
        return torch.cat([before, self.of(len(x)), after], dim=1)


class DropPrompts(nn.Module):
    """Take prompts out of a sequence: (B, N+P, M) → (B, N, M).

    Args:
        count: P.
        at: how many tokens come before them.
    """

    def __init__(self, count: int, at: int = 0):
        super().__init__()
        self.count, self.at = count, at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before, _, after = x.tensor_split([self.at, self.at + self.count], dim=1)
        return torch.cat([before, after], dim=1) if self.at else after

    def widen(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """A mask or bias of the logits for N+P tokens: prompts are seen by all and see all, or where it is one of keys what it lets.

        (…, N, N) → (…, N+P, N+P); (…, 1, N) → (…, 1, N+P).
        """
        if mask is None:
            return None
        dims = (-1, -2) if mask.shape[-2] == mask.shape[-1] else (-1,)
        for dim in dims:
            before, after = mask.tensor_split([self.at], dim=dim)
            shape = list(mask.shape)
            shape[dim] = self.count
            open_to_all = mask.new_full(shape, mask.dtype == torch.bool)  # True, or nothing added to the logits
            mask = torch.cat([before, open_to_all, after], dim=dim)
        return mask


class GridPrompts(Prompts):
    """Prompts beside a grid of tokens, in rows of their own below it: (B, height, W, M) → (B, height + ⌈P/W⌉, W, M)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _below(x, self.of(len(x)))


def _below(x: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """A grid with rows of prompts below it; the last row is filled up with zeros."""
    columns = x.shape[2]
    prompts = F.pad(prompts, (0, 0, 0, -prompts.shape[1] % columns))
    return torch.cat([x, prompts.unflatten(1, (-1, columns))], dim=1)


class DropPromptRows(DropPrompts):
    """Take the rows of prompts off a grid: (B, height + ⌈P/W⌉, W, M) → (B, height, W, M)."""

    def rows(self, width: int) -> int:
        """How many there are on a grid of that width."""
        return -(-self.count // width)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The grid, and the prompts (B, P, M)."""
        grid, prompts = x.tensor_split([x.shape[1] - self.rows(x.shape[2])], dim=1)
        return grid, prompts.flatten(1, 2)[:, : self.count]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.split(x)[0]


class WithPrompts(surgery.Mixin):
    """Mixin for a norm or a block: prompts are added before it."""

    slots = ("vpt",)

    vpt: Prompts

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return super().forward(self.vpt(x), *args, **kwargs)


class WithoutPrompts(surgery.Mixin):
    """Mixin for a block: prompts are removed after it."""

    slots = ("vpt_end",)

    vpt_end: DropPrompts

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return self.vpt_end(super().forward(x, *args, **kwargs))


class PromptedAttention(WithoutPrompts):
    """Of a ViT's attention, whose input has prompts: they are removed after it, and a mask, which is for N tokens, ignores them."""

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        return super().forward(x, attn_mask=self.vpt_end.widen(attn_mask), **kwargs)


class WidenedWindowAttention(WindowAttention):
    """Of Swin's attention, the windows of which have prompts: no mask and no relative position is for them."""

    slots = ("vpt_end",)

    vpt_end: DropPrompts

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x, mask=self.vpt_end.widen(mask))

    def _get_rel_pos_bias(self) -> torch.Tensor:  # (1, H, N+P, N+P)
        bias = self.vpt_end.widen(super()._get_rel_pos_bias())
        assert bias is not None
        return bias


class PromptedWindowAttention(WidenedWindowAttention, WithoutPrompts):
    """The same, and the prompts are removed after it."""


class PromptedSwinBlock(surgery.Mixin):
    """Of a Swin block: every window that attention sees begins with the prompts, after the block's first norm like all tokens."""

    slots = ("vpt",)

    vpt: Prompts
    norm1: nn.Module

    def _attn(self, x: torch.Tensor) -> torch.Tensor:
        # forward, not a call: hooks of the norm are for the image's tokens
        return _attend(self, x, self.norm1.forward(self.vpt.of(len(x))))[0]


class CarryingSwinBlock(surgery.Mixin):
    """Of a Swin block whose grid has rows of prompts: they are copied into every window, and the attention outputs of the copies are
    averaged. Everything else in a block is done to each token alone, so it needs no change."""

    slots = ("vpt_rows",)

    vpt_rows: DropPromptRows

    def _attn(self, x: torch.Tensor) -> torch.Tensor:
        grid, prompts = self.vpt_rows.split(x)
        grid, copies = _attend(self, grid, prompts)
        return _below(grid, rearrange(copies, "(b w) p m -> b w p m", b=len(x)).mean(1))


class CarryingPatchMerging(surgery.Mixin):
    """Of Swin's patch merging: every prompt stands below the grid as a 2×2 patch of copies, so it is merged like the image's."""

    slots = ("vpt_rows",)

    vpt_rows: DropPromptRows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid, prompts = self.vpt_rows.split(x)
        height, width = grid.shape[1:3]
        grid = F.pad(grid, (0, 0, 0, width % 2, 0, height % 2))  # as timm does, but before the prompts come
        merged = F.pad(prompts, (0, 0, 0, -prompts.shape[1] % (grid.shape[2] // 2)))
        rows = rearrange(merged, "b (r c) m -> b r c m", c=grid.shape[2] // 2)
        rows = rows.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        return super().forward(torch.cat([grid, rows], dim=1))


def _attend(block: Any, x: torch.Tensor, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A Swin block's attention in windows that begin with prompts: (B, height, width, M), (B, P, M).

    timm's `_attn` cuts the windows and runs attention in one piece, so it is written out here.

    Returns:
        The grid, and what came out for the prompts of every window, (B·windows, P, M); none if they were removed after attention.
    """
    from timm.models.swin_transformer import window_partition, window_reverse

    batch, height, width, _ = x.shape
    rows, columns = block.window_size
    down, right = block.shift_size
    x = torch.roll(x, (-down, -right), dims=(1, 2)) if down or right else x
    x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
    mask = block.get_attn_mask(x) if getattr(block, "dynamic_mask", False) else block.attn_mask
    windows = window_partition(x, block.window_size).flatten(1, 2)  # (B·windows, N, M), those of an image in a row
    prompts = prompts.repeat_interleave(len(windows) // batch, dim=0)
    made = block.attn(torch.cat([prompts, windows], dim=1), mask=mask)
    copies, windows = made.tensor_split([made.shape[1] - rows * columns], dim=1)
    x = window_reverse(windows.unflatten(1, (rows, columns)), block.window_size, *x.shape[1:3])
    x = x[:, :height, :width].contiguous()
    return torch.roll(x, (down, right), dims=(1, 2)) if down or right else x, copies


class TravellingPrompts(surgery.Mixin):
    """Of a model whose prompts are added before the first block and removed after the last: timm's interface never sees them."""

    slots = ()


class WithTravellingPrompts(TravellingPrompts):
    """Of a ViT: between blocks the sequence is longer, so masks are widened and intermediate outputs cut."""

    def forward_features(self: Any, x: torch.Tensor, attn_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        return super().forward_features(x, attn_mask=self.blocks[-1].vpt_end.widen(attn_mask), **kwargs)  # type: ignore[misc]

    def forward_intermediates(
        self: Any,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: torch.Tensor | None = None,
        **kwargs,
    ):
        """timm's, with its arguments and results."""
        from timm.models._features import feature_take_indices

        drop, end = self.blocks[-1].vpt_end, len(self.blocks) - 1
        taken, last = feature_take_indices(len(self.blocks), indices)
        height, _ = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        found = super().forward_intermediates(  # type: ignore[misc]
            x,
            indices,
            return_prefix_tokens=True,
            norm=norm,
            stop_early=stop_early,
            output_fmt="NLC" if output_fmt == "NCHW" else output_fmt,
            intermediates_only=intermediates_only,
            output_dict=True,
            attn_mask=drop.widen(attn_mask),
            **kwargs,
        )
        # timm has cut the prefix tokens off, so prompts come first
        outputs = zip(sorted(set(taken)), found["image_intermediates"], strict=True)
        patches = [y[:, drop.count :] if i < end else y for i, y in outputs]
        if output_fmt == "NCHW":
            patches = [rearrange(y, "b (h w) c -> b c h w", h=height).contiguous() for y in patches]
        if stop_early and last < end and not intermediates_only:
            found["image_features"] = drop(found["image_features"])
        prefix = found.get("image_intermediates_prefix")
        with_prefix = return_prefix_tokens and prefix is not None
        if output_dict:
            unasked = "" if with_prefix else "image_intermediates_prefix"
            return {k: v for k, v in found.items() if k != unasked} | {"image_intermediates": patches}
        if with_prefix:
            patches = list(zip(patches, prefix, strict=True))
        return patches if intermediates_only else (found["image_features"], patches)

    def prune_intermediate_layers(self: Any, *args, **kwargs) -> list[int]:
        """timm's; prompts are then removed after the block that is now the last."""
        drop = self.blocks[-1].vpt_end
        taken = super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        surgery.extend(self, f"blocks.{len(self.blocks) - 1}", WithoutPrompts).vpt_end = drop
        return taken


class SwinWithTravellingPrompts(TravellingPrompts):
    """Of a Swin: between blocks the grid has more rows, so intermediate outputs are cut."""

    def forward_intermediates(
        self: Any,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """timm's, with its arguments and results."""
        from timm.models._features import feature_take_indices

        drop, end = self.layers[-1].blocks[-1].vpt_end, len(self.layers) - 1
        taken, last = feature_take_indices(len(self.layers), indices)
        found = super().forward_intermediates(x, indices, norm, stop_early, output_fmt, intermediates_only)  # type: ignore[misc]
        features, maps = (None, found) if intermediates_only else found
        outputs = zip(sorted(set(taken)), maps, strict=True)
        maps = [y[:, :, : y.shape[2] - drop.rows(y.shape[3])].contiguous() if i < end else y for i, y in outputs]
        if features is not None and stop_early and last < end:
            features = drop(features)
        return maps if intermediates_only else (features, maps)

    def prune_intermediate_layers(self: Any, *args, **kwargs) -> list[int]:
        """timm's; prompts are then removed after the block that is now the last."""
        drop = self.layers[-1].blocks[-1].vpt_end
        taken = super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        stage = len(self.layers) - 1
        path = f"layers.{stage}.blocks.{len(self.layers[stage].blocks) - 1}"
        surgery.extend(self, path, WithoutPrompts).vpt_end = drop
        return taken


# Subclasses first.
_MIXINS = (
    PromptedAttention,
    PromptedWindowAttention,
    WidenedWindowAttention,
    WithoutPrompts,
    WithPrompts,
    PromptedSwinBlock,
    CarryingSwinBlock,
    CarryingPatchMerging,
    WithTravellingPrompts,
    SwinWithTravellingPrompts,
)


def remove_prompts(model: nn.Module) -> None:
    """Take all prompts out of a model, in place, so that it computes as it did before they came."""
    for path, module in list(model.named_modules()):
        for mixin in _MIXINS:
            if isinstance(module, mixin):
                surgery.retract(model, path, mixin)
