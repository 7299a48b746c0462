"""The bounds within which whoever reads a file of others stays, and a list of what goes wrong."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from compressvit.errors import UserError
from compressvit.text import printable

SECONDS = 10  # of computing
WAITING = 180  # seconds in all, on a machine that does something else, too
MEMORY = 2 * 2**30  # bytes, beyond what is in use
# COMPRESSVIT_SEED=20 begins with seed 20: other damage than that of seeds 0 to 9.
SEEDS = [int(os.environ.get("COMPRESSVIT_SEED", 0)) + number for number in range(10)]


class ExceededError(BaseException):
    """More time than is allowed. No handler of an `Exception` or `OSError` takes it for a fault of a file."""


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is a lack of memory, which a broad handler may have made a sentence."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """No more than `SECONDS` of computing, `WAITING` seconds in all, and `MEMORY`.

    Raises:
        ExceededError: it takes longer, also where whatever is inside goes on after that.
        MemoryError: as Python and torch raise it themselves, see `out_of_memory`.
    """

    def stop(*_: object) -> None:
        raise ExceededError("more than the time allowed")

    kinds = {signal.SIGPROF: (signal.ITIMER_PROF, SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, WAITING)}
    before = {kind: signal.signal(kind, stop) for kind in kinds}
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    began = time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    for timer, seconds in kinds.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, _ in kinds.values():
            signal.setitimer(timer, 0)
        for kind, handler in before.items():
            signal.signal(kind, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    if time.process_time() - began > SECONDS:
        raise ExceededError("more than the time allowed, after which it went on")


def within_bounds(read: Callable[[], object]) -> None:
    """Call `read` within the bounds; what it raises is raised, and a lack of memory is a `MemoryError`, whatever it was made into."""
    try:
        with bounded():
            read()
    except Exception as error:
        if out_of_memory(error) and not isinstance(error, MemoryError):
            raise MemoryError(f"a lack of memory became {type(error).__name__}: {error}") from error
        raise


class Faults(list[str]):
    """What was neither read nor refused in a sentence."""

    def attempt(self, read: Callable[[], object], what: str) -> str:
        """Call `read`, which may refuse with a `UserError`; note anything else.

        Returns:
            'accepted', 'our error', or the kind of fault in a word or two.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                within_bounds(read)
        except UserError as error:
            if len(str(error)) <= 20_000:
                return "our error"
            self._note(what, f"a message of {len(str(error)):,} characters")
            return "a long message"
        except (Exception, ExceededError) as error:  # whatever it is, it is what this test looks for
            self._note(what, "".join(traceback.format_exception(error)[-3:]))
            return type(error).__name__
        return "accepted"

    def _note(self, what: str, fault: str) -> None:
        """In text that pytest's workers can pass on."""
        self.append(printable(f"{what[:3000]}: {fault[-3000:]}"))

    def none_of(self, count: int) -> None:
        """Fail if there are any."""
        assert not self, f"{len(self)} of {count}\n\n" + "\n\n".join(self)
