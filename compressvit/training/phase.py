"""The identity of a phase within its run, which the training loop needs in addition to the options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Phase:
    """A phase within a run: its name, its number (which enters the seed), the run's seed, and its checkpoint file."""

    name: str
    number: int
    seed: int
    checkpoint: Path
