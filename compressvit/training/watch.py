"""What may look on while a model is trained."""

from __future__ import annotations

from typing import Protocol

from compressvit.charts.findings import Finding


class Watch(Protocol):
    """What the training loop calls around every optimiser step."""

    def before(self, steps: int) -> None:
        """A batch is about to go through the model; `steps` optimiser steps of the phase are done."""

    def after(self, step: int, epoch: int, scale: float) -> None:
        """The gradients of step number `step` (from 1) are whole: unscaled, not yet clipped. `scale` is what the loss was multiplied by."""

    def findings(self) -> list[Finding]:
        """What was seen so far, in this phase and those before."""

    def close(self) -> None:
        """Leave the model as it was."""
