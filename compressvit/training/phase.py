"""What the training loop needs to know about its phase, in addition to the options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


@dataclass(frozen=True)
class Phase:
    """A phase within its run: its name, its number (part of the seed), the run's seed, and its checkpoint file."""

    name: str
    number: int
    seed: int
    checkpoint: Path


@dataclass(frozen=True)
class Teacher:
    """The teacher of a distillation, and the conversion of images to its input."""

    model: nn.Module
    input: Callable[[torch.Tensor], torch.Tensor] = lambda images: images
