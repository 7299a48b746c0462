"""Prompt tokens (VPT): the modules and mixins that every way of attention has in common.

Each of the classes from `PromptMixin` on is a mixin for `surgery.extend`, put there together with what fills its slots.

Shapes: B batch, N tokens, M width, P prompts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from compressvit.model import surgery
from compressvit.model.backbone import describe


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


class PromptMixin(surgery.Mixin):
    """What `remove_prompts` takes out."""


class WithPrompts(PromptMixin):
    """Mixin for a norm or a block: prompts are added before it."""

    slots = ("vpt",)

    vpt: Prompts

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return super().forward(self.vpt(x), *args, **kwargs)


class WithoutPrompts(PromptMixin):
    """Mixin for a block: prompts are removed after it."""

    slots = ("vpt_end",)

    vpt_end: DropPrompts

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return self.vpt_end(super().forward(x, *args, **kwargs))


class TravellingPrompts(PromptMixin):
    """Of a model whose prompts are added before the first block and removed after the last: timm's interface never sees them."""

    slots = ("vpt_drop",)

    vpt_drop: DropPrompts  # that of the last block

    def prune_intermediate_layers(self: Any, *args, **kwargs) -> list[int]:
        """timm's; prompts are then removed after the block that is now the last."""
        taken = super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        surgery.extend(self, describe(self).blocks[-1].path, WithoutPrompts).vpt_end = self.vpt_drop
        return taken


def remove_prompts(model: nn.Module) -> None:
    """Take all prompts out of a model, in place, so that it computes as it did before they came."""
    for path, module in list(model.named_modules()):
        for mixin in surgery.mixins_of(module):
            if issubclass(mixin, PromptMixin):
                surgery.retract(model, path, mixin)
