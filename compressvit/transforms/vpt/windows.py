"""Prompts in each attention window of timm's Swin; relative position, mask and patch merging follow timm.

Shapes: B batch, N tokens of a window, M width, P prompts; blocks carry (B, height, width, M).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.fx import wrap

from compressvit.model import surgery
from compressvit.model.backbone import describe
from compressvit.transforms.vpt.prompts import DropPrompts, PromptMixin, Prompts, TravellingPrompts, WithoutPrompts
from compressvit.transforms.vpt.ways import Joining, Way, way

if TYPE_CHECKING:
    from timm.models.swin_transformer import WindowAttention
else:
    WindowAttention = object  # as `surgery.Mixin`


wrap("rearrange")  # torch.fx records the call: einops does not take its proxies


class GridPrompts(Prompts):
    """Append prompts to a grid of tokens as extra rows below it: (B, height, W, M) → (B, height + ⌈P/W⌉, W, M)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _below(x, self.of(x.shape[0]))


def _below(x: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """A grid with rows of prompts below it; the last row is padded with zeros."""
    columns = x.shape[2]
    prompts = F.pad(prompts, (0, 0, 0, -prompts.shape[1] % columns))
    return torch.cat([x, prompts.unflatten(1, (-1, columns))], dim=1)


class DropPromptRows(DropPrompts):
    """Remove the rows of prompts from a grid: (B, height + ⌈P/W⌉, W, M) → (B, height, W, M)."""

    def rows(self, width: int) -> int:
        """Number of rows of prompts on a grid of that width."""
        return -(-self.count // width)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Separate the grid from the prompts (B, P, M)."""
        grid, prompts = x.tensor_split([x.shape[1] - self.rows(x.shape[2])], dim=1)
        return grid, prompts.flatten(1, 2)[:, : self.count]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.split(x)[0]


class WidenedWindowAttention(PromptMixin, WindowAttention):
    """Mixin for Swin's attention in windows with prompts, to which neither mask nor relative position applies."""

    slots = ("vpt_end",)

    vpt_end: DropPrompts

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x, mask=self.vpt_end.widen(mask))

    def _get_rel_pos_bias(self) -> torch.Tensor:  # (1, H, N+P, N+P)
        bias = self.vpt_end.widen(super()._get_rel_pos_bias())
        assert bias is not None
        return bias


class PromptedWindowAttention(WidenedWindowAttention, WithoutPrompts):
    """As `WidenedWindowAttention`, and removes the prompts afterwards."""


class PromptedSwinBlock(PromptMixin):
    """Mixin for a Swin block: prepends the prompts, normalised by the block's first norm, to every attention window."""

    slots = ("vpt",)

    vpt: Prompts
    norm1: nn.Module

    def _attn(self, x: torch.Tensor) -> torch.Tensor:
        # `forward`, not a call: hooks on the norm expect image tokens only
        return _attend(self, x, self.norm1.forward(self.vpt.of(x.shape[0])))[0]


class CarryingSwinBlock(PromptMixin):
    """Mixin for a Swin block whose grid has rows of prompts: copies them into every window, and averages the attention outputs of the
    copies. The rest of a block acts on each token separately and needs no change."""

    slots = ("vpt_rows",)

    vpt_rows: DropPromptRows

    def _attn(self, x: torch.Tensor) -> torch.Tensor:
        grid, prompts = self.vpt_rows.split(x)
        grid, copies = _attend(self, grid, prompts)
        return _below(grid, rearrange(copies, "(b w) p m -> b w p m", b=x.shape[0]).mean(1))


class CarryingPatchMerging(PromptMixin):
    """Mixin for Swin's patch merging: merges each prompt as a 2×2 patch of copies of itself."""

    slots = ("vpt_rows",)

    vpt_rows: DropPromptRows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid, prompts = self.vpt_rows.split(x)
        height, width = grid.shape[1:3]
        grid = F.pad(grid, (0, 0, 0, width % 2, 0, height % 2))  # as in timm, but before prompts are added
        merged = F.pad(prompts, (0, 0, 0, -prompts.shape[1] % (grid.shape[2] // 2)))
        rows = rearrange(merged, "b (r c) m -> b r c m", c=grid.shape[2] // 2)
        rows = rows.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        return super().forward(torch.cat([grid, rows], dim=1))


def _attend(block: Any, x: torch.Tensor, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A Swin block's attention in windows that begin with prompts: takes the grid (B, height, width, M) and the prompts (B, P, M).

    timm's `_attn` partitions the windows and runs attention in one function, so its steps are repeated here.

    Returns:
        The grid, and the outputs of the prompts of every window (B·windows, P, M); empty if they were removed after attention.
    """
    from timm.models.swin_transformer import window_partition, window_reverse

    batch, height, width, _ = x.shape
    rows, columns = block.window_size
    down, right = block.shift_size
    x = torch.roll(x, (-down, -right), dims=(1, 2)) if down or right else x
    x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
    mask = block.get_attn_mask(x) if getattr(block, "dynamic_mask", False) else block.attn_mask
    windows = window_partition(x, block.window_size).flatten(1, 2)  # (B·windows, N, M), grouped by image
    prompts = prompts.repeat_interleave(windows.shape[0] // batch, dim=0)
    made = block.attn(torch.cat([prompts, windows], dim=1), mask=mask)
    copies, windows = made.tensor_split([made.shape[1] - rows * columns], dim=1)
    x = window_reverse(windows.unflatten(1, (rows, columns)), block.window_size, x.shape[1], x.shape[2])
    x = x[:, :height, :width].contiguous()
    return torch.roll(x, (down, right), dims=(1, 2)) if down or right else x, copies


class SwinWithTravellingPrompts(TravellingPrompts):
    """Mixin for a Swin model with prompts between blocks: removes their rows from intermediate outputs."""

    def forward_intermediates(
        self: Any,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """timm's method, with the same arguments and results."""
        from timm.models._features import feature_take_indices

        drop, end = self.vpt_drop, len(self.layers) - 1
        taken, last = feature_take_indices(len(self.layers), indices)
        found = super().forward_intermediates(x, indices, norm, stop_early, output_fmt, intermediates_only)  # type: ignore[misc]
        features, maps = (None, found) if intermediates_only else found
        outputs = zip(sorted(set(taken)), maps, strict=True)
        maps = [y[:, :, : y.shape[2] - drop.rows(y.shape[3])].contiguous() if i < end else y for i, y in outputs]
        if features is not None and stop_early and last < end:
            features = drop(features)
        return maps if intermediates_only else (features, maps)


@way("windows")
class Windows(Way):
    """Prompts in every window; shallow ones are in rows below the grid between blocks."""

    def missing(self, model: nn.Module, deep: bool) -> str | None:
        from timm.models.swin_transformer import SwinTransformerBlock

        swin = all(isinstance(model.get_submodule(info.path), SwinTransformerBlock) for info in describe(model).blocks)
        return None if swin else "timm's SwinTransformerBlock"

    def deep(self, joining: Joining, path: str) -> None:
        joining.enter(path, PromptedSwinBlock, path)
        joining.leave(f"{path}.attn", PromptedWindowAttention, DropPrompts(joining.count))

    def shallow(self, joining: Joining) -> str:
        model, count = joining.model, joining.count
        for info in joining.backbone.blocks:
            surgery.extend(model, info.path, CarryingSwinBlock)
            surgery.fill_slot(model, info.path, "vpt_rows", DropPromptRows(count))
            joining.leave(f"{info.path}.attn", WidenedWindowAttention, DropPrompts(count))
        for first, *_ in joining.backbone.stages[1:]:
            path = f"{first.stage_path}.downsample"
            surgery.extend(model, path, CarryingPatchMerging)
            surgery.fill_slot(model, path, "vpt_rows", DropPromptRows(count))
        return joining.travel(SwinWithTravellingPrompts, GridPrompts, DropPromptRows(count))
