"""What the training loop needs to know about its phase, in addition to the options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Phase:
    """A phase within its run: its name, its number (part of the seed), the run's seed, and its checkpoint file."""

    name: str
    number: int
    seed: int
    checkpoint: Path
