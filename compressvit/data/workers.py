"""Processes that load images and die: they are restarted once, at the batch that is next.

torch tells of a death from a signal handler, wherever the program then is: within a training step nothing could be made good. Here it is
told while a batch is waited for, and not before.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

log = logging.getLogger("compressvit")

_DEATH = "DataLoader worker (pid"
_CHILD: int | None = getattr(signal, "SIGCHLD", None)  # Windows has none, and torch no handler there


class _Deaths:
    """The handler of SIGCHLD around torch's, while batches of ours are iterated over."""

    def __init__(self) -> None:
        self._depth = 0
        self._torch: Callable[[int, Any], Any] | None = None
        self._waiting = self._missed = False

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Within, torch's handler runs only while somebody is `waiting`. It must have been set, as it is with the first worker."""
        found = None if _CHILD is None else signal.getsignal(_CHILD)
        if self._depth == 0 and callable(found) and threading.current_thread() is threading.main_thread():
            self._torch, self._missed = found, False
            signal.signal(_CHILD, self._handle)  # type: ignore[arg-type]
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0 and self._torch is not None:
                signal.signal(_CHILD, self._torch)  # type: ignore[arg-type]
                self._torch = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within, a death is told: also one from before."""
        before, self._waiting = self._waiting, True
        try:
            if self._missed and self._torch is not None:
                self._missed = False
                self._torch(_CHILD or 0, None)
            yield
        finally:
            self._waiting = before

    def _handle(self, signum: int, frame: Any) -> None:
        if self._waiting and self._torch is not None:
            self._torch(signum, frame)
        else:
            self._missed = True


_DEATHS = _Deaths()


class RestartingLoader(DataLoader):
    """A DataLoader whose workers are started again, once, where one has died, and end when it does.

    Its sampler has an attribute `skipped`, the number of indices that an iteration leaves out at the beginning; where it has none, nobody
    knows where a new iteration would be, and the death is told at once.
    """

    _ending: weakref.finalize | None = None
    _restarted = False

    def batches(self) -> Iterator[Any]:
        """The batches of an iteration, as torch gives them."""
        if not self.num_workers:
            yield from super().__iter__()
            return
        batches, given = self._started(0), 0
        with _DEATHS.held_back():
            while True:
                try:
                    with _DEATHS.waiting():
                        batch = next(batches)
                except StopIteration:
                    return
                except (RuntimeError, ConnectionError, EOFError) as error:
                    if self._restarted or not hasattr(self.sampler, "skipped") or not _is_death(error, batches):
                        raise
                    self._restarted = True  # who dies for want of memory dies again
                    log.warning("a process that loads images has ended; they are started again, this once")
                    self.end_workers()
                    batches = self._started(given)
                    continue
                given += 1
                yield batch

    def _started(self, given: int) -> Any:
        """torch's iterator, without so many of its first batches."""
        if not given:
            return super().__iter__()
        sampler: Any = self.sampler
        sampler.skipped = given * (self.batch_size or 1)
        try:
            return super().__iter__()  # workers are given their first indices at once
        finally:
            sampler.skipped = 0

    def end_workers(self) -> None:
        """End them, whatever they do; the next iteration has new ones."""
        self._iterator = None
        if self._ending is not None:
            self._ending()

    def _get_iterator(self) -> Any:
        """torch's iterator, whose workers end when this loader does.

        Left to the garbage collector, an iterator in a cycle (with an exception that was thrown through it) has lost its queues before it
        can tell the workers; torch then waits 10 s for each, and, as they take no SIGTERM, Python at its end for ever. What a finalizer
        holds is whole.
        """
        made: Any = super()._get_iterator()
        if self.num_workers:
            if self._ending is not None:
                self._ending.detach()  # of an earlier epoch
            self._ending = weakref.finalize(self, made._shutdown_workers)
        return made


def _is_death(error: Exception, batches: Any) -> bool:
    """Whether a worker has died; a connection to it can break before the system says that it has."""
    if isinstance(error, RuntimeError):
        return _DEATH in str(error)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        if any(not worker.is_alive() for worker in getattr(batches, "_workers", ())):
            return True
        time.sleep(0.05)
    return False
