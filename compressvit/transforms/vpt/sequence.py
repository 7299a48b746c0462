"""Prompts in one sequence of tokens over which attention runs, as in timm's ViT.

For a family whose attention takes (B, N, M) and, where it takes a mask, calls it `attn_mask`. Prompts that travel from block to block
also need models with timm ViT's `forward_features` and `forward_intermediates`.

Shapes: B batch, N tokens, M width, P prompts.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from einops import rearrange
from torch import nn

from compressvit.model.backbone import describe
from compressvit.transforms.vpt.prompts import DropPrompts, Prompts, TravellingPrompts, WithoutPrompts, WithPrompts
from compressvit.transforms.vpt.ways import Joining, Way, way


class PromptedAttention(WithoutPrompts):
    """Of attention whose input has prompts: they are removed after it, and a mask, which is for N tokens, ignores them."""

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        masked = {} if attn_mask is None else {"attn_mask": self.vpt_end.widen(attn_mask)}
        return super().forward(x, **masked, **kwargs)


class WithTravellingPrompts(TravellingPrompts):
    """Of a model with timm ViT's interface: between blocks the sequence is longer, so masks are widened and intermediate outputs cut."""

    def forward_features(self: Any, x: torch.Tensor, attn_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        masked = {} if attn_mask is None else {"attn_mask": self.vpt_drop.widen(attn_mask)}
        return super().forward_features(x, **masked, **kwargs)  # type: ignore[misc]

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

        drop, count = self.vpt_drop, len(describe(self).blocks)
        taken, last = feature_take_indices(count, indices)
        end = count - 1
        height, _ = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        masked = {} if attn_mask is None else {"attn_mask": drop.widen(attn_mask)}
        found = super().forward_intermediates(  # type: ignore[misc]
            x,
            indices,
            return_prefix_tokens=True,
            norm=norm,
            stop_early=stop_early,
            output_fmt="NLC" if output_fmt == "NCHW" else output_fmt,
            intermediates_only=intermediates_only,
            output_dict=True,
            **masked,
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


@way("sequence")
class Sequence(Way):
    """After the prefix tokens; into attention through its norm, where the family says that there is one."""

    def missing(self, model: nn.Module, deep: bool) -> str | None:
        if deep:
            return None
        accepted = inspect.signature(getattr(model, "forward_intermediates", lambda: None)).parameters
        if {"return_prefix_tokens", "output_dict"} <= accepted.keys() and hasattr(model, "patch_embed"):
            return None
        return "timm ViT's `patch_embed` and the arguments of its `forward_intermediates`, or vpt.deep=true"

    def deep(self, joining: Joining, path: str) -> None:
        branches = joining.backbone.family.branches.values()
        norm = next((branch.norm for branch in branches if branch.branch == "attn"), "attn")
        joining.enter(f"{path}.{norm}", WithPrompts, path)
        joining.leave(f"{path}.attn", PromptedAttention, DropPrompts(joining.count, joining.at))

    def shallow(self, joining: Joining) -> str:
        return joining.travel(WithTravellingPrompts, Prompts, DropPrompts(joining.count, joining.at))
