"""How training ends early: interrupted by a signal, or diverged."""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from compressvit.errors import UserError, is_command_line
from compressvit.training.meters import Reading
from compressvit.training.phase import Phase

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
S = TypeVar("S", bound="Signals")


class Interrupted(Exception):
    """The user stopped the run.

    Args:
        run: its folder, from which it can be continued; None if there is nothing in one yet.
        kept: what is not lost.
    """

    def __init__(self, signum: int, run: Path | None, kept: str):
        again = (
            f"compressvit apply {run} --resume"
            if is_command_line()
            else f"compressvit.apply(the same recipe, {str(run)!r}, resume=True)"
        )
        way = "" if run is None else f". Continue with: {again}"
        super().__init__(f"stopped by {signal.Signals(signum).name}; {kept}{way}")
        self.signum = signum


class Signals:
    """A context in which SIGINT and SIGTERM call `receive`. Outside the main thread only the caller can handle signals."""

    def __init__(self) -> None:
        self._old: dict[int, Any] = {}

    def receive(self, signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signum)

    def __enter__(self: S) -> S:
        for signum in _SIGNALS:
            with suppress(ValueError):  # not in the main thread
                self._old[signum] = signal.signal(signum, self.receive)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)


class StopRequest(Signals):
    """Turns SIGINT and SIGTERM into a request that the loop checks after every optimiser step."""

    def __init__(self) -> None:
        super().__init__()
        self.signum: int | None = None

    def receive(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:  # a second signal stops at once, without a checkpoint
            super().receive(signum, frame)
        self.signum = signum


class Stoppable(Signals):
    """Turns SIGINT and SIGTERM into an `Interrupted` where no training waits for them: while layers are fitted, or results written.

    Attributes:
        run: the folder of the run, once something is in it.
    """

    def __init__(self, run: Path | None):
        super().__init__()
        self.run = run

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        super().__exit__(kind, error, trace)
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(error.args[0] if error.args else signal.SIGINT, self.run, self._kept()) from error

    def _kept(self) -> str:
        if self.run is None:
            return "nothing had been written"
        held = [path for path in self.run.glob("checkpoints/[!.]*") if not path.name.endswith(".json")]
        if not held:
            return "there was no checkpoint yet, so the run begins again"
        return (
            f"the run is kept up to {max(held, key=lambda path: path.stat().st_mtime)}, and what came after is repeated"
        )


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
