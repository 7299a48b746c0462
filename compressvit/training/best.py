"""`keep: best`: the weights of the best evaluation of a phase."""

from __future__ import annotations

from typing import Any, TypedDict

import torch

from compressvit.errors import UserError


class Best(TypedDict):
    """The best evaluation so far, as a checkpoint holds it. No weights where no evaluation has come yet, and its score is −∞."""

    score: float
    epoch: int
    model: dict[str, torch.Tensor] | None


def score(result: dict[str, Any]) -> float:
    """What evaluations are compared by: the first of top-1, agreement and cosine that the data and the model allow.

    Raises:
        UserError: they allow none.
    """
    for name in ("top1", "agreement", "cosine"):
        if result.get(name) is not None:
            return result[name]
    raise UserError(
        "keep=best has nothing to compare: there are no labels, and the outputs of student and teacher differ in width; use keep=last"
    )
