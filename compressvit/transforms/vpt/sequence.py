"""Prompts for attention over one sequence of tokens, as in timm's ViT.

The family's attention must take (B, N, M) and call its mask, if it has one, `attn_mask`. Prompts that stay in the sequence across blocks
also need a model with the `forward_features` and `forward_intermediates` of timm's ViT.

Shapes: B batch, N tokens, M width, P prompts.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import nn

from compressvit.model.backbone import describe
from compressvit.transforms.vpt.prompts import (
    DropPrompts,
    PromptMixin,
    Prompts,
    TravellingPrompts,
    WithoutPrompts,
    WithPrompts,
)
from compressvit.transforms.vpt.ways import Joining, Way, way


class PromptedAttention(WithoutPrompts):
    """Mixin for attention whose input contains prompts: removes them afterwards, and extends a mask for N tokens to them.

    Attention with rotary positions leaves its first `num_prefix_tokens` as they are. Prompts have no place on the grid either.
    """

    @property
    def num_prefix_tokens(self) -> int:
        """Of attention that has it: how many tokens at the front have no place on the grid."""
        own: int | None = vars(self).get("num_prefix_tokens")
        if own is None:
            raise AttributeError("num_prefix_tokens")
        return own + self.vpt_end.count

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        masked = {} if attn_mask is None else {"attn_mask": self.vpt_end.widen(attn_mask)}
        return super().forward(x, **masked, **kwargs)


class PromptedBiasedAttention(WithoutPrompts):
    """Mixin for attention with a bias for every pair of tokens, of its own or given by keyword, which prompts have none of."""

    def forward(self, x: torch.Tensor, **biases: torch.Tensor | None) -> torch.Tensor:
        return super().forward(x, **{name: self.vpt_end.widen(bias) for name, bias in biases.items()})

    def _get_rel_pos_bias(self: Any) -> torch.Tensor | None:
        return self.vpt_end.widen(super()._get_rel_pos_bias())  # type: ignore[misc]


class WithWidenedBias(PromptMixin):
    """Mixin for a module within attention that gives the bias of all pairs of tokens."""

    slots = ("vpt_end",)

    vpt_end: DropPrompts

    def get_bias(self: Any) -> torch.Tensor | None:
        return self.vpt_end.widen(super().get_bias())  # type: ignore[misc]


class WithTravellingPrompts(TravellingPrompts):
    """Mixin for a model with the interface of timm's ViT and prompts between blocks: extends masks, and cuts intermediate outputs."""

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
        """timm's method, with the same arguments and results."""
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
        # timm has removed the prefix tokens, so prompts come first
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
    """Prompts after the prefix tokens; added before the norm of attention if the family names one."""

    def missing(self, model: nn.Module, deep: bool) -> str | None:
        if deep:
            return None
        accepted = inspect.signature(getattr(model, "forward_intermediates", lambda: None)).parameters
        if {"return_prefix_tokens", "output_dict"} <= accepted.keys() and hasattr(model, "patch_embed"):
            return None
        return "timm ViT's `patch_embed` and the arguments of its `forward_intermediates`, or vpt.deep=true"

    attention: ClassVar[type[WithoutPrompts]] = PromptedAttention

    def deep(self, joining: Joining, path: str) -> None:
        branches = joining.backbone.family.branches.values()
        norm = next((branch.norm for branch in branches if branch.branch == "attn"), "attn")
        joining.enter(f"{path}.{norm}", WithPrompts, path)
        joining.leave(f"{path}.attn", self.attention, DropPrompts(joining.count, joining.at))

    def shallow(self, joining: Joining) -> str:
        return joining.travel(WithTravellingPrompts, Prompts, DropPrompts(joining.count, joining.at))


@way("biased_sequence")
class BiasedSequence(Sequence):
    """The same in attention with relative positions, of which prompts have none."""

    attention = PromptedBiasedAttention

    def deep(self, joining: Joining, path: str) -> None:
        super().deep(joining, path)
        if getattr(joining.model.get_submodule(f"{path}.attn"), "rel_pos", None) is not None:
            joining.leave(f"{path}.attn.rel_pos", WithWidenedBias, DropPrompts(joining.count, joining.at))
