"""`keep: best`: the weights of the best evaluation of a phase."""

from __future__ import annotations

from typing import TypedDict

import torch


class Best(TypedDict):
    """The best evaluation so far, as a checkpoint holds it. Before the first evaluation there are no weights and the score is −∞."""

    score: float
    epoch: int
    model: dict[str, torch.Tensor] | None
