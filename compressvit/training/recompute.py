"""Activation checkpointing: a block keeps its input for the backward pass and computes the rest again there.

Chen et al., "Training deep nets with sublinear memory cost", https://arxiv.org/abs/1604.06174; torch's form without reentrance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from compressvit.model.backbone import describe


class Recomputed:
    """Blocks of a model that compute their activations again, until `close`. Random numbers are those of the forward pass.

    A block with hooks inside keeps its activations: the hooks would be called again, by a computation that nobody asked for.

    Args:
        model: of a family whose blocks are known.

    Attributes:
        blocks: their paths.

    Raises:
        UserError: its blocks are not known.
    """

    def __init__(self, model: nn.Module):
        self._modules: list[nn.Module] = []
        self.blocks: list[str] = []
        for info in describe(model, "blocks", asker="activation_checkpointing").blocks:
            block = model.get_submodule(info.path)
            inner = (module for module in block.modules() if module is not block)
            if any(module._forward_hooks or module._forward_pre_hooks for module in inner):
                continue
            block.forward = _again(block.forward)
            self._modules.append(block)
            self.blocks.append(info.path)

    def close(self) -> None:
        """Let the blocks keep their activations."""
        for block in self._modules:
            del block.__dict__["forward"]
        self._modules = []


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward pass whose activations are computed again if there is a backward pass."""
    recomputed = partial(checkpoint, forward, use_reentrant=False)

    @wraps(forward)
    def once(*inputs: Any, **named: Any) -> Any:
        return (recomputed if torch.is_grad_enabled() else forward)(*inputs, **named)

    return once
