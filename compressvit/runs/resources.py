"""What a machine lacks, in a sentence: memory, file handles, or a process that loads images and was killed for want of memory."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from compressvit.data.pictures import TooManyFiles
from compressvit.data.spec import Data
from compressvit.errors import UserError, switch

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory")
_DEAD_WORKER = "DataLoader worker (pid"


@contextmanager
def resource_faults(data: Data | None = None, fits: Callable[[], str] = str) -> Iterator[None]:
    """Turn what is raised where memory or file handles run out into a `UserError` that says which settings need less.

    Args:
        data: the recipe's section; None where batches are the caller's own.
        fits: says what would fit, where memory ran out.
    """
    try:
        yield
    except (ConnectionError, EOFError) as error:
        if data is not None and not data.num_workers:
            raise
        reason = _reason_of_death(error)
        if data is None and reason is error:  # raised by the caller's own data set
            raise
        raise _dead_worker(reason, data) from error
    except (MemoryError, RuntimeError) as error:  # torch.cuda.OutOfMemoryError is a RuntimeError
        if _DEAD_WORKER in str(error):
            raise _dead_worker(error, data) from error
        if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or any(t in str(error) for t in _NO_MEMORY):
            ways = (
                "Give smaller batches, or precision='bf16'"
                if data is None
                else f"Give a smaller data.batch_size (now {data.batch_size}) or data.eval_batch_size, or precision=bf16 in the phase; as "
                "another batch size is another recipe, start a new run"
            )
            raise UserError(f"memory ran out: {_first_line(error)}. {fits()}{ways}") from error
        raise
    except (OSError, TooManyFiles) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        ways = f"give {_fewer_workers(data)}, or raise the limit (`ulimit -n` shows it)"
        raise UserError(f"the system opens no more files: {_first_line(error)}; {ways}") from error


def _reason_of_death(error: Exception) -> Exception:
    """What torch says of a worker when the system tells it that one has died, which can be after the connection to it broke."""
    try:
        time.sleep(1)
    except RuntimeError as reason:  # raised by torch's signal handler, wherever the program is
        return reason
    return error


def _dead_worker(error: Exception, data: Data | None) -> UserError:
    return UserError(
        f"a process that loads images has ended: {_first_line(error)}. Most often memory ran out: give {_fewer_workers(data)}, 0 to "
        f"load them in the training process; {switch('resume')} goes on with it"
    )


def _fewer_workers(data: Data | None) -> str:
    return "the DataLoader fewer num_workers" if data is None else f"fewer data.num_workers (now {data.num_workers})"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught "):  # in a worker, which adds its trace; the last line says what, after its name
        return lines[-1].partition(": ")[2].rstrip(". ") or lines[-1]
    return lines[0].rstrip(". ")
