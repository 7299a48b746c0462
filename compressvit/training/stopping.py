"""How training ends early: interrupted by a signal."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from compressvit import processes
from compressvit.errors import is_command_line

# Of the keyboard, of whoever ends the process, and what a cluster can send some time before that (SLURM's `--signal=USR1@60`); Windows has
# no SIGUSR1.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
HANG_UP: int | None = getattr(signal, "SIGHUP", None)  # of a terminal that is closed; Windows has none
_TOLD_AGAIN = (HANG_UP, getattr(signal, "SIGUSR1", None))  # which can come twice, and mean no hurry
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
    """A context in which signals, SIGINT, SIGTERM and SIGUSR1 by default, call `receive`. Outside the main thread only
    the caller can handle them."""

    def __init__(self, signals: Sequence[int] = _SIGNALS) -> None:
        self._signals, self._old = signals, dict[int, Any]()

    def receive(self, signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signum)

    def __enter__(self: S) -> S:
        for signum in self._signals:
            with suppress(ValueError):  # not in the main thread
                self._old[signum] = signal.signal(signum, self.receive)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)


class StopRequest(Signals):
    """Turns such signals into a request that the loop checks after every optimiser step.

    Args:
        hang_up: SIGHUP too, unless it is ignored, as under `nohup`.
    """

    def __init__(self, *, hang_up: bool = False) -> None:
        signals: list[int] = list(_SIGNALS)
        if hang_up and HANG_UP is not None and signal.getsignal(HANG_UP) is not signal.SIG_IGN:
            signals.append(HANG_UP)
        super().__init__(signals)
        self.signum: int | None = None
        self._held = False
        self._second: int | None = None

    def receive(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum = signum
        elif signum in _TOLD_AGAIN or processes.launched() > 1:  # from a scheduler and from the launcher
            return
        elif self._held:
            self._second = signum
        else:  # a second signal stops at once, without a checkpoint
            super().receive(signum, frame)

    def agreed(self) -> bool:
        """Whether a signal has come, to this process or to another one of the run; all get the same answer. Of one that comes meanwhile
        they know at the next call."""
        if (signum := processes.any_of(self.signum or 0)) and self.signum is None:
            self.signum = signum
        return signum != 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a second signal wait for the end of the block, which must not be left in the middle."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._second is not None:
            raise KeyboardInterrupt(self._second)


class Stoppable(Signals):
    """Turns such signals into an `Interrupted` where no training waits for them: while layers are fitted, or results written.

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
