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

    @property
    def before(self) -> Path:
        """The checkpoint before the last one, while the phase is unfinished: it is used where the last one is damaged."""
        return self.checkpoint.with_name(f"{self.checkpoint.stem}.before{self.checkpoint.suffix}")

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint to go on from; a run that was killed while one replaced the other has the one before."""
        return self.checkpoint.is_file() or self.before.is_file()
