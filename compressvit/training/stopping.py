"""How training ends early: interrupted by a signal, or diverged."""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from compressvit.errors import UserError, is_command_line
from compressvit.training.meters import Reading
from compressvit.training.phase import Phase


class Interrupted(Exception):
    """The user stopped the run; a checkpoint was written first."""

    def __init__(self, signum: int, checkpoint: Path):
        run = checkpoint.parents[1]
        again = (
            f"compressvit apply {run} --resume"
            if is_command_line()
            else f"compressvit.apply(the same recipe, {str(run)!r}, resume=True)"
        )
        super().__init__(f"stopped by {signal.Signals(signum).name}; {checkpoint} was written. Continue with: {again}")
        self.signum = signum


class StopRequest:
    """Turns SIGINT and SIGTERM into a request that the loop answers at the end of an optimiser step."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for signum in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # not in the main thread: whoever runs us there handles signals
                self._old[signum] = signal.signal(signum, self._note)
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:  # asked twice: do not insist on a tidy end
            raise KeyboardInterrupt
        self.signum = signum

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)


def diverged(phase: Phase, reading: Reading, what: str) -> UserError:
    """The error of a phase in which `what` is not finite, with the terms' values at that step."""
    terms = ", ".join(f"{k} {v:.4g}" for k, v in reading.terms.items())
    kept = (
        f"the last good checkpoint is kept: {phase.checkpoint}"
        if phase.checkpoint.is_file()
        else "no checkpoint had been written"
    )
    return UserError(
        f"{phase.name}: {what} at step {reading.step} ({terms}); stopped, and {kept}. "
        "Try a smaller lr, a longer warm-up, clip_grad, or precision: fp32"
    )
