"""The outputs of a model or of one of its modules: one tensor, or the several of a detector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Outputs: TypeAlias = "Tensor | Iterable[Tensor] | Mapping[str, Tensor]"


def tensors_of(outputs: Outputs) -> list[Tensor]:
    """The tensors of outputs, in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return list(outputs.values() if isinstance(outputs, Mapping) else outputs)


def in_one(outputs: Outputs) -> Tensor:
    """The outputs as one tensor (B, …): of a detector, whose tensors are (stages, B, …), all values of an image in a row."""
    if isinstance(outputs, Tensor):
        return outputs
    parts = tensors_of(outputs)
    dtype = parts[0].dtype  # of logits; boxes stay in float32
    return torch.cat([part.to(dtype).movedim(1, 0).flatten(1) for part in parts], dim=1)
