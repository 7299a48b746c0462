"""The interface of objects that observe training."""

from __future__ import annotations

from typing import Protocol

from compressvit.charts.findings import Finding


class Watch(Protocol):
    """An observer that the training loop calls around every optimiser step."""

    def before(self, steps: int) -> None:
        """Called before the forward pass of a batch; `steps` optimiser steps of the phase are done."""

    def after(self, step: int, epoch: int, scale: float) -> None:
        """Called with the accumulated gradients of step `step` (from 1), unscaled and not yet clipped. `scale` is the loss scale."""

    def findings(self) -> list[Finding]:
        """The findings so far, from this phase and earlier ones."""

    def close(self) -> None:
        """Remove all hooks from the model."""
