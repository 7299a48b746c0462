"""Prompt tokens (VPT): the modules and mixins that are shared by all kinds of attention.

The classes from `PromptMixin` on are mixins for `surgery.extend`, which adds them together with the modules in their slots.

Shapes: B batch, N tokens, M width, P prompts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import wrap

from compressvit.model import surgery
from compressvit.model.backbone import describe


class Prompts(nn.Module):
    """P learnable tokens, the same for every image: (B, N, M) → (B, N+P, M).

    Args:
        count: P.
        width: M.
        at: number of tokens before the prompts (class, distillation and register tokens).
        dropout: probability of dropping an element of the prompts in training, independently for each image.
    """

    def __init__(self, count: int, width: int, at: int = 0, dropout: float = 0.0, device=None, dtype=None):
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(count, width, device=device, dtype=dtype))
        self.dropout, self.at = dropout, at

    @torch.no_grad()
    def reset(self, bound: float) -> None:
        """Initialise uniformly between −bound and bound."""
        nn.init.uniform_(self.tokens, -bound, bound)

    def of(self, batch: int) -> torch.Tensor:  # (batch, P, M)
        # The functional form: torch's FLOP counter cannot hook a module whose input is a view of a parameter.
        return F.dropout(self.tokens.expand(batch, -1, -1), self.dropout, self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before, after = x.tensor_split([self.at], dim=1)
        return torch.cat([before, self.of(x.shape[0]), after], dim=1)


class DropPrompts(nn.Module):
    """Remove prompts from a sequence: (B, N+P, M) → (B, N, M).

    Args:
        count: P.
        at: number of tokens before the prompts.
    """

    def __init__(self, count: int, at: int = 0):
        super().__init__()
        self.count, self.at = count, at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before, _, after = x.tensor_split([self.at, self.at + self.count], dim=1)
        return torch.cat([before, after], dim=1) if self.at else after

    def widen(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Extend a mask or bias of the logits to N+P tokens. Prompts attend to all tokens (those a key mask allows) and all attend to them.

        (…, N, N) → (…, N+P, N+P); (…, 1, N) → (…, 1, N+P).
        """
        return widened(mask, self.at, self.count)


@wrap  # torch.fx does not trace its conditions
def widened(mask: torch.Tensor | None, at: int, count: int) -> torch.Tensor | None:
    """A mask or bias for `count` more tokens after the first `at`; see `DropPrompts.widen`."""
    if mask is None:
        return None
    dims = (-1, -2) if mask.shape[-2] == mask.shape[-1] else (-1,)
    for dim in dims:
        before, after = mask.tensor_split([at], dim=dim)
        shape = list(mask.shape)
        shape[dim] = count
        # attended to: True in a mask, 0 in a bias
        open_to_all = mask.new_ones(shape) if mask.dtype == torch.bool else mask.new_zeros(shape)
        mask = torch.cat([before, open_to_all, after], dim=dim)
    return mask


class PromptMixin(surgery.Mixin):
    """Base of the mixins that `remove_prompts` removes."""


class WithPrompts(PromptMixin):
    """Mixin for a norm or a block: adds prompts before it."""

    slots = ("vpt",)

    vpt: Prompts

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return super().forward(self.vpt(x), *args, **kwargs)


class WithoutPrompts(PromptMixin):
    """Mixin for a block: removes prompts after it."""

    slots = ("vpt_end",)

    vpt_end: DropPrompts

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return self.vpt_end(super().forward(x, *args, **kwargs))


class TravellingPrompts(PromptMixin):
    """Mixin for a model whose prompts are added before the first block and removed after the last, invisible to timm's interface."""

    slots = ("vpt_drop",)

    vpt_drop: DropPrompts  # removes the prompts after the last block

    def prune_intermediate_layers(self: Any, *args, **kwargs) -> list[int]:
        """timm's method; afterwards prompts are removed after the new last block."""
        taken = super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        surgery.extend(self, describe(self).blocks[-1].path, WithoutPrompts).vpt_end = self.vpt_drop
        return taken


def remove_prompts(model: nn.Module) -> None:
    """Remove all prompts from a model, in place, which restores its original function."""
    for path, module in list(model.named_modules()):
        for mixin in surgery.mixins_of(module):
            if issubclass(mixin, PromptMixin):
                surgery.retract(model, path, mixin)
