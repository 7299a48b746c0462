"""The outputs of a model: one tensor, or the several of a detector."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def tensors_of(outputs: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The tensors of a model's outputs."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def in_one(outputs: Tensor | Iterable[Tensor]) -> Tensor:
    """The outputs as one tensor (B, …): of a detector, whose tensors are (stages, B, …), all values of an image in a row."""
    if isinstance(outputs, Tensor):
        return outputs
    parts = tensors_of(outputs)
    dtype = parts[0].dtype  # of logits; boxes stay in float32
    return torch.cat([part.to(dtype).movedim(1, 0).flatten(1) for part in parts], dim=1)
